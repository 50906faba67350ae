//! Makes the base model of the small world from nothing, deterministically.
//!
//! ```text
//! thread 1   language model ----> sft ---------------\
//! thread 2   autoencoder -> recogniser -> critic -----+--> transformer ----> folder
//! thread 3   (when the transformer starts)  judge ---/
//! ```

mod budget;
mod drawing;
mod language;
mod manifest;
mod seeing;
mod transformer;

pub use budget::{Budget, Profile};
pub use drawing::{dit_config, flow_config, vae_config};
pub use language::{INSTRUCTION, config as lm_config, tokenizer, train as train_language};
pub use manifest::{Manifest, Measured, Stage};
pub use transformer::transformer as train_transformer;

use crate::corpus::Example;
use crate::digits::SIDE;
use crate::error::{Result, WorldError};
use crate::eval::{Sampling, render_accuracy, trace_accuracy};
use crate::judge::Judge;
use crate::prompts::{Split, prompts, rows};
use crate::scorers::Scorers;
use duet_core::{Purpose, Seed};
use duet_models::defaults::Defaults;
use duet_models::pipeline::{Pipeline, VisionConfig, init_vision_tower};
use duet_models::vae::Vae;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// How far a phase is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Notice {
    /// The phase.
    pub phase: &'static str,
    /// Steps done.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
    /// Loss of the last step.
    pub loss: f64,
}

/// Who wants to know how far it is. Called from the threads that train.
pub trait Progress: Sync {
    /// A step is done.
    fn notice(&self, notice: Notice);
}

/// Nobody does.
impl Progress for () {
    fn notice(&self, _: Notice) {}
}

/// Any function does.
impl<F: Fn(Notice) + Sync> Progress for F {
    fn notice(&self, notice: Notice) {
        self(notice);
    }
}

/// Share of the answers read in pre-training that end with a refined prompt, where no SFT follows:
/// a base that is asked to think does it now and then, as a published instruction model does.
const FORMED: f64 = 0.3;

/// Longest answer of the small world's language model.
pub const MAX_NEW_TOKENS: usize = 48;
/// Denoising steps that images are sampled with.
pub const STEPS: usize = 8;
/// Guidance that images are sampled with.
pub const GUIDANCE: f64 = 4.0;

/// Everything that is made.
struct World {
    pipeline: Pipeline,
    scorers: Scorers,
    judge: Judge,
    examples: Vec<Example>,
    measured: Measured,
}

/// Makes the base model in `out`: a pipeline folder with `miniworld/` in it. A folder that already
/// holds the same (seed, profile, recipe), whole, is left as it is. The folder appears complete or
/// not at all.
///
/// # Errors
/// `out` holds something else, the system refuses, or training fails.
pub fn run(out: &Path, seed: u64, profile: Profile, progress: &dyn Progress) -> Result<Manifest> {
    run_to(out, (seed, profile, Stage::Sft), progress)
}

/// As [`run`], up to a stage. With [`Stage::Pretrained`] the language model has never seen a worked
/// example, and the transformer is trained on that model's states: the base that SFT starts from.
///
/// # Errors
/// As [`run`].
pub fn run_to(
    out: &Path,
    what: (u64, Profile, Stage),
    progress: &dyn Progress,
) -> Result<Manifest> {
    let (seed, profile, stage) = what;
    if let Some(manifest) = Manifest::of(out, what)? {
        return Ok(manifest);
    }
    let mut budget = profile.budget();
    if stage == Stage::Pretrained {
        (budget.sft.steps, budget.formed) = (0, FORMED);
        // One more thing to learn takes longer, and no SFT mends what is half learned.
        budget.pretrain.steps += budget.pretrain.steps / 2;
    }
    let world = make(&budget, &Seed::root(seed), progress)?;
    let part = part_of(out)?;
    let _ = std::fs::remove_dir_all(&part);
    let made = write(&world, &part, what).and_then(|manifest| {
        manifest::replace(&part, out)?;
        Ok(manifest)
    });
    if made.is_err() {
        let _ = std::fs::remove_dir_all(&part);
    }
    made
}

/// Libtorch counts its threads per calling thread; two that take two each on two cores are several
/// times slower than two that take one, and results depend on the number.
fn one_thread() {
    tch::set_num_threads(1);
}

