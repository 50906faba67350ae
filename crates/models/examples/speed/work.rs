//! The pieces that are timed.

use crate::Outcome;
use crate::iteration::Iteration;
use duet_core::Seed;
use duet_core::work::Window;
use duet_models::decoder::Decoder;
use duet_models::dit::Dit;
use duet_models::flow::FlowSchedule;
use duet_models::generate::{SampleOptions, generate};
use duet_models::logprob::token_log_probs;
use duet_models::lora::{Lora, LoraConfig};
use duet_models::pipeline::Pipeline;
use duet_models::render::{Condition, RenderOptions, Sampler, replay};
use duet_models::sde::{SdeKind, step};
use duet_torch::normal_tensor;
use std::path::Path;
use tch::{Kind, Tensor};

/// The models and inputs of all pieces.
pub struct Work {
    medium: Pipeline,
    small: Pipeline,
    /// The same weights again, with an adapter on the transformer.
    tuned: Pipeline,
    iteration: Iteration,
}

/// How images are sampled in every piece.
pub fn options() -> RenderOptions {
    RenderOptions {
        steps: 10,
        guidance: 4.0,
        sde: SdeKind::FlowGrpo,
        noise_level: 0.8,
        width: 64,
        height: 64,
    }
}

/// The adapter of the transformer.
pub fn adapter() -> LoraConfig {
    LoraConfig { rank: 16, alpha: 32.0, targets: LoraConfig::dit_targets() }
}

fn noise(shape: &[i64]) -> Tensor {
    normal_tensor(&Seed::root(2), shape)
}

impl Work {
    pub fn new(folder: &Path, threads: u32) -> Outcome<Work> {
        let medium = Pipeline::load(&folder.join("medium"))?;
        let mut tuned = Pipeline::load(&folder.join("medium"))?;
        let lora = Lora::attach(&mut tuned.dit, adapter(), &Seed::root(3))?;
        lora.params().set_trainable(|_| true);
        medium.lm.params().set_trainable(|_| true);
        Ok(Work {
            medium,
            small: Pipeline::load(&folder.join("small"))?,
            tuned,
            iteration: Iteration::new(&folder.join("medium"), threads)?,
        })
    }

    /// Runs the piece called `name` once.
    pub fn run(&mut self, name: &str) -> Outcome<()> {
        match name {
            "tokens-medium-32" => tokens(&self.medium, 32),
            "tokens-medium-128" => tokens(&self.medium, 128),
            "tokens-small-32" => tokens(&self.small, 32),
            "tokens-small-128" => tokens(&self.small, 128),
            "dit-sampling" => denoise(&self.medium),
            "vae-decode" => {
                tch::no_grad(|| drop(self.medium.vae.decode(&noise(&[16, 4, 16, 16]))));
                Ok(())
            }
            "dit-update" => dit_update(&self.tuned),
            "llm-update" => llm_update(&self.medium),
            "iteration" => self.iteration.run(),
            other => Err(format!("there is no piece called `{other}`").into()),
        }
    }
}

fn tokens(pipeline: &Pipeline, count: usize) -> Outcome<()> {
    let prompt: Vec<i64> = (0..60).collect();
    let options =
        SampleOptions { traces: 16, max_new_tokens: count, temperature: 1.0, eos: vec![] };
    let decoder = Decoder::new(&pipeline.lm)?;
    let answers = generate(&decoder, &prompt, &Seed::root(4), &options)?;
    if answers.iter().all(|answer| answer.tokens.len() == count) {
        Ok(())
    } else {
        Err("an answer is too short".into())
    }
}

const WINDOW: Window = Window { start: 1, len: 2 };

fn sampler<'a>(
    dit: &'a Dit,
    pipeline: &Pipeline,
    condition: Condition<'_>,
    options: &'a RenderOptions,
) -> Outcome<Sampler<'a>> {
    let schedule = FlowSchedule::new(&pipeline.flow, options.steps, 64)?;
    Ok(Sampler::new(dit, schedule, condition, (16, (8, 8)), WINDOW, options)?)
}

/// As `render` does: the window's steps with the model that is trained, the others with its copy for
/// sampling, which is made each time.
fn denoise(pipeline: &Pipeline) -> Outcome<()> {
    let (embeds, negative) = (noise(&[20, 256]), noise(&[6, 256]));
    let (condition, options) =
        (Condition { embeds: &embeds, negative: Some(&negative) }, options());
    tch::no_grad(|| {
        let copy = pipeline.dit.folded()?.ok_or("there is no copy for sampling")?;
        let trained = sampler(&pipeline.dit, pipeline, condition, &options)?;
        let plain = sampler(&copy, pipeline, condition, &options)?;
        let mut x = noise(&[16, 64, 16]);
        let eps = noise(&[16, 64, 16]);
        for index in 0..options.steps {
            let inside = (1..3).contains(&index);
            let sampler = if inside { &trained } else { &plain };
            let velocity = sampler.velocity(&x, index)?;
            x = step(&sampler.coefficients(index), &x, &velocity, Some(&eps)).next;
        }
        Ok(())
    })
}

fn dit_update(pipeline: &Pipeline) -> Outcome<()> {
    let (embeds, negative) = (noise(&[20, 256]), noise(&[6, 256]));
    let (condition, options) =
        (Condition { embeds: &embeds, negative: Some(&negative) }, options());
    let sampler = sampler(&pipeline.dit, pipeline, condition, &options)?;
    let found = replay(&sampler, &noise(&[16, 3, 64, 16]), 0..2)?;
    Ok(found.log_probs.mean(Kind::Float).f_backward()?)
}

fn llm_update(pipeline: &Pipeline) -> Outcome<()> {
    let prompt: Vec<i64> = (0..60).collect();
    let answers: Vec<Vec<i64>> = (0..16).map(|i| (i..i + 128).collect()).collect();
    let found = token_log_probs(&pipeline.lm, &prompt, &answers, 1.0, false)?;
    Ok(found.values.mean(Kind::Float).f_backward()?)
}
