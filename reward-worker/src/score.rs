//! `score`: scores the images of an evaluation folder, outside of any run.

use crate::args::ScoreArgs;
use crate::failure::Failure;
use crate::run::{configured, small_world};
use crate::scorer::{Job, Panel};
use duet_config::Config;
use duet_core::work::{LeafScores, PromptRow, Score};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use tch::Tensor;

/// What is read of `eval.json`.
#[derive(Debug, Deserialize)]
struct Evaluation {
    prompts: Vec<Prompt>,
}

#[derive(Debug, Deserialize)]
struct Prompt {
    row: u64,
    refined_prompt: String,
    images: Vec<Image>,
}

#[derive(Debug, Deserialize)]
struct Image {
    file: String,
}

/// The scores of one image: a line of `scores.jsonl`. What could not be scored is in `failed`, never
/// a number.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageScores {
    /// Row in the prompt file.
    pub row: u64,
    /// Which of the prompt's images.
    pub image: usize,
    /// Scores by component.
    pub scores: BTreeMap<String, f64>,
    /// Why there is none, by component.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub failed: BTreeMap<String, String>,
}

/// Scores as the command line says; `say` is told what is going on, a line at a time.
///
/// # Errors
/// [`Failure`] naming the file or the scorer.
pub fn score(args: &ScoreArgs, mut say: impl FnMut(&str)) -> Result<(), Failure> {
    duet_torch::init(1)?;
    let mut panel = match &args.config {
        Some(path) => {
            let environment = duet_config::environment();
            let config = Config::load(path, &environment, &args.set)?;
            let folder = args.scorers.clone().unwrap_or_else(|| config.model_path());
            configured(&folder, &config.reward)?
        }
        None => small_world(args.scorers.as_deref().ok_or_else(|| {
            Failure::Config("give --config, whose [reward] names scorers, or --scorers".into())
        })?)?,
    };
    let rows = duet_config::prompts::read(&args.prompts)
        .map_err(|error| Failure::Io(error.to_string()))?;
    let rows: BTreeMap<u64, PromptRow> = rows.into_iter().map(|row| (row.row, row)).collect();
    let path = args.eval.join("eval.json");
    let bad = |reason: String| Failure::Io(format!("{}: {reason}", path.display()));
    let text = std::fs::read(&path).map_err(|error| bad(error.to_string()))?;
    let evaluation: Evaluation =
        serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    let (mut lines, count) = (String::new(), evaluation.prompts.len());
    for (done, prompt) in evaluation.prompts.into_iter().enumerate() {
        let row = rows.get(&prompt.row).cloned().ok_or_else(|| {
            bad(format!("prompt {} is not in {}", prompt.row, args.prompts.display()))
        })?;
        for one in scores(&mut panel, row, &prompt, &args.eval)? {
            lines += &serde_json::to_string(&one).unwrap_or_default();
            lines.push('\n');
        }
        if (done + 1) % 8 == 0 || done + 1 == count {
            say(&format!("scored {} of {count} prompts", done + 1));
        }
    }
    let out = args.eval.join("scores.jsonl");
    std::fs::write(&out, lines)
        .map_err(|error| Failure::Io(format!("cannot write {}: {error}", out.display())))
}

/// The scores of one prompt's images.
fn scores(
    panel: &mut Panel,
    row: PromptRow,
    prompt: &Prompt,
    folder: &Path,
) -> Result<Vec<ImageScores>, Failure> {
    let images = prompt.images.iter().map(|image| pixels(&folder.join(&image.file)));
    let images = images.collect::<Result<Vec<_>, _>>()?;
    if images.is_empty() {
        return Ok(Vec::new());
    }
    let images = Tensor::f_stack(&images, 0)
        .map_err(|error| Failure::Io(format!("the images of prompt {}: {error}", prompt.row)))?;
    let job = Job { prompt: row, refined_prompt: prompt.refined_prompt.clone(), images };
    let all = panel.score(&job);
    Ok(all.into_iter().enumerate().map(|(image, leaf)| sorted(prompt.row, image, leaf)).collect())
}

fn sorted(row: u64, image: usize, leaf: LeafScores) -> ImageScores {
    let mut one = ImageScores { row, image, ..ImageScores::default() };
    for (component, score) in leaf {
        match score {
            Score::Scored(value) => drop(one.scores.insert(component, value)),
            Score::Failed(reason) => drop(one.failed.insert(component, reason)),
            Score::TimedOut(after) => {
                drop(one.failed.insert(component, format!("no answer within {} ms", after.0)));
            }
        }
    }
    one
}

/// A picture as `u8 [H, W, 3]`.
fn pixels(path: &Path) -> Result<Tensor, Failure> {
    let bad = |reason: String| Failure::Io(format!("{}: {reason}", path.display()));
    let bytes = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
    let picture = image::load_from_memory_with_format(&bytes, image::ImageFormat::Png)
        .map_err(|error| bad(error.to_string()))?
        .to_rgb8();
    let size = [i64::from(picture.height()), i64::from(picture.width()), 3];
    Ok(Tensor::from_slice(picture.as_raw()).view(size.as_slice()))
}