fn make(budget: &Budget, seed: &Seed, progress: &dyn Progress) -> Result<World> {
    one_thread();
    let tokenizer = tokenizer()?;
    let (language, images) = std::thread::scope(|scope| {
        let language = scope.spawn(|| {
            one_thread();
            language::train(&tokenizer, budget, seed, progress)
        });
        let images = images(budget, seed, progress);
        (language.join(), images)
    });
    let (lm, examples) =
        language.map_err(|_| WorldError::Stopped("the language model's thread"))??;
    let (vae, mse, scorers, recognised, criticised) = images?;
    let (dit, judged) = std::thread::scope(|scope| {
        let judged = scope.spawn(|| {
            one_thread();
            seeing::judge(budget, seed, progress)
        });
        let dit = transformer::transformer(
            (&lm, &tokenizer, &vae),
            dit_config(&lm),
            budget.dit,
            seed,
            progress,
        );
        (dit, judged.join())
    });
    let (judge, judge_right) = judged.map_err(|_| WorldError::Stopped("the judge's thread"))??;
    let tower = VisionConfig::tiny(lm.config().hidden_size);
    let eyes = init_vision_tower(&tower, &seed.derive(Purpose::Weights, &[7]));
    let pipeline = Pipeline::assemble(lm, dit?, vae, tokenizer, flow_config(), (&tower, eyes))?;
    let sampling = Sampling::default();
    let held_out = prompts(Split::Validation);
    let measured = Measured {
        recogniser_accuracy: recognised,
        critic_accuracy: criticised,
        judge_accuracy: judge_right,
        vae_mean_squared_error: mse,
        trace_accuracy: trace_accuracy(&pipeline, &held_out, 2, seed)?.right,
        render_accuracy: render_accuracy(&pipeline, &judge, 60, seed, &sampling)?,
    };
    Ok(World { pipeline, scorers, judge, examples, measured })
}

fn images(
    budget: &Budget,
    seed: &Seed,
    progress: &dyn Progress,
) -> Result<(Vae, f64, Scorers, f64, f64)> {
    let (vae, mse) = drawing::autoencoder(budget, seed, progress)?;
    let (scorers, recognised, criticised) = seeing::scorers(budget, seed, progress)?;
    Ok((vae, mse, scorers, recognised, criticised))
}

fn write(world: &World, folder: &Path, what: (u64, Profile, Stage)) -> Result<Manifest> {
    let side = SIDE as i64;
    let own = folder.join("miniworld");
    std::fs::create_dir_all(&own).map_err(|error| WorldError::io(&own, error))?;
    let defaults = Defaults {
        instruction: INSTRUCTION.to_owned(),
        max_new_tokens: MAX_NEW_TOKENS,
        steps: STEPS,
        guidance_scale: GUIDANCE,
        width: side,
        height: side,
    };
    defaults.write(folder)?;
    world.scorers.save(folder)?;
    world.judge.save(folder)?;
    for split in Split::ALL {
        let path = own.join(format!("prompts-{}.jsonl", split.name()));
        lines(
            &path,
            rows(split).iter().map(|row| PromptLine { text: &row.text, meta: meta(&row.meta) }),
        )?;
    }
    lines(&own.join("sft.jsonl"), world.examples.iter())?;
    world.pipeline.save(folder)?;
    Manifest::write(folder, what, world.measured)
}

/// A line of a prompt file.
#[derive(Serialize)]
struct PromptLine<'a> {
    text: &'a str,
    meta: serde_json::Value,
}

fn meta(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_default()
}

fn lines<T: Serialize>(path: &Path, rows: impl Iterator<Item = T>) -> Result<()> {
    let mut text = String::new();
    for row in rows {
        let line = serde_json::to_string(&row).map_err(|error| WorldError::BadFile {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        text.push_str(&line);
        text.push('\n');
    }
    std::fs::write(path, text).map_err(|error| WorldError::io(path, error))
}

/// Where the folder is made before it takes its place.
fn part_of(out: &Path) -> Result<PathBuf> {
    let name = out.file_name().ok_or_else(|| {
        WorldError::BadInput(format!("{}: not the name of a folder to make", out.display()))
    })?;
    let part = format!(".{}.part-{}", name.to_string_lossy(), std::process::id());
    Ok(out.with_file_name(part))
}
