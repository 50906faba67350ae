//! The durable state: what the journal rebuilds, and what a checkpoint carries.

use super::record::{Fate, Record};
use crate::reward::{TreeRewards, tree_rewards};
use crate::spec::RunSpec;
use crate::work::{Done, LeafScores, Trace, Unit, Weights};
use crate::{
    ArtifactRef, Digest, Generation, PolicyVersion, SubtreeId, TrainerEpoch, TreeId, WorkerId,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A stage's tries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tries {
    /// Attempts given out so far; the last one is the one whose report counts.
    pub given: u32,
    /// Attempts that failed.
    pub failed: u32,
    /// The newest attempt that failed: nothing it still reports counts (DU-6).
    pub dead: u32,
    /// Who holds, or did, the last attempt.
    pub worker: Option<WorkerId>,
}

/// A trace with its leaves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Subtree {
    /// The trace.
    pub trace: Trace,
    /// Tries at rendering.
    pub render_tries: Tries,
    /// The leaves, once rendered.
    pub render: Option<ArtifactRef>,
    /// Tries at scoring.
    pub score_tries: Tries,
    /// Their scores, once scored.
    pub scores: Option<Vec<LeafScores>>,
}

/// A tree.
///
/// ```text
/// thinking --Completed(think)--> rendering/scoring, sub-tree by sub-tree --> scored --StepCommitted--> Trained | ZeroSpread
///     \______________________________ GivenUp _________________________________________________________> Failed
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tree {
    /// Row of the data set.
    pub row: usize,
    /// Tries at thinking.
    pub think_tries: Tries,
    /// Its traces, once thought.
    pub subtrees: Vec<Subtree>,
    /// How it ended, once it has.
    pub fate: Option<Fate>,
}

impl Tree {
    /// Whether nothing more can be done for it before its iteration's step.
    pub fn settled(&self) -> bool {
        self.fate.is_some()
            || (!self.subtrees.is_empty() && self.subtrees.iter().all(|s| s.scores.is_some()))
    }

    /// Its rewards; missing ones are `None`.
    pub fn rewards(&self, spec: &RunSpec) -> TreeRewards {
        let scores: Vec<Vec<LeafScores>> =
            self.subtrees.iter().map(|s| s.scores.clone().unwrap_or_default()).collect();
        tree_rewards(&spec.reward, &scores)
    }
}

/// A committed step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Committed {
    /// The policy after it.
    pub weights: Weights,
    /// The trainers' numbers.
    pub metrics: BTreeMap<String, f64>,
}

/// Totals that survive everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Trees admitted.
    pub admitted: u64,
    /// Trees by fate.
    pub trained: u64,
    /// Trees without spread.
    pub zero_spread: u64,
    /// Trees given up.
    pub failed: u64,
    /// Images rendered.
    pub images: u64,
    /// Attempts that failed, by kind.
    pub failures: BTreeMap<String, u64>,
}

/// The durable state of a run. `PartialEq` is what DU-11 is stated in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The newest coordinator's generation.
    pub generation: Generation,
    /// The newest trainer group's epoch.
    pub epoch: TrainerEpoch,
    /// Committed steps so far; the policy version.
    pub version: PolicyVersion,
    /// Iterations whose trees exist or existed.
    pub admitted: u32,
    /// Trees not yet collected.
    pub trees: BTreeMap<TreeId, Tree>,
    /// Committed steps not yet collected, by iteration.
    pub steps: BTreeMap<u32, Committed>,
    /// The newest checkpoint.
    pub checkpoint: Option<(PolicyVersion, ArtifactRef)>,
    /// Whether the run is paused.
    pub paused: bool,
    /// Totals.
    pub totals: Totals,
}

/// A record that the state has no place for: the journal is not this run's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("journal record does not fit the run: {0}")]
pub struct Misfit(pub String);

impl State {
    /// A run that has not begun.
    pub fn new() -> State {
        State {
            generation: Generation(0),
            epoch: TrainerEpoch(0),
            version: PolicyVersion(0),
            admitted: 0,
            trees: BTreeMap::new(),
            steps: BTreeMap::new(),
            checkpoint: None,
            paused: false,
            totals: Totals::default(),
        }
    }

    /// The weights of a committed version; version 0 is the base model's own.
    pub fn weights(&self, version: PolicyVersion) -> Option<Weights> {
        if version.0 == 0 {
            let digest = Digest([0; 32]);
            return Some(Weights { version, llm: None, dit: None, digest });
        }
        let step = u32::try_from(version.0 - 1).ok()?;
        self.steps.get(&step).map(|step| step.weights.clone())
    }

    /// The sub-tree, when it exists.
    pub fn subtree(&self, id: SubtreeId) -> Option<&Subtree> {
        self.trees.get(&id.tree)?.subtrees.get(id.trace as usize)
    }

    /// The tries at a unit, when it exists.
    pub fn tries(&self, unit: Unit) -> Option<&Tries> {
        match unit {
            Unit::Think(tree) => self.trees.get(&tree).map(|tree| &tree.think_tries),
            Unit::Render(id) => self.subtree(id).map(|s| &s.render_tries),
            Unit::Score(id) => self.subtree(id).map(|s| &s.score_tries),
        }
    }

    /// Whether a unit's result is in (or its tree has ended).
    pub fn is_done(&self, unit: Unit) -> bool {
        let Some(tree) = self.trees.get(&unit.tree()) else { return true };
        tree.fate.is_some()
            || match unit {
                Unit::Think(_) => !tree.subtrees.is_empty(),
                Unit::Render(id) => self.subtree(id).is_some_and(|s| s.render.is_some()),
                Unit::Score(id) => self.subtree(id).is_some_and(|s| s.scores.is_some()),
            }
    }

