//! The one place where durable state changes: live and on restore alike (DU-11).
//!
//! Each record is checked against the invariants it could break before anything changes, so that a
//! record is applied whole or not at all.

use super::record::{Fate, Record};
use super::state::{Committed, Misfit, State, Subtree, Tree, Tries, iteration_range};
use crate::mutation::Mutation;
use crate::schedule::{Plateau, Schedule};
use crate::spec::RunSpec;
use crate::work::{Done, LeaseId, Score, Unit, Weights};
use crate::{PolicyVersion, TreeId, WorkerId};
use std::collections::BTreeMap;

fn misfit<T>(text: String) -> Result<T, Misfit> {
    Err(Misfit(text))
}

impl State {
    /// Applies a record. `rows` are the data set rows of the iteration that a record admits.
    ///
    /// # Errors
    /// When the record does not fit this state; the text starts with the invariant it would break.
    pub fn apply(&mut self, spec: &RunSpec, rows: &[usize], record: &Record) -> Result<(), Misfit> {
        match record {
            Record::Opened { generation } => self.generation = *generation,
            Record::Admitted { iteration } => self.admit(*iteration, rows)?,
            Record::Extended { iteration, trees } => self.extend(*iteration, *trees, rows)?,
            Record::Leased { id, worker, session } => self.lease(spec, *id, worker, *session)?,
            Record::Completed { id, worker, result, .. } => {
                self.complete(spec, *id, worker, result)?;
            }
            Record::AttemptFailed { id, kind, lost, .. } => {
                let tries = self.tries_mut(id.unit)?;
                if id.attempt.0 != tries.given || id.attempt.0 == tries.dead {
                    return misfit(format!("DU-6: {} failed, but it is over", name(id)));
                }
                tries.failed += u32::from(!lost);
                tries.dead = id.attempt.0;
                *self.totals.failures.entry(kind.clone()).or_default() += 1;
            }
            Record::GivenUp { tree, reason } => {
                let entry =
                    self.trees.get_mut(tree).ok_or_else(|| Misfit(format!("no tree {tree}")))?;
                if entry.fate.is_some() {
                    return misfit(format!("DU-2: tree {tree} has a fate already"));
                }
                entry.fate = Some(Fate::Failed(reason.clone()));
                self.totals.failed += 1;
            }
            Record::EpochStarted { epoch, world } => {
                if *epoch <= self.epoch {
                    return misfit(format!("trainer {epoch} was there before"));
                }
                (self.epoch, self.world) = (*epoch, *world);
            }
            Record::StepCommitted { iteration, weights, metrics } => {
                self.commit(spec, *iteration, weights, metrics)?;
            }
            Record::Retaken { iteration, digest } => {
                let world = self.world;
                let Some(step) = self.steps.get_mut(iteration) else {
                    return misfit(format!("DU-4: step {iteration} retaken, never committed"));
                };
                (step.retaken, step.world) = (Some(*digest), world);
            }
            Record::Checkpointed { version, manifest } => {
                if *version > self.version {
                    return misfit(format!("DU-4: checkpoint of {version} before its commit"));
                }
                self.checkpoint = Some((*version, manifest.clone()));
                self.forget_before(spec, *version);
            }
            Record::Paused(paused) => self.paused = *paused,
            Record::Stopping(stopping) => self.stopping = *stopping,
        }
        Ok(())
    }

    fn tries_mut(&mut self, unit: Unit) -> Result<&mut Tries, Misfit> {
        let missing = || Misfit(format!("{} of {} is not there", unit.stage(), unit.place()));
        let tree = self.trees.get_mut(&unit.tree()).ok_or_else(missing)?;
        let (Unit::Render(id) | Unit::Score(id)) = unit else { return Ok(&mut tree.think_tries) };
        let subtree = tree.subtrees.get_mut(id.trace as usize).ok_or_else(missing)?;
        Ok(match unit {
            Unit::Score(_) => &mut subtree.score_tries,
            _ => &mut subtree.render_tries,
        })
    }

    fn admit(&mut self, iteration: u32, rows: &[usize]) -> Result<(), Misfit> {
        if iteration != self.admitted {
            return misfit(format!("iteration {iteration} admitted after {}", self.admitted));
        }
        for (index, row) in (0u32..).zip(rows) {
            let tree = Tree { row: *row, ..Tree::default() };
            self.trees.insert(TreeId { iteration, index }, tree);
        }
        self.admitted += 1;
        self.totals.admitted += rows.len() as u64;
        Ok(())
    }

    fn extend(&mut self, iteration: u32, trees: u32, rows: &[usize]) -> Result<(), Misfit> {
        let open = u64::from(iteration) >= self.version.0 && iteration < self.admitted;
        if !open || rows.len() != trees as usize {
            return misfit(format!("iteration {iteration} extended at {}", self.version));
        }
        let first = self.trees_of(iteration);
        for (index, row) in (first..).zip(rows) {
            let tree = Tree { row: *row, ..Tree::default() };
            self.trees.insert(TreeId { iteration, index }, tree);
        }
        self.totals.admitted += u64::from(trees);
        Ok(())
    }

    /// A plateau schedule's memory after the step of `iteration`; settles the switch when the LLM's
    /// reward has stopped rising.
    fn watch(&mut self, spec: &RunSpec, iteration: u32) {
        let Schedule::Plateau { patience, min_delta, smooth, .. } = spec.schedule else { return };
        if self.switched.is_some() {
            return;
        }
        let trees = self.trees.range(iteration_range(iteration)).map(|(_, tree)| tree);
        let whole = trees.filter(|tree| !matches!(tree.fate, Some(Fate::Failed(_))));
        let rewards: Vec<f64> = whole.flat_map(|tree| tree.rewards(spec).llm).flatten().collect();
        if rewards.is_empty() {
            return;
        }
        let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
        let seen = Plateau::after(self.plateau.as_ref(), mean, min_delta, smooth);
        if seen.since() >= patience {
            // Iterations up to this one plus the lag may be on their way already.
            self.switched = Some(iteration.saturating_add(spec.lag).saturating_add(1));
        }
        self.plateau = Some(seen);
    }

