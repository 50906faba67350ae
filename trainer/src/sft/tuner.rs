//! The torch side of supervised fine-tuning: one optimiser step on one batch of worked examples.
//!
//! A step is a function of the weights, the moments and the step's number alone: which examples it
//! takes follows from the seed. The loss is normalised over the answer tokens of the whole batch, so
//! packing and the number of ranks change the order of additions, nothing else.

use super::data::Worked;
use crate::engine::branch::Branch;
use crate::engine::gradient::{Reduction, Sharing};
use crate::engine::layout::Seat;
use crate::engine::tally::Tally;
use crate::engine::{BranchSettings, OldPolicy, llm};
use crate::error::TrainError;
use duet_config::Sft;
use duet_core::{Digest, Purpose, Seed};
use duet_models::ModelError;
use duet_models::embed::{DROPPED, Embedder};
use duet_models::lm::Lm;
use duet_models::pipeline::{LoadOptions, Pipeline};
use duet_models::sft::{Example, anchor_loss, pack, row_loss};
use duet_models::template::{ThinkTemplate, extract};
use duet_torch::collective::Collective;
use duet_torch::optim::AdamWOptions;
use duet_torch::{Tensors, digest_tensors};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use tch::Tensor;

/// Everything that decides what is learned.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The base model's pipeline folder.
    pub model: PathBuf,
    /// Where and as what it is loaded.
    pub load: LoadOptions,
    /// What the LLM is told before the prompt.
    pub instruction: String,
    /// The run's root seed: the order of the examples.
    pub seed: Seed,
    /// The stage.
    pub sft: Sft,
    /// Gradients are scaled down to this L2 norm.
    pub max_grad_norm: f64,
    /// How gradients are summed over ranks.
    pub sharing: Sharing,
}

/// A step, for people and programs: a line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepDone {
    /// Its number, from one.
    pub step: u64,
    /// Of so many.
    pub steps: u64,
    /// Passes over the examples begun, from one.
    pub epoch: u64,
    /// Mean cross-entropy of an answer token.
    pub loss: f64,
    /// Share of answer tokens that were the most probable ones.
    pub accuracy: f64,
    /// Mean squared distance of the states that condition images from the base model's; zero without
    /// an anchor.
    pub anchor: f64,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Answer tokens.
    pub answer_tokens: u64,
    /// Tokens, prompts too.
    pub tokens: u64,
}

/// The model in training.
pub struct Tuner {
    settings: Settings,
    pipeline: Pipeline,
    branch: Branch,
    examples: Vec<Example>,
    /// The base model and every example's refined prompt, where an anchor holds the states.
    anchor: Option<(Lm, Vec<Vec<i64>>)>,
    dropped: usize,
    step: u64,
    order: (u64, Vec<usize>),
}

impl Tuner {
    /// Loads the base model and turns the examples into tokens.
    ///
    /// # Errors
    /// [`TrainError`] naming the file that does not fit, or when no example is short enough.
    pub fn load(settings: Settings, worked: &[Worked]) -> Result<Tuner, TrainError> {
        let mut pipeline = Pipeline::load_with(&settings.model, settings.load)?;
        pipeline.vae.params().set_trainable(|_| false);
        pipeline.dit.params().set_trainable(|_| false);
        let examples = tokens(&pipeline, &settings.instruction, worked)?;
        let all = examples.len();
        let short = |example: &Example| example.len() <= settings.sft.max_tokens as usize;
        let anchor = (settings.sft.anchor > 0.0)
            .then(|| {
                let kept = examples.iter().zip(worked).filter(|(example, _)| short(example));
                let prompts = refined(&pipeline, kept.map(|(_, worked)| worked))?;
                Ok::<_, TrainError>((llm::copy(&pipeline.lm)?, prompts))
            })
            .transpose()?;
        let examples: Vec<Example> = examples.into_iter().filter(short).collect();
        if examples.is_empty() {
            let reason = format!(
                "sft.max_tokens: all {all} examples have more than {} tokens; raise it",
                settings.sft.max_tokens
            );
            return Err(ModelError::BadInput(reason).into());
        }
        let sft = &settings.sft;
        let [beta1, beta2] = sft.betas;
        let adamw = AdamWOptions { beta1, beta2, eps: sft.eps, weight_decay: sft.weight_decay };
        let old = OldPolicy::Trained;
        let branch = BranchSettings { lr: sft.lr, adamw, lora: None, frozen: false, ema: 0.0, old };
        let seed = settings.seed.derive(Purpose::Weights, &[2]);
        let mut branch = Branch::new("llm", &mut pipeline.lm, Lm::params, branch, &seed)?;
        branch.sit(Seat::ALONE, settings.sharing)?;
        let dropped = all - examples.len();
        let order = (u64::MAX, Vec::new());
        Ok(Tuner { settings, pipeline, branch, examples, anchor, dropped, step: 0, order })
    }