    fn tries_mut(&mut self, unit: Unit) -> Result<&mut Tries, Misfit> {
        let missing = || Misfit(format!("{} of {} is not there", unit.stage(), unit.tree()));
        let tree = self.trees.get_mut(&unit.tree()).ok_or_else(missing)?;
        match unit {
            Unit::Think(_) => Ok(&mut tree.think_tries),
            Unit::Render(id) => {
                { tree.subtrees.get_mut(id.trace as usize).map(|s| &mut s.render_tries) }
                    .ok_or_else(missing)
            }
            Unit::Score(id) => {
                { tree.subtrees.get_mut(id.trace as usize).map(|s| &mut s.score_tries) }
                    .ok_or_else(missing)
            }
        }
    }

    /// The one place where state changes: live and on restore alike.
    ///
    /// `rows` are the data set rows of the iteration that a record admits.
    pub fn apply(&mut self, spec: &RunSpec, rows: &[usize], record: &Record) -> Result<(), Misfit> {
        match record {
            Record::Opened { generation } => self.generation = *generation,
            Record::Admitted { iteration } => self.admit(*iteration, rows)?,
            Record::Leased { id, worker } => {
                let tries = self.tries_mut(id.unit)?;
                if id.attempt.0 <= tries.given {
                    return Err(Misfit(format!(
                        "{} of {} was given out before",
                        id.attempt,
                        id.unit.tree()
                    )));
                }
                tries.given = id.attempt.0;
                tries.worker = Some(worker.clone());
            }
            Record::Completed { id, worker, result, .. } => {
                self.tries_mut(id.unit)?.worker = Some(worker.clone());
                self.complete(spec, id.unit, result)?;
            }
            Record::AttemptFailed { id, kind, .. } => {
                let tries = self.tries_mut(id.unit)?;
                tries.failed += 1;
                tries.dead = id.attempt.0;
                *self.totals.failures.entry(kind.clone()).or_default() += 1;
            }
            Record::GivenUp { tree, reason } => {
                let entry =
                    self.trees.get_mut(tree).ok_or_else(|| Misfit(format!("no tree {tree}")))?;
                if entry.fate.is_some() {
                    return Err(Misfit(format!("DU-2: tree {tree} has a fate already")));
                }
                entry.fate = Some(Fate::Failed(reason.clone()));
                self.totals.failed += 1;
            }
            Record::EpochStarted { epoch } => self.epoch = *epoch,
            Record::StepCommitted { iteration, weights, metrics } => {
                self.commit(spec, *iteration, weights, metrics)?;
            }
            Record::Checkpointed { version, manifest } => {
                self.checkpoint = Some((*version, manifest.clone()));
                self.forget_before(spec, *version);
            }
            Record::Paused(paused) => self.paused = *paused,
        }
        Ok(())
    }

    fn admit(&mut self, iteration: u32, rows: &[usize]) -> Result<(), Misfit> {
        if iteration != self.admitted {
            return Err(Misfit(format!("iteration {iteration} admitted after {}", self.admitted)));
        }
        for (index, row) in (0u32..).zip(rows) {
            let tree = Tree { row: *row, ..Tree::default() };
            self.trees.insert(TreeId { iteration, index }, tree);
        }
        self.admitted += 1;
        self.totals.admitted += rows.len() as u64;
        Ok(())
    }

    fn complete(&mut self, spec: &RunSpec, unit: Unit, result: &Done) -> Result<(), Misfit> {
        let wrong =
            || Misfit(format!("{} of {} has another stage's result", unit.stage(), unit.tree()));
        let tree = self.trees.get_mut(&unit.tree()).ok_or_else(wrong)?;
        match (unit, result) {
            (Unit::Think(_), Done::Think(traces)) => {
                tree.subtrees = traces
                    .iter()
                    .map(|trace| Subtree {
                        trace: trace.clone(),
                        render_tries: Tries::default(),
                        render: None,
                        score_tries: Tries::default(),
                        scores: None,
                    })
                    .collect();
            }
            (Unit::Render(id), Done::Render(artifact)) => {
                let subtree = tree.subtrees.get_mut(id.trace as usize).ok_or_else(wrong)?;
                subtree.render = Some(artifact.clone());
                self.totals.images += u64::from(spec.leaves);
            }
            (Unit::Score(id), Done::Score(scores)) => {
                let subtree = tree.subtrees.get_mut(id.trace as usize).ok_or_else(wrong)?;
                subtree.scores = Some(scores.clone());
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
            return Err(Misfit(format!(
                "DU-4: step {iteration} to {} after {}",
                weights.version, self.version
            )));
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
        self.version = weights.version;
        let step = Committed { weights: weights.clone(), metrics: metrics.clone() };
        self.steps.insert(iteration, step);
        Ok(())
    }

    /// Drops trees and steps that neither a replay from the checkpoint nor a rollout of lag L needs.
    fn forget_before(&mut self, spec: &RunSpec, version: PolicyVersion) {
        let first = u32::try_from(version.0).unwrap_or(u32::MAX);
        self.trees = self.trees.split_off(&TreeId { iteration: first, index: 0 });
        self.steps = self.steps.split_off(&first.saturating_sub(spec.lag + 1));
    }
}

impl Default for State {
    fn default() -> Self {
        State::new()
    }
}

/// All tree ids of an iteration.
pub fn iteration_range(iteration: u32) -> std::ops::RangeInclusive<TreeId> {
    TreeId { iteration, index: 0 }..=TreeId { iteration, index: u32::MAX }
}
