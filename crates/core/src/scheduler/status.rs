//! The run as a person or a program wants to see it.

use super::api::FinishReason;
use super::trainers::Group;
use super::{Scheduler, batch};
use crate::work::Score;
use crate::{Generation, Millis, PolicyVersion, Role, TrainerEpoch, WorkerId};
use std::collections::BTreeMap;

/// How missing scores are called among the failures; their component follows.
const MISSING_SCORE: &str = "missing-score";

/// What a run is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Growing trees and taking steps.
    Running,
    /// Paused by an operator.
    Paused,
    /// Stopping: writing the last checkpoint.
    Stopping,
    /// Over.
    Finished(FinishReason),
}

/// A connected worker.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerView {
    /// Its name.
    pub id: WorkerId,
    /// What it can do.
    pub role: Role,
    /// `idle`, `busy`, `draining`, `quarantined`.
    pub state: &'static str,
    /// The newest policy version it holds (rollout workers).
    pub version: Option<PolicyVersion>,
    /// How long ago it was heard of.
    pub heard_ago: Millis,
    /// What it holds: `render i3/t1/j0`; for a trainer, its rank and what its group does.
    pub holds: String,
    /// Leases done.
    pub done: u64,
    /// Leases failed.
    pub failed: u64,
}

/// A moment of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct StatusView {
    /// What the run is doing.
    pub state: RunState,
    /// The coordinator's generation.
    pub generation: Generation,
    /// The trainer group's epoch.
    pub epoch: TrainerEpoch,
    /// Committed steps.
    pub version: PolicyVersion,
    /// Steps to commit.
    pub iterations: u32,
    /// Trees by state: thinking, rendering, scoring, ready, trained, zero-spread, failed.
    pub trees: BTreeMap<&'static str, u64>,
    /// Images rendered.
    pub images: u64,
    /// Connected workers.
    pub workers: Vec<WorkerView>,
    /// Mean rewards of the newest committed iteration: `llm`, `dit`, and each component.
    pub rewards: BTreeMap<String, f64>,
    /// The trainers' numbers of the newest committed iteration.
    pub metrics: BTreeMap<String, f64>,
    /// Failed attempts by kind, and missing scores as `missing-score/COMPONENT`.
    pub failures: BTreeMap<String, u64>,
    /// Reports that came too late to count.
    pub stale_reports: u64,
    /// The newest checkpoint.
    pub checkpoint: Option<PolicyVersion>,
    /// The newest failure, and how long ago.
    pub last_error: Option<(Millis, String)>,
}

impl Scheduler {
    /// The run at a moment.
    pub fn status(&self, now: Millis) -> StatusView {
        let state = match (&self.finished, self.stopping, self.state.paused) {
            (Some(reason), ..) => RunState::Finished(reason.clone()),
            (None, true, _) => RunState::Stopping,
            (None, false, true) => RunState::Paused,
            (None, false, false) => RunState::Running,
        };
        let newest = self.state.version.0.checked_sub(1).map(|i| i as u32);
        StatusView {
            state,
            generation: self.state.generation,
            epoch: self.state.epoch,
            version: self.state.version,
            iterations: self.spec.iterations,
            trees: self.tree_counts(),
            images: self.state.totals.images,
            workers: self.worker_views(now),
            rewards: newest.map(|i| self.mean_rewards(i)).unwrap_or_default(),
            metrics: newest
                .and_then(|i| self.state.steps.get(&i))
                .map(|step| step.metrics.clone())
                .unwrap_or_default(),
            failures: self.failures(),
            stale_reports: self.stale_reports,
            checkpoint: self.state.checkpoint.as_ref().map(|(version, _)| *version),
            last_error: self.last_error.clone().map(|(at, text)| (now.since(at), text)),
        }
    }