    /// Steps taken.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Steps of the whole stage.
    pub fn steps(&self) -> u64 {
        self.steps_per_epoch() * u64::from(self.settings.sft.epochs)
    }

    fn steps_per_epoch(&self) -> u64 {
        (self.examples.len() as u64).div_ceil(u64::from(self.settings.sft.batch))
    }

    /// Examples that are learned from.
    pub fn examples(&self) -> usize {
        self.examples.len()
    }

    /// Examples that were left out for their length.
    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// The model as it is.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// Hash over all trained tensors.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn digest(&self) -> Result<Digest, TrainError> {
        Ok(digest_tensors(&self.branch.params)?)
    }

    /// Optimiser steps that AdamW has counted.
    pub fn optimiser_steps(&self) -> u64 {
        self.branch.steps()
    }

    /// Parameters and optimiser state; handles, not copies.
    pub fn state(&self) -> Tensors {
        self.branch.whole_state()
    }

    /// Goes on after `step` steps from a state that [`state`](Self::state) gave.
    ///
    /// # Errors
    /// A tensor is missing or has another shape; then the tuner must not be used.
    pub fn restore(
        &mut self,
        step: u64,
        optimiser_steps: u64,
        state: &Tensors,
    ) -> Result<(), TrainError> {
        self.branch.load_whole(optimiser_steps, state)?;
        self.step = step;
        Ok(())
    }

    /// The examples of the next step, in an order that the seed and the epoch decide.
    fn batch(&mut self) -> Vec<usize> {
        let per_epoch = self.steps_per_epoch();
        let (epoch, at) = (self.step / per_epoch, self.step % per_epoch);
        if self.order.0 != epoch {
            let seed = self.settings.seed.derive(Purpose::Data, &[90, epoch]);
            let mut order: Vec<usize> = (0..self.examples.len()).collect();
            for last in (1..order.len()).rev() {
                let other = (seed.uniform(last as u64) * (last + 1) as f64) as usize;
                order.swap(last, other);
            }
            self.order = (epoch, order);
        }
        let size = self.settings.sft.batch as usize;
        self.order.1.chunks(size).nth(at as usize).unwrap_or_default().to_vec()
    }

    /// Takes the next step, together with the other ranks. What it gives is equal on all of them.
    ///
    /// # Errors
    /// [`TrainError`]; nothing of the model has changed.
    pub fn advance(&mut self, group: &dyn Collective) -> Result<StepDone, TrainError> {
        let batch = self.batch();
        let answers: usize = batch.iter().map(|at| self.examples[*at].answer_len()).sum();
        let tokens: usize = batch.iter().map(|at| self.examples[*at].len()).sum();
        let (rank, world) = (group.rank() as usize, group.world() as usize);
        let seat = Seat { rank: group.rank(), world: group.world() };
        self.branch.sit(seat, self.settings.sharing)?;
        let mut tally = Tally::default();
        let kept = |at: &usize| {
            let prompts = self.anchor.as_ref().map(|(_, prompts)| prompts[*at].len());
            prompts.map_or(0, |tokens| tokens - DROPPED)
        };
        let kept: usize = batch.iter().map(kept).sum();
        let own: Vec<usize> = batch.into_iter().skip(rank).step_by(world).collect();
        let lengths: Vec<usize> = own.iter().map(|at| self.examples[*at].len()).collect();
        let rows = pack(&lengths, self.settings.sft.pack_tokens as usize);
        let rows: Vec<Vec<usize>> =
            rows.into_iter().map(|row| row.into_iter().map(|at| own[at]).collect()).collect();
        let count = rows.len() as u32;
        let mut sums = self.branch.begin(group, (count, count))?;
        let totals = (answers as f64, kept as f64);
        let local = self.accumulate(&rows, totals, &mut sums, &mut tally);
        if let Err(error) = &local {
            tally.failed(error);
        }
        self.branch.finish(&mut sums)?;
        let number = u32::try_from(self.step).unwrap_or(u32::MAX);
        let sums = tally.exchange(group, number)?.sums;
        local?;
        let settings = &self.settings;
        let (grad_norm, bad) = self.branch.clip(group, settings.max_grad_norm)?;
        if !grad_norm.is_finite() {
            let place = bad.unwrap_or("the sum of all").to_owned();
            let what = "the gradient".to_owned();
            return Err(TrainError::NonFinite { what, iteration: number, place });
        }
        let lr = settings.sft.lr_at(self.step, self.steps());
        self.branch.set_lr(lr);
        self.branch.step(group)?;
        let epoch = self.step / self.steps_per_epoch() + 1;
        self.step += 1;
        let sum = |name: &str| sums.get(name).copied().unwrap_or(0.0);
        Ok(StepDone {
            step: self.step,
            steps: self.steps(),
            epoch,
            loss: sum("loss") / answers as f64,
            accuracy: sum("right") / answers as f64,
            anchor: sum("anchor"),
            lr,
            grad_norm,
            answer_tokens: answers as u64,
            tokens: tokens as u64,
        })
    }

    /// Adds up the gradients of this rank's examples, a packed row at a time.
    fn accumulate(
        &mut self,
        rows: &[Vec<usize>],
        (answers, kept): (f64, f64),
        sums: &mut Reduction<'_>,
        tally: &mut Tally,
    ) -> Result<(), TrainError> {
        for places in rows {
            let row: Vec<&Example> = places.iter().map(|at| &self.examples[*at]).collect();
            let loss = row_loss(&self.pipeline.lm, &row)?;
            let value = loss.sum.double_value(&[]);
            tally.add("loss", value);
            tally.add("right", loss.right.double_value(&[]));
            if !value.is_finite() {
                tally.bad(format!("the loss of step {}", self.step + 1));
                continue;
            }
            let mut mean: Tensor = loss.sum / answers;
            if let Some((base, prompts)) = &self.anchor {
                let prompts: Vec<&[i64]> =
                    places.iter().map(|at| prompts[*at].as_slice()).collect();
                let apart = anchor_loss(&self.pipeline.lm, base, &prompts)?;
                tally.add("anchor", apart.double_value(&[]) / kept);
                mean += apart * (self.settings.sft.anchor / kept);
            }
            self.branch.backward(&mean, sums)?;
        }
        Ok(())
    }
}

/// Every example as tokens: the chat turn that asks for it, then the response up to `<|im_end|>`.
fn tokens(
    pipeline: &Pipeline,
    instruction: &str,
    worked: &[Worked],
) -> Result<Vec<Example>, TrainError> {
    let tokenizer = &pipeline.tokenizer;
    let template = ThinkTemplate::new(instruction, tokenizer.chat_template())?;
    let one = |worked: &Worked| -> Result<Example, TrainError> {
        let question = tokenizer.encode(&template.render(&worked.prompt)?)?;
        let mut answer = tokenizer.encode(&worked.response)?;
        answer.push(tokenizer.im_end());
        Ok(Example::new(&question, &answer)?)
    };
    worked.iter().map(one).collect()
}

/// The refined prompts of examples, in the template that they condition images in.
fn refined<'a>(
    pipeline: &Pipeline,
    worked: impl Iterator<Item = &'a Worked>,
) -> Result<Vec<Vec<i64>>, TrainError> {
    let embedder = Embedder::new(&pipeline.lm, &pipeline.tokenizer)?;
    worked.map(|worked| Ok(embedder.tokens(&extract(&worked.response).refined)?)).collect()
}
