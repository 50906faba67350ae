//! `eval`: thinks about and draws every prompt of a file, and has a judge look at the images.
//!
//! Everything is a function of the model, the options and the seed: a second run writes the same
//! bytes, and a prompt's images do not depend on the other prompts.

pub mod command;
mod judge;
mod record;

pub use judge::{Judge, WorldJudge};
pub use record::{Evaluation, ImageRecord, PromptRecord, Settings, Subject, Totals};

use crate::engine::Engine;
use crate::error::WorkError;
use crate::picture::PictureError;
use crate::sample::picture;
use duet_core::work::{PromptRow, Window};
use duet_core::{Purpose, Seed};
use duet_models::ModelError;
use duet_models::render::Rendered;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// An evaluation failed.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The models refused.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// A prompt could not be drawn.
    #[error("prompt {row}: {source}")]
    Prompt {
        /// Its row.
        row: u64,
        /// Why.
        source: ModelError,
    },
    /// The judge refused.
    #[error("the judge: {0}")]
    Judge(String),
    /// A picture cannot be written.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// A file or folder cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

/// What to do with each prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Seed of all noise.
    pub seed: u64,
    /// Whether the LLM thinks before the image is drawn.
    pub think: bool,
    /// Images of each prompt.
    pub images_per_prompt: usize,
}

/// What `meta` may say of a prompt.
#[derive(Debug, Default, Deserialize)]
struct Meta {
    digit: Option<u8>,
    colour: Option<String>,
    #[serde(default)]
    category: String,
}

/// Evaluates `rows` into `out/eval.json` and `out/images/`; `eval.json` is written last. `tell` is
/// told how many prompts are done.
///
/// # Errors
/// [`EvalError`] naming the prompt or the file.
pub fn evaluate(
    engine: &mut Engine,
    judge: Option<&dyn Judge>,
    rows: &[PromptRow],
    options: &Options,
    out: &Path,
    mut tell: impl FnMut(usize),
) -> Result<Evaluation, EvalError> {
    let images = out.join("images");
    std::fs::create_dir_all(&images)
        .map_err(|source| EvalError::Io { path: images.clone(), source })?;
    let mut records = Vec::with_capacity(rows.len());
    for (done, row) in rows.iter().enumerate() {
        records.push(prompt(engine, judge, row, options, out)?);
        tell(done + 1);
    }
    let evaluation = Evaluation::new(settings(engine, options), records);
    let path = out.join("eval.json");
    write(&path, &evaluation).map_err(|source| EvalError::Io { path, source })?;
    Ok(evaluation)
}

fn settings(engine: &Engine, options: &Options) -> Settings {
    let sampling = engine.sampling();
    Settings {
        seed: options.seed,
        think: options.think,
        temperature: sampling.temperature,
        steps: sampling.render.steps,
        guidance_scale: sampling.render.guidance,
        width: sampling.render.width as u32,
        height: sampling.render.height as u32,
        images_per_prompt: options.images_per_prompt,
    }
}

fn write(path: &Path, evaluation: &Evaluation) -> std::io::Result<()> {
    let mut text = serde_json::to_vec_pretty(evaluation).map_err(std::io::Error::other)?;
    text.push(b'\n');
    let beside = path.with_extension("partial");
    std::fs::write(&beside, text)?;
    std::fs::rename(&beside, path)
}

/// One prompt: thinks, draws, has it judged, writes its images.
fn prompt(
    engine: &mut Engine,
    judge: Option<&dyn Judge>,
    row: &PromptRow,
    options: &Options,
    out: &Path,
) -> Result<PromptRecord, EvalError> {
    // Metadata of other data sets is nothing to stumble over.
    let meta: Meta = serde_json::from_str(&row.meta).unwrap_or_default();
    let target = match (meta.digit, meta.colour) {
        (Some(digit), Some(colour)) => Some(Subject { digit, colour }),
        _ => None,
    };
    let seed = Seed::root(options.seed).derive(Purpose::Evaluation, &[row.row]);
    let drawn = draw(engine, row, options, &seed)
        .map_err(|source| EvalError::Prompt { row: row.row, source })?;
    let seen = match judge {
        Some(judge) => {
            let seen = judge.see(&drawn.rendered.images).map_err(EvalError::Judge)?;
            seen.into_iter().map(Some).collect()
        }
        None => vec![None; options.images_per_prompt],
    };
    let named = named(&drawn.refined_prompt);
    let mut images = Vec::new();
    for (k, judged) in seen.into_iter().enumerate() {
        let file = format!("images/{:05}-{k}.png", row.row);
        save(&drawn, row, k, &out.join(&file))?;
        let is = |other: &Option<Subject>| judged.as_ref().map(|seen| Some(seen) == other.as_ref());
        let semantic = target.as_ref().and(is(&target));
        let render = is(&named);
        images.push(ImageRecord { file, judged, semantic, render });
    }
    Ok(PromptRecord {
        row: row.row,
        prompt: row.text.clone(),
        category: meta.category,
        trace_right: target.as_ref().map(|target| Some(target) == named.as_ref()),
        target,
        trace: drawn.trace,
        refined_prompt: drawn.refined_prompt,
        well_formed: drawn.well_formed,
        named,
        images,
    })
}

/// A prompt's trace and images.
struct Drawn {
    trace: String,
    refined_prompt: String,
    well_formed: bool,
    rendered: Rendered,
}

fn draw(
    engine: &mut Engine,
    row: &PromptRow,
    options: &Options,
    seed: &Seed,
) -> Result<Drawn, ModelError> {
    let (trace, refined_prompt, well_formed, embeds) = if options.think {
        let question = engine.question(&row.text)?;
        let thought = engine.think(&question, 1, seed)?.pop();
        let thought = thought.ok_or_else(|| ModelError::BadInput("no trace".to_owned()))?;
        (thought.text, thought.refined_prompt, thought.well_formed, thought.embeds)
    } else {
        (String::new(), row.text.clone(), false, engine.embed(&row.text)?)
    };
    let rendered = engine.draw(&embeds, options.images_per_prompt, Window::default(), seed)?;
    Ok(Drawn { trace, refined_prompt, well_formed, rendered })
}

fn save(drawn: &Drawn, row: &PromptRow, k: usize, path: &Path) -> Result<(), EvalError> {
    let texts = vec![
        ("prompt".to_owned(), row.text.clone()),
        ("refined prompt".to_owned(), drawn.refined_prompt.clone()),
    ];
    let picture = picture(&drawn.rendered.images, k, texts)
        .map_err(|source| EvalError::Prompt { row: row.row, source })?;
    Ok(picture.save(path)?)
}

/// The digit and the colour that a text names, where it names one of each.
fn named(text: &str) -> Option<Subject> {
    let (digit, colour, _) = duet_miniworld::prompts::named(text);
    let colour = duet_miniworld::facts::COLOURS.get(usize::from(colour?))?;
    Some(Subject { digit: digit?, colour: (*colour).to_owned() })
}