    fn lease(
        &mut self,
        spec: &RunSpec,
        id: LeaseId,
        worker: &WorkerId,
        session: u64,
    ) -> Result<(), Misfit> {
        if self.is_done(id.unit) {
            return misfit(format!("DU-5: {} is leased although it is done", name(&id)));
        }
        let version = State::sampled_with(spec, id.unit.tree().iteration);
        if self.weights(version).is_none() {
            return misfit(format!("DU-12: {} needs {version}, never committed", name(&id)));
        }
        let tries = self.tries_mut(id.unit)?;
        if id.attempt.0 <= tries.given {
            return misfit(format!("DU-6: {} was given out before", name(&id)));
        }
        tries.given = id.attempt.0;
        tries.worker = Some(worker.clone());
        tries.session = session;
        Ok(())
    }

    fn complete(
        &mut self,
        spec: &RunSpec,
        id: LeaseId,
        worker: &WorkerId,
        result: &Done,
    ) -> Result<(), Misfit> {
        if self.is_done(id.unit) {
            return misfit(format!("DU-1: {} is done already", name(&id)));
        }
        let tries = self.tries_mut(id.unit)?;
        let last = id.attempt.0 == tries.given && id.attempt.0 != tries.dead;
        if !last || tries.worker.as_ref() != Some(worker) {
            return misfit(format!("DU-6: {} by {worker} is over", name(&id)));
        }
        let wrong = || {
            Misfit(format!("{} of {} has another stage's result", id.unit.stage(), id.unit.place()))
        };
        let tree = self.trees.get_mut(&id.unit.tree()).ok_or_else(wrong)?;
        match (id.unit, result) {
            (Unit::Think(_), Done::Think(traces)) => {
                let subtree = |trace: &crate::work::Trace| Subtree {
                    trace: trace.clone(),
                    render_tries: Tries::default(),
                    render: None,
                    score_tries: Tries::default(),
                    scores: None,
                };
                tree.subtrees = traces.iter().map(subtree).collect();
            }
            (Unit::Render(id), Done::Render(artifact)) => {
                let subtree = tree.subtrees.get_mut(id.trace as usize).ok_or_else(wrong)?;
                subtree.render = Some(artifact.clone());
                self.totals.images += u64::from(spec.leaves);
            }
            (Unit::Score(id), Done::Score(scores)) => {
                let bad = |score: &Score| matches!(score, Score::Scored(v) if !v.is_finite());
                if scores.iter().flatten().any(|(_, score)| bad(score)) {
                    return misfit(format!("DU-8: a score of {id} is not a finite number"));
                }
                let subtree = tree.subtrees.get_mut(id.trace as usize).ok_or_else(wrong)?;
                subtree.scores = Some(scores.clone());
                for (name, missing) in spec.reward.missing(scores) {
                    *self.totals.missing_scores.entry(name.to_owned()).or_default() += missing;
                }
            }
            _ => return Err(wrong()),
        }
        Ok(())
    }

    fn commit(
        &mut self,
        spec: &RunSpec,
        iteration: u32,
        weights: &Weights,
        metrics: &BTreeMap<String, f64>,
    ) -> Result<(), Misfit> {
        if u64::from(iteration) != self.version.0 || weights.version.0 != self.version.0 + 1 {
            let to = weights.version;
            return misfit(format!("DU-4: step {iteration} to {to} after {}", self.version));
        }
        let trees = self.trees.range(iteration_range(iteration));
        for (id, tree) in trees {
            if !tree.settled() {
                return misfit(format!("DU-2: step {iteration} without tree {id}, in flight"));
            }
            if matches!(tree.fate, Some(Fate::Trained | Fate::ZeroSpread)) {
                return misfit(format!("DU-1: tree {id} was part of a step before"));
            }
        }
        let trainable = super::batch::trainable(self, spec, iteration);
        for (id, tree) in self.trees.range_mut(iteration_range(iteration)) {
            if tree.fate.is_some() {
                continue;
            }
            if trainable.contains(id) {
                tree.fate = Some(Fate::Trained);
                self.totals.trained += 1;
            } else {
                tree.fate = Some(Fate::ZeroSpread);
                self.totals.zero_spread += 1;
            }
        }
        self.watch(spec, iteration);
        self.version = weights.version;
        let (weights, metrics) = (weights.clone(), metrics.clone());
        let step = Committed { weights, metrics, world: self.world, retaken: None };
        self.steps.insert(iteration, step);
        if Mutation::CollectEarly.on() {
            self.forget_before(spec, self.version);
        }
        Ok(())
    }

    /// Drops trees and steps that neither a replay from the checkpoint nor a rollout of lag L needs.
    fn forget_before(&mut self, spec: &RunSpec, version: PolicyVersion) {
        let (trees, steps) = kept_from(spec, version);
        self.trees = self.trees.split_off(&trees);
        self.steps = self.steps.split_off(&steps);
    }
}

/// The first tree and the first step that are still needed once `version` is checkpointed.
pub(super) fn kept_from(spec: &RunSpec, version: PolicyVersion) -> (TreeId, u32) {
    let first = u32::try_from(version.0).unwrap_or(u32::MAX);
    (TreeId { iteration: first, index: 0 }, first.saturating_sub(spec.lag + 1))
}

fn name(id: &LeaseId) -> String {
    format!("{} of {} {}", id.attempt, id.unit.stage(), id.unit.place())
}
