//! The torch side of a trainer rank: models, optimisers and one step. Lives on the device thread
//! and knows no network beyond the collectives it is given.
//!
//! ```text
//! step:  decode -> LLM: a micro-batch a tree ---\
//!               -> DiT: one a sub-tree ---------+-> exchange tallies -> sum gradients -> finite?
//!                                                    -> clip -> AdamW (each branch) -> digest
//! ```
//! Every normaliser is counted over the global batch, so the sum of gradients over micro-batches
//! and ranks is the gradient of the whole batch, however it was cut.

pub mod batch;
pub mod branch;
pub mod checkpoint;
mod dit;
pub(crate) mod llm;
mod nft;
mod settings;
pub(crate) mod tally;

pub use settings::{BranchSettings, Nft, OldPolicy, Settings};

use crate::error::TrainError;
use batch::{Batch, StepInput};
use branch::Branch;
use duet_core::work::Gates;
use duet_core::{Digest, Purpose};
use duet_models::ModelError;
use duet_models::dit::Dit;
use duet_models::lm::Lm;
use duet_models::loss::LlmTotals;
use duet_models::pipeline::Pipeline;
use duet_torch::collective::Collective;
use duet_torch::tensorfile::{Metadata, encode};
use duet_torch::{Tensors, digest_tensors};
use std::collections::BTreeMap;
use tally::Tally;
use tch::Tensor;

/// Models and optimisers at one policy version.
pub struct Engine {
    settings: Settings,
    pipeline: Pipeline,
    llm: Branch,
    dit: Branch,
    /// Copies of the base model, where a penalty needs them and no adapter can be switched off.
    llm_base: Option<Lm>,
    dit_base: Option<Dit>,
    version: u64,
}

/// What the policy at the first update on a batch gave, for the later ones.
#[derive(Debug, Default)]
pub(crate) struct Before {
    /// Of each sub-tree (tree, trace): means of its window's steps, or velocities at its times.
    dit: BTreeMap<(usize, usize), Vec<Tensor>>,
    /// Of each tree: log-probabilities of its answers' tokens.
    llm: BTreeMap<usize, Tensor>,
}

/// Published weights of one policy version, as files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightFiles {
    /// The LLM's trained tensors; `None` while none has been trained.
    pub llm: Option<Vec<u8>>,
    /// The DiT's.
    pub dit: Option<Vec<u8>>,
}

impl Engine {
    /// Loads the base model: version 0.
    ///
    /// # Errors
    /// [`TrainError`] naming the file or setting that does not fit.
    pub fn load(settings: Settings) -> Result<Engine, TrainError> {
        let mut pipeline = Pipeline::load_with(&settings.model, settings.load)?;
        pipeline.vae.params().set_trainable(|_| false);
        pipeline.lm.set_recompute(settings.recompute);
        pipeline.dit.set_recompute(settings.recompute);
        let llm_copy = needs_copy(settings.llm_loss.kl.is_some(), &settings.llm);
        let llm_base = llm_copy.then(|| llm::copy(&pipeline.lm)).transpose()?;
        let dit_copy = needs_copy(dit_penalty(&settings), &settings.dit);
        let dit_base = dit_copy.then(|| dit::copy(&pipeline.dit)).transpose()?;
        let seed = |branch| settings.seed.derive(Purpose::Weights, &[branch]);
        let llm = settings.llm.clone();
        let llm = Branch::new("llm", &mut pipeline.lm, Lm::params, llm, &seed(0))?;
        let dit = settings.dit.clone();
        let dit = Branch::new("dit", &mut pipeline.dit, Dit::params, dit, &seed(1))?;
        Ok(Engine { settings, pipeline, llm, dit, llm_base, dit_base, version: 0 })
    }

    /// Policy version: optimiser steps of the run.
    pub fn version(&self) -> u64 {
        self.version
    }

    fn set_version(&mut self, version: u64) {
        self.version = version;
    }