    /// Whether every connected rollout worker holds this version or a newer one.
    pub fn is_published(&self, version: PolicyVersion) -> bool {
        let mut rollout = self.workers.iter().filter(|(_, worker)| worker.role == Role::Rollout);
        rollout.all(|(_, worker)| worker.versions.last().is_some_and(|held| *held >= version))
    }

    /// Failed attempts by kind, and missing scores as `missing-score/COMPONENT`.
    fn failures(&self) -> BTreeMap<String, u64> {
        let totals = &self.state.totals;
        let missing = totals.missing_scores.iter();
        let missing = missing.map(|(name, count)| (format!("{MISSING_SCORE}/{name}"), *count));
        totals.failures.clone().into_iter().chain(missing).collect()
    }

    fn tree_counts(&self) -> BTreeMap<&'static str, u64> {
        let totals = &self.state.totals;
        let mut counts = BTreeMap::from([
            ("thinking", 0),
            ("rendering", 0),
            ("scoring", 0),
            ("ready", 0),
            ("trained", totals.trained),
            ("zero-spread", totals.zero_spread),
            ("failed", totals.failed),
        ]);
        let first = crate::TreeId { iteration: self.state.version.0 as u32, index: 0 };
        for tree in self.state.trees.range(first..).map(|(_, tree)| tree) {
            let state = if tree.fate.is_some() {
                continue;
            } else if tree.subtrees.is_empty() {
                "thinking"
            } else if tree.subtrees.iter().any(|s| s.render.is_none()) {
                "rendering"
            } else if tree.subtrees.iter().any(|s| s.scores.is_none()) {
                "scoring"
            } else {
                "ready"
            };
            *counts.entry(state).or_default() += 1;
        }
        counts
    }

    fn worker_views(&self, now: Millis) -> Vec<WorkerView> {
        let group = match &self.group {
            Group::None => "",
            Group::Forming { .. } => "forming a group",
            Group::Ready { .. } => "waiting for trees",
            Group::Stepping { step, .. } if step.update => "stepping",
            Group::Stepping { .. } => "writing a checkpoint",
        };
        let views = self.workers.iter().map(|(id, worker)| {
            let rank = self.group.members().iter().position(|m| m == id);
            let lease =
                worker.holds.first().map(|unit| format!("{} {}", unit.stage(), unit.place()));
            let holds = lease.or_else(|| rank.map(|rank| format!("rank {rank}, {group}")));
            let state = match worker {
                w if w.quarantined => "quarantined",
                w if w.draining || w.leaving => "draining",
                w if w.waiting => "idle",
                _ => "busy",
            };
            WorkerView {
                id: id.clone(),
                role: worker.role,
                state,
                version: worker.versions.last().copied().filter(|_| worker.role == Role::Rollout),
                heard_ago: now.since(worker.heard),
                holds: holds.unwrap_or_default(),
                done: worker.done,
                failed: worker.failed,
            }
        });
        views.collect()
    }

    /// Mean rewards of a committed iteration by branch and component; empty once it is collected.
    pub fn mean_rewards(&self, iteration: u32) -> BTreeMap<String, f64> {
        let mut sums: BTreeMap<String, (f64, u64)> = BTreeMap::new();
        let mut add = |name: &str, value: f64| {
            let (sum, n) = sums.entry(name.to_owned()).or_default();
            *sum += value;
            *n += 1;
        };
        for tree in batch::judge(&self.state, &self.spec, iteration).values() {
            tree.llm_rewards.iter().flatten().for_each(|r| add("llm", *r));
            tree.dit_rewards.iter().flatten().flatten().for_each(|r| add("dit", *r));
        }
        let range = super::iteration_range(iteration);
        let subtrees = self.state.trees.range(range).flat_map(|(_, tree)| &tree.subtrees);
        for (name, score) in subtrees.flat_map(|s| s.scores.iter().flatten().flatten()) {
            if let Score::Scored(value) = score {
                add(name, *value);
            }
        }
        sums.into_iter().map(|(name, (sum, n))| (name, sum / n as f64)).collect()
    }
}
