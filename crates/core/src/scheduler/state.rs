//! The durable state: what the journal rebuilds, and what a checkpoint carries.

use super::record::Fate;
use crate::reward::{TreeRewards, component_rewards, tree_rewards};
use crate::schedule::Plateau;
use crate::spec::RunSpec;
use crate::work::{Gates, Held, LeafScores, Trace, Unit, Weights};
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
    /// Attempts that failed through the unit's own fault, as far as one can tell.
    pub failed: u32,
    /// The newest attempt that came to nothing: nothing it still reports counts (DU-6).
    pub dead: u32,
    /// Who holds, or did, the last attempt.
    pub worker: Option<WorkerId>,
    /// Which process of that worker.
    pub session: u64,
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
        let mut rewards = tree_rewards(&spec.reward, &scores);
        for (reward, subtree) in rewards.llm.iter_mut().zip(&self.subtrees) {
            *reward = spec.reward.shape.apply(*reward, &subtree.trace);
        }
        rewards
    }

    /// Its rewards in one component alone.
    pub fn component(&self, spec: &RunSpec, whole: &TreeRewards, name: &str) -> TreeRewards {
        let scores: Vec<Vec<LeafScores>> =
            self.subtrees.iter().map(|s| s.scores.clone().unwrap_or_default()).collect();
        component_rewards(&spec.reward, &scores, whole, name)
    }
}

/// A committed step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Committed {
    /// The policy after it.
    pub weights: Weights,
    /// The trainers' numbers.
    #[serde(with = "crate::exact::numbers")]
    pub metrics: BTreeMap<String, f64>,
    /// Ranks of the group that took it last; 0: not known.
    #[serde(default)]
    pub world: u32,
    /// Hash over what the ranks held when a group of another size had repeated it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retaken: Option<Digest>,
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
    /// Scores that are missing from leases that were done, by component of the rewards.
    #[serde(default)]
    pub missing_scores: BTreeMap<String, u64>,
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
    #[serde(with = "crate::exact::pairs")]
    pub trees: BTreeMap<TreeId, Tree>,
    /// Committed steps not yet collected, by iteration.
    pub steps: BTreeMap<u32, Committed>,
    /// Ranks of the newest trainer group; 0: not known.
    #[serde(default)]
    pub world: u32,
    /// The newest checkpoint.
    pub checkpoint: Option<(PolicyVersion, ArtifactRef)>,
    /// Whether the run is paused.
    pub paused: bool,
    /// Whether an operator wants the run to end and it has not yet.
    #[serde(default)]
    pub stopping: bool,
    /// Totals.
    pub totals: Totals,
    /// What a plateau schedule remembers.
    #[serde(default)]
    pub plateau: Option<Plateau>,
    /// The first iteration of a plateau schedule's DiT phase, once known.
    #[serde(default)]
    pub switched: Option<u32>,
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
            world: 0,
            checkpoint: None,
            paused: false,
            stopping: false,
            totals: Totals::default(),
            plateau: None,
            switched: None,
        }
    }

    /// Which branches an iteration trains.
    pub fn gates(&self, spec: &RunSpec, iteration: u32) -> Gates {
        spec.schedule.gates(iteration, self.switched)
    }

    /// How many trees an iteration has.
    pub fn trees_of(&self, iteration: u32) -> u32 {
        self.trees.range(iteration_range(iteration)).count() as u32
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

    /// Hash over what the ranks hold at a committed version, where they have trained.
    pub fn trained_digest(&self, version: PolicyVersion) -> Option<Digest> {
        let step = self.steps.get(&u32::try_from(version.0.checked_sub(1)?).ok()?)?;
        Some(step.retaken.unwrap_or(step.weights.digest))
    }

    /// What a trainer that was in the group before may still hold and others may go on from: the newest
    /// committed version, unless some of the steps that led to it came out anew since and others not.
    pub fn newest_held(&self) -> Option<Held> {
        let saved = self.checkpoint.as_ref().map_or(0, |(version, _)| version.0 as u32);
        let mut anew = self.steps.range(saved..).map(|(_, step)| step.retaken.map(|_| step.world));
        let first = anew.next();
        if first.is_some_and(|first| anew.any(|step| step != first)) {
            return None;
        }
        let digest = self.trained_digest(self.version)?;
        Some(Held { version: self.version, digest })
    }

    /// Whether the newest group, repeating the steps since the checkpoint, must come out at the bits
    /// that were committed after `iteration`: sums over another number of ranks are rounded otherwise.
    pub fn repeats_exactly(&self, spec: &RunSpec, iteration: u32) -> bool {
        let size = |world: u32| if world == 0 { spec.world } else { world };
        let saved = self.checkpoint.as_ref().map_or(0, |(version, _)| version.0 as u32);
        let steps = self.steps.range(saved.min(iteration)..=iteration);
        steps.into_iter().all(|(_, step)| size(step.world) == size(self.world))
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

    /// The version that an iteration's trees are sampled with (DU-3).
    pub fn sampled_with(spec: &RunSpec, iteration: u32) -> PolicyVersion {
        PolicyVersion(u64::from(iteration.saturating_sub(spec.lag)))
    }

    /// Trees that are admitted and have no fate yet.
    pub fn in_flight(&self) -> u64 {
        let totals = &self.totals;
        totals.admitted.saturating_sub(totals.trained + totals.zero_spread + totals.failed)
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