    /// Hash over all trained tensors of both branches.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn digest(&self) -> Result<Digest, TrainError> {
        let named = |branch: &Branch| {
            let name = branch.name;
            let params = branch.params.iter();
            params.map(|(n, t)| (format!("{name}.{n}"), t.shallow_clone())).collect::<Vec<_>>()
        };
        Ok(digest_tensors(&named(&self.llm).into_iter().chain(named(&self.dit)).collect())?)
    }

    /// One iteration: `settings.updates` optimiser steps on its trees (none where the step asks for no
    /// update). Gives the metrics, equal on
    /// all ranks. On an error nothing of the policy has changed unless a later update of several
    /// failed; the group forms anew and restores in any case.
    ///
    /// # Errors
    /// [`TrainError`].
    pub fn step(
        &mut self,
        input: StepInput,
        group: &dyn Collective,
    ) -> Result<BTreeMap<String, f64>, TrainError> {
        let iteration = input.step.iteration;
        if u64::from(iteration) != self.version {
            let reason =
                format!("asked for iteration {iteration} while at version {}", self.version);
            return Err(TrainError::Protocol(reason));
        }
        if !input.step.update {
            return Ok(BTreeMap::new());
        }
        let per_leaf = self.settings.nft.map_or(input.step.window.len, |nft| nft.times);
        let place = (group.rank(), group.world());
        let batch = Batch::decode(input, place, per_leaf, self.pipeline.lm.device());
        let mut counts = Tally::default();
        match &batch {
            Ok(batch) => {
                let totals = llm::local_totals(batch);
                counts.add("tokens", totals.tokens);
                counts.add("sequences", totals.sequences);
            }
            Err(error) => counts.failed(error),
        }
        let counts = counts.exchange(group, iteration)?;
        let batch = batch?;
        let totals =
            LlmTotals { tokens: counts.sums["tokens"], sequences: counts.sums["sequences"] };
        let mut before = Before::default();
        let mut metrics = BTreeMap::new();
        for update in 0..self.settings.updates.max(1) {
            let found = self.update(&batch, totals, &mut before, group)?;
            // What is watched is the last update; for ratios and clipping that is the telling one.
            metrics = found;
            metrics.insert("updates".to_owned(), f64::from(update + 1));
        }
        self.llm.follow()?;
        self.dit.follow()?;
        metrics.insert("llm/tokens".to_owned(), totals.tokens);
        metrics.insert("llm/sequences".to_owned(), totals.sequences);
        metrics.insert("dit/terms".to_owned(), batch.dit_terms);
        self.version += 1;
        Ok(metrics)
    }

    fn update(
        &mut self,
        batch: &Batch,
        totals: LlmTotals,
        before: &mut Before,
        group: &dyn Collective,
    ) -> Result<BTreeMap<String, f64>, TrainError> {
        self.llm.clear();
        self.dit.clear();
        let open = Open::of(batch.gates, totals, batch.dit_terms);
        let mut tally = Tally::default();
        let local = self.accumulate(batch, totals, before, open, &mut tally);
        if let Err(error) = &local {
            tally.failed(error);
        }
        let mut metrics = tally.exchange(group, batch.iteration)?.sums;
        local?;
        let (norm, bucket) = (self.settings.max_grad_norm, self.settings.bucket_bytes);
        let branches = [(&mut self.llm, open.llm), (&mut self.dit, open.dit)];
        let branches = branches.into_iter().filter(|(_, open)| *open).map(|(branch, _)| branch);
        let branches: Vec<&mut Branch> = branches.collect();
        // Both are checked before either steps.
        for branch in &branches {
            branch.reduce(group, bucket)?;
            let found = branch.clip(norm)?;
            if !found.is_finite() {
                let place = branch.bad_gradient().unwrap_or("the sum of all");
                let (what, iteration) = (format!("{} gradient", branch.name), batch.iteration);
                return Err(TrainError::NonFinite { what, iteration, place: place.to_owned() });
            }
            metrics.insert(format!("{}/grad_norm", branch.name), found);
            metrics.insert(format!("{}/learning_rate", branch.name), branch.lr());
        }
        branches.into_iter().try_for_each(Branch::step)?;
        Ok(metrics)
    }

    fn accumulate(
        &mut self,
        batch: &Batch,
        totals: LlmTotals,
        before: &mut Before,
        open: Open,
        tally: &mut Tally,
    ) -> Result<(), TrainError> {
        if open.llm {
            llm::accumulate(self, batch, totals, before, tally)?;
        }
        if open.dit {
            match self.settings.nft {
                Some(nft) => nft::accumulate(self, nft, batch, before, tally)?,
                None => dit::accumulate(self, batch, before, tally)?,
            }
        }
        Ok(())
    }

    /// What `run` gives under the reference policy; `None` where no penalty asks for it.
    fn llm_reference<T>(
        &self,
        run: impl FnOnce(&Lm) -> Result<T, ModelError>,
    ) -> Result<Option<T>, TrainError> {
        if self.settings.llm_loss.kl.is_none() {
            return Ok(None);
        }
        let value = tch::no_grad(|| match (&self.llm.lora, &self.llm_base) {
            (Some(lora), _) => lora.without(|| run(&self.pipeline.lm)),
            (None, base) => run(base.as_ref().unwrap_or(&self.pipeline.lm)),
        })?;
        Ok(Some(value))
    }

    fn dit_reference<T>(
        &self,
        run: impl FnOnce(&Dit) -> Result<T, ModelError>,
    ) -> Result<Option<T>, TrainError> {
        if !dit_penalty(&self.settings) {
            return Ok(None);
        }
        let value = tch::no_grad(|| match (&self.dit.lora, &self.dit_base) {
            (Some(lora), _) => lora.without(|| run(&self.pipeline.dit)),
            (None, base) => run(base.as_ref().unwrap_or(&self.pipeline.dit)),
        })?;
        Ok(Some(value))
    }

    /// The weights that sample from now on: trained tensors only, by checkpoint name (or PEFT's, for adapters).
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn weight_files(&self) -> Result<WeightFiles, TrainError> {
        let file = |branch: &Branch| -> Result<Option<Vec<u8>>, TrainError> {
            if branch.steps() == 0 {
                return Ok(None);
            }
            let params: Tensors =
                branch.published().iter().map(|(n, t)| (n.clone(), t.detach())).collect();
            Ok(Some(encode(&params, &describe(branch))?))
        };
        Ok(WeightFiles { llm: file(&self.llm)?, dit: file(&self.dit)? })
    }
}

