//! Optimiser steps: started, compared, committed, checkpointed.

use super::api::{Effect, FinishReason};
use super::apply::kept_from;
use super::record::{Fate, Record};
use super::state::iteration_range;
use super::trainers::Group;
use super::{Scheduler, Verdict, batch};
use crate::invariants;
use crate::mutation::Mutation;
use crate::work::{Gates, Step, StepDone, Window};
use crate::{ArtifactRef, PolicyVersion, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// Iterations in a row that may end without a single surviving tree.
const BARREN_LIMIT: usize = 3;

impl Scheduler {
    /// What a group at `version` does next: repeat a committed step, take a new one, write the last
    /// checkpoint, or nothing yet.
    pub(super) fn next_step(&mut self, version: PolicyVersion) {
        let iteration = version.0 as u32;
        let saved = self.state.checkpoint.as_ref().map_or(PolicyVersion(0), |(v, _)| *v);
        if version < self.state.version {
            if self.stopping {
                self.finish(FinishReason::Stopped);
            } else {
                self.start_step(iteration, true, false, false);
            }
            return;
        }
        let over = version.0 >= u64::from(self.spec.iterations);
        if over || self.stopping {
            if saved == version {
                self.finish(if over { FinishReason::Completed } else { FinishReason::Stopped });
            } else if self.writing.is_none() && !self.saving.contains_key(&version) {
                self.start_step(iteration, false, false, true);
            }
            return;
        }
        let left = self.unsettled.get(&iteration).copied().unwrap_or(0);
        let settled = self.state.admitted > iteration
            && (left == 0 || Mutation::TrainEarly.on() && left == 1);
        if settled && !self.state.paused && !self.extend(iteration) && !self.is_barren(iteration) {
            let next = iteration + 1;
            let checkpoint =
                next.is_multiple_of(self.spec.checkpoint_every) || next == self.spec.iterations;
            self.start_step(iteration, true, true, checkpoint);
        }
    }

    /// Dynamic sampling: admits more trees to an iteration that has fewer than P to train on, within
    /// the bound. Which prompts come depends on nothing but the run's seed and the rewards so far.
    fn extend(&mut self, iteration: u32) -> bool {
        let (p, most) = (self.spec.prompts_per_iteration, self.spec.extra_prompts);
        if most == 0 {
            return false;
        }
        let trees = self.state.trees_of(iteration);
        let left = p.saturating_add(most).saturating_sub(trees);
        let teaching = batch::trainable(&self.state, &self.spec, iteration).len() as u32;
        let trees = p.saturating_sub(teaching).min(left);
        if trees > 0 {
            self.commit(Record::Extended { iteration, trees });
            self.open_trees(iteration, trees);
        }
        trees > 0
    }

    /// Whether too many iterations in a row lost all their trees; then the run is over, with the
    /// reason, instead of committing empty steps to its end.
    fn is_barren(&mut self, iteration: u32) -> bool {
        let trees = self.state.trees.range(iteration_range(iteration));
        let mut reason = None;
        for (_, tree) in trees {
            match &tree.fate {
                Some(Fate::Failed(why)) => reason = Some(why.clone()),
                _ => {
                    self.barren.clear();
                    return false;
                }
            }
        }
        self.barren.insert(iteration);
        if self.barren.len() < BARREN_LIMIT {
            return false;
        }
        let text = format!(
            "no tree of {BARREN_LIMIT} iterations in a row survived; the last: {}",
            reason.unwrap_or_default()
        );
        self.fail("barren", text.clone());
        self.finish(FinishReason::Failed(text));
        true
    }

    fn start_step(&mut self, iteration: u32, update: bool, publish: bool, checkpoint: bool) {
        let trees = if update {
            batch::batch(&self.state, &self.spec, &self.prompts, iteration)
        } else {
            Vec::new()
        };
        let gates = if update {
            self.state.gates(&self.spec, iteration)
        } else {
            Gates { llm: 0.0, dit: 0.0 }
        };
        let step = Step {
            epoch: self.state.epoch,
            iteration,
            gates,
            window: if update { self.window(iteration) } else { Window::default() },
            trees,
            update,
            publish,
            checkpoint,
        };
        let members = self.group.members().to_vec();
        if checkpoint {
            let version = PolicyVersion(u64::from(iteration) + u64::from(update));
            self.expect_shards(version, members.len() as u32);
        }
        self.group = Group::Stepping {
            members,
            step: Box::new(step),
            told: BTreeSet::new(),
            done: BTreeMap::new(),
            deadline: self.now.after(self.spec.timing.step),
        };
    }

    pub(super) fn step_done(&mut self, worker: &WorkerId, report: StepDone) -> Verdict {
        if report.epoch != self.state.epoch || self.group.rank_of(worker) != Some(report.rank.0) {
            return Verdict::Stale;
        }
        let Group::Stepping { members, step, done, .. } = &mut self.group else {
            return Verdict::Duplicate;
        };
        if report.iteration != step.iteration {
            return Verdict::Stale;
        }
        if done.contains_key(&report.rank.0) {
            return Verdict::Duplicate;
        }
        if let Some((name, value)) = report.metrics.iter().find(|(_, value)| !value.is_finite()) {
            let text = format!("{worker} at iteration {}: {name} is {value}", report.iteration);
            self.fail_group(worker, "non-finite", &text);
            return Verdict::Refused(text);
        }
        done.insert(report.rank.0, report);
        if done.len() == members.len() {
            let (members, step, done) = (members.clone(), step.clone(), std::mem::take(done));
            self.all_stepped(members, *step, done);
        }
        Verdict::Accepted
    }

    fn all_stepped(&mut self, members: Vec<WorkerId>, step: Step, done: BTreeMap<u32, StepDone>) {
        let Some(first) = done.get(&0).cloned() else { return };
        let version = PolicyVersion(u64::from(step.iteration) + u64::from(step.update));
        let committed = self.state.trained_digest(version);
        let exact = !step.update || self.state.repeats_exactly(&self.spec, step.iteration);
        let expected = committed.filter(|_| exact).unwrap_or(first.weights.digest);
        let differs = done.values().find(|done| done.weights.digest != expected);
        if let Some(other) = differs.filter(|_| !Mutation::SkipDigest.on()) {
            let text = format!(
                "{} of iteration {} has weights {}, but {} {expected}",
                other.rank,
                step.iteration,
                other.weights.digest,
                if committed.is_some() && exact { "committed were" } else { "rank 0 has" }
            );
            let worker = members.get(other.rank.0 as usize).cloned();
            self.fail_group(&worker.unwrap_or_else(|| WorkerId::from("")), "divergence", &text);
            return;
        }
        if version > self.state.version {
            self.commit_step(&step, &first);
        } else if !exact {
            let (iteration, digest) = (step.iteration, first.weights.digest);
            self.commit(Record::Retaken { iteration, digest });
        }
        self.group = Group::Ready { members, version };
        if step.checkpoint {
            self.step_saved(version, self.state.weights(version).unwrap_or(first.weights));
        }
    }

    fn commit_step(&mut self, step: &Step, first: &StepDone) {
        let mut weights = first.weights.clone();
        weights.version = PolicyVersion(u64::from(step.iteration) + 1);
        let metrics = first.metrics.clone();
        let record = Record::StepCommitted { iteration: step.iteration, weights, metrics };
        self.commit(record.clone());
        if Mutation::DoubleCommit.on() {
            self.commit(record);
        }
        self.unsettled.remove(&step.iteration);
        self.group_succeeded();
        let checked = invariants::check_step(&self.spec, &self.state);
        if let Err(violation) = checked.and_then(|()| self.leases.check(&self.state)) {
            self.halt(violation.to_string());
        }
        self.emit_lineage(step.iteration);
    }

    pub(super) fn checkpointed(
        &mut self,
        version: PolicyVersion,
        manifest: ArtifactRef,
    ) -> Verdict {
        if self.state.checkpoint.as_ref().is_some_and(|(old, _)| version <= *old) {
            return Verdict::Duplicate;
        }
        if version > self.state.version {
            let newest = self.state.version;
            return Verdict::Refused(format!("{version} was never committed; newest is {newest}"));
        }
        self.saving_failures = 0;
        if let Err(violation) = self.check() {
            self.halt(violation.to_string());
            return Verdict::Refused(violation.to_string());
        }
        let unneeded = self.unneeded(version);
        self.commit(Record::Checkpointed { version, manifest });
        if !unneeded.is_empty() {
            self.output.effects.push(Effect::Collect(unneeded));
        }
        if self.group.version().is_some_and(|held| held < version) {
            // It would have to repeat steps whose trees are no longer kept.
            let text = format!("{version} is checkpointed; restoring that is shorter");
            self.abort_group("superseded", &text);
        }
        Verdict::Accepted
    }

    /// Artifacts that nothing needs once `version` is checkpointed.
    fn unneeded(&self, version: PolicyVersion) -> Vec<ArtifactRef> {
        let (tree, step) = kept_from(&self.spec, version);
        let kept: BTreeSet<&ArtifactRef> = { self.state.steps.range(step..) }
            .flat_map(|(_, step)| [&step.weights.llm, &step.weights.dit])
            .flatten()
            .collect();
        let weights = { self.state.steps.range(..step) }
            .flat_map(|(_, step)| [&step.weights.llm, &step.weights.dit])
            .flatten()
            .filter(|artifact| !kept.contains(artifact));
        let subtrees = self.state.trees.range(..tree).flat_map(|(_, tree)| &tree.subtrees);
        let trees = subtrees.flat_map(|s| std::iter::once(&s.trace.artifact).chain(&s.render));
        let unneeded: BTreeSet<&ArtifactRef> = trees.chain(weights).collect();
        unneeded.into_iter().cloned().collect()
    }
}
