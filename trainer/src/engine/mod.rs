//! The torch side of a trainer rank: models, optimisers and one step. Lives on the device thread
//! and knows no network beyond the collectives it is given.
//!
//! ```text
//! step:  decode -> LLM: a micro-batch a tree ---\   (sums over ranks begin in the last one)
//!               -> DiT: one a sub-tree ---------+-> await sums -> exchange tallies -> finite?
//!                                                    -> clip -> AdamW (each branch) -> digest
//! ```
//! Every normaliser is counted over the global batch, so the sum of gradients over micro-batches
//! and ranks is the gradient of the whole batch, however it was cut.

pub mod batch;
pub mod branch;
pub mod checkpoint;
mod dit;
pub mod gradient;
pub mod layout;
pub(crate) mod llm;
mod nft;
pub mod norm;
mod seated;
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
use gradient::Reduction;
use layout::Seat;
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
    /// Whether an update is half done: the state is not that of any version.
    torn: bool,
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
        Ok(Engine { settings, pipeline, llm, dit, llm_base, dit_base, version: 0, torn: false })
    }

    /// Takes a place in a group; [`step`](Self::step) and restoring do, where nobody did.
    ///
    /// # Errors
    /// A state that is shared out among ranks cannot go along to another place.
    pub fn sit(&mut self, seat: Seat) -> Result<(), TrainError> {
        let sharing = self.settings.sharing;
        self.llm.sit(seat, sharing)?;
        self.dit.sit(seat, sharing)
    }

    /// Takes a place in a new group with the state it has.
    ///
    /// # Errors
    /// As [`sit`](Self::sit).
    pub fn stay(&mut self, seat: Seat) -> Result<(), TrainError> {
        let sharing = self.settings.sharing;
        self.llm.stay(seat, sharing)?;
        self.dit.stay(seat, sharing)
    }

    /// Whether it holds the state of its version: no update is half done.
    pub fn is_whole(&self) -> bool {
        !self.torn
    }

    /// Where its state is shared out among ranks: this rank's place among them.
    pub fn share(&self) -> Option<Seat> {
        [&self.llm, &self.dit].into_iter().find(|b| b.is_shared()).and_then(Branch::seat)
    }

    /// Replaces the state by rank `root`'s, where no rank has it shared out. All ranks call this; those
    /// that hold the same state already say so, and keep it whatever happens.
    ///
    /// # Errors
    /// [`TrainError::Collective`]; then what it holds is not whole, unless it was before.
    pub fn take_from(
        &mut self,
        group: &dyn Collective,
        root: u32,
        holds: bool,
    ) -> Result<(), TrainError> {
        self.torn = !holds;
        self.llm.take_from(group, root)?;
        self.dit.take_from(group, root)?;
        let version = Tensor::from(self.version as i64);
        group.broadcast(&version, root)?;
        self.version = u64::try_from(version.int64_value(&[])).unwrap_or(0);
        self.torn = false;
        Ok(())
    }

    /// Takes the place of an only rank, unless it has one.
    fn sit_if_standing(&mut self) -> Result<(), TrainError> {
        let sharing = self.settings.sharing;
        for branch in [&mut self.llm, &mut self.dit] {
            if branch.is_standing() {
                branch.sit(Seat::ALONE, sharing)?;
            }
        }
        Ok(())
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
        self.sit(Seat { rank: group.rank(), world: group.world() })?;
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
        self.torn = false;
        Ok(metrics)
    }

    fn update(
        &mut self,
        batch: &Batch,
        totals: LlmTotals,
        before: &mut Before,
        group: &dyn Collective,
    ) -> Result<BTreeMap<String, f64>, TrainError> {
        let open = Open::of(batch.gates, totals, batch.dit_terms);
        let mut sums = Sums {
            llm: open.llm.then(|| self.llm.begin(group, batch.llm_micro_batches)).transpose()?,
            dit: open.dit.then(|| self.dit.begin(group, batch.dit_micro_batches)).transpose()?,
        };
        let mut tally = Tally::default();
        let local = self.accumulate(batch, totals, before, &mut sums, &mut tally);
        if let Err(error) = &local {
            tally.failed(error);
        }
        // Also where this rank failed: the others count on it.
        if let Some(sum) = &mut sums.llm {
            self.llm.finish(sum)?;
        }
        if let Some(sum) = &mut sums.dit {
            self.dit.finish(sum)?;
        }
        let mut metrics = tally.exchange(group, batch.iteration)?.sums;
        local?;
        let branches = [(&mut self.llm, open.llm), (&mut self.dit, open.dit)];
        let branches = branches.into_iter().filter(|(_, open)| *open).map(|(branch, _)| branch);
        let mut branches: Vec<&mut Branch> = branches.collect();
        // Both are checked before either steps.
        for branch in &mut branches {
            let (name, lr) = (branch.name, branch.lr());
            let (norm, bad) = branch.clip(group, self.settings.max_grad_norm)?;
            if !norm.is_finite() {
                let place = bad.unwrap_or("the sum of all").to_owned();
                let (what, iteration) = (format!("{name} gradient"), batch.iteration);
                return Err(TrainError::NonFinite { what, iteration, place });
            }
            metrics.insert(format!("{name}/grad_norm"), norm);
            metrics.insert(format!("{name}/learning_rate"), lr);
        }
        self.torn = true;
        branches.into_iter().try_for_each(|branch| branch.step(group))?;
        Ok(metrics)
    }

    fn accumulate(
        &mut self,
        batch: &Batch,
        totals: LlmTotals,
        before: &mut Before,
        sums: &mut Sums<'_>,
        tally: &mut Tally,
    ) -> Result<(), TrainError> {
        let mut done = Ok(());
        if let Some(sum) = &mut sums.llm {
            done = llm::accumulate(self, batch, totals, before, (sum, tally));
            if !matches!(done, Err(TrainError::Collective(_))) {
                // Before any of the other branch, on every rank.
                self.llm.begin_all(sum)?;
            }
        }
        if let (Some(sum), Ok(())) = (&mut sums.dit, &done) {
            done = match self.settings.nft {
                Some(nft) => nft::accumulate(self, nft, batch, before, (sum, tally)),
                None => dit::accumulate(self, batch, before, (sum, tally)),
            };
        }
        done
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

/// The sums over ranks of an update, of the branches that it trains.
struct Sums<'g> {
    llm: Option<Reduction<'g>>,
    dit: Option<Reduction<'g>>,
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