/// Whether the transformer's loss measures from a reference.
fn dit_penalty(settings: &Settings) -> bool {
    match settings.nft {
        Some(nft) => nft.loss.kl != 0.0,
        None => settings.dit_loss.kl.is_some(),
    }
}

/// Whether a penalty needs a model of its own to measure from: not where an adapter is switched off
/// instead, nor where the model never moves.
fn needs_copy(penalty: bool, branch: &BranchSettings) -> bool {
    penalty && branch.lora.is_none() && !branch.frozen
}

/// What a weights file says of itself.
pub(crate) fn describe(branch: &Branch) -> Metadata {
    let mut metadata = Metadata::from([("format".to_owned(), "duet-weights-1".to_owned())]);
    let kind = if branch.lora.is_some() { "adapter" } else { "full" };
    metadata.insert("kind".to_owned(), kind.to_owned());
    if let Some(lora) = &branch.lora {
        let config = lora.config();
        metadata.insert("lora_rank".to_owned(), config.rank.to_string());
        metadata.insert("lora_alpha".to_owned(), config.alpha.to_string());
        metadata.insert("lora_targets".to_owned(), config.targets.join(","));
    }
    metadata
}

/// Which branches an update trains: gate open, and something to train on.
#[derive(Clone, Copy)]
struct Open {
    llm: bool,
    dit: bool,
}

impl Open {
    fn of(gates: Gates, totals: LlmTotals, dit_terms: f64) -> Open {
        Open {
            llm: gates.llm != 0.0 && totals.tokens > 0.0,
            dit: gates.dit != 0.0 && dit_terms > 0.0,
        }
    }
}
