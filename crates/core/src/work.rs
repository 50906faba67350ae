//! The work that travels between the coordinator and its workers: leases out, reports in.
//!
//! Only references and scalars are here; tensors and images go through the artifact store.
//!
//! ```text
//! coordinator                                  worker
//! Lease::Think    ---------------------------> rollout: J traces of one tree
//!                 <--------------------------- Done::Think
//! Lease::Render   ---------------------------> rollout: K leaves of one trace
//!                 <--------------------------- Done::Render
//! Lease::Score    ---------------------------> reward: each leaf, each component
//!                 <--------------------------- Done::Score
//! Rendezvous      ---------------------------> every trainer rank: form a process group, restore
//!                 <--------------------------- TrainerReady
//! Step            ---------------------------> every trainer rank: losses, all-reduce, step
//!                 <--------------------------- StepDone
//!                 <--------------------------- ShardDone, when it was to write a checkpoint; may be
//!                                              later than the next Step
//! Publish         ---------------------------> every rollout worker: fetch, verify, hold
//!                 <--------------------------- PublishAck
//! ```

use crate::{
    ArtifactRef, Attempt, Digest, Millis, PolicyVersion, Rank, Seed, SubtreeId, TrainerEpoch,
    TreeId,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A prompt of the data set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptRow {
    /// Row number in the data set, from zero.
    pub row: u64,
    /// The raw user prompt `q`.
    pub text: String,
    /// Whatever a scorer needs to know of the prompt (its true target, quoted text, ...): JSON,
    /// passed through untouched. Empty when there is nothing.
    pub meta: String,
}

/// The weights of one policy version, as artifacts. Files are named as in the pipeline folder or
/// adapter they update; a worker applies them, in order, onto the base model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weights {
    /// Which version this is.
    pub version: PolicyVersion,
    /// LLM encoder weights that differ from the base model's; `None`: the base model's own.
    pub llm: Option<ArtifactRef>,
    /// DiT weights (or adapter) that differ from the base model's; `None`: the base model's own.
    pub dit: Option<ArtifactRef>,
    /// Hash over all trained tensors in name order: what bit-identity is measured by.
    pub digest: Digest,
}

/// What names a lease: the unit of work, the stage and the try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseId {
    /// What is worked on.
    pub unit: Unit,
    /// Which try this is, from one. Never repeats for a unit and stage, also not after a restart.
    pub attempt: Attempt,
}

/// A unit of lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// The J traces of a tree.
    Think(TreeId),
    /// The K leaves of a trace.
    Render(SubtreeId),
    /// The rewards of a trace's K leaves.
    Score(SubtreeId),
}

impl Unit {
    /// The tree this belongs to.
    pub fn tree(&self) -> TreeId {
        match self {
            Unit::Think(tree) => *tree,
            Unit::Render(subtree) | Unit::Score(subtree) => subtree.tree,
        }
    }

    /// The tree or sub-tree, for a person: `i3/t1` or `i3/t1/j2`.
    pub fn place(&self) -> String {
        match self {
            Unit::Think(tree) => tree.to_string(),
            Unit::Render(subtree) | Unit::Score(subtree) => subtree.to_string(),
        }
    }

    /// `think`, `render` or `score`.
    pub fn stage(&self) -> &'static str {
        match self {
            Unit::Think(_) => "think",
            Unit::Render(_) => "render",
            Unit::Score(_) => "score",
        }
    }
}

/// The denoising steps that are sampled by the SDE and trained: `start..start + len`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// First step, from zero.
    pub start: u32,
    /// Number of steps; zero: plain ODE sampling, nothing stored for training.
    pub len: u32,
}

/// Which branches an iteration trains, and with what loss weight (beta of eq. 10 and 12, applied to
/// the loss, since in the advantage it cancels).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gates {
    /// Loss weight of the LLM branch; zero: not trained, nothing computed for it.
    pub llm: f64,
    /// Loss weight of the DiT branch; zero: not trained, rollouts are plain ODE.
    pub dit: f64,
}

/// A lease: one unit of work, given to one worker until a deadline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lease {
    /// Its name.
    pub id: LeaseId,
    /// How long the worker has, counted from its receipt.
    pub expires_in: Millis,
    /// What to do.
    pub work: Work,
}

/// What a lease asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// Sample J traces.
    Think(ThinkWork),
    /// Sample K images of a trace.
    Render(RenderWork),
    /// Score K images of a trace.
    Score(ScoreWork),
}

/// Sample `traces` chains of thought and refined prompts for one raw prompt, and encode the refined
/// prompts for the DiT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ThinkWork {
    /// The policy to sample with.
    pub weights: Weights,
    /// The raw prompt.
    pub prompt: PromptRow,
    /// J.
    pub traces: u32,
    /// `H(run, iteration, tree)`; traces derive theirs from it.
    pub seed: Seed,
}

/// Sample `leaves` images of one trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RenderWork {
    /// The policy to sample with.
    pub weights: Weights,
    /// The trace's artifact: tokens, log-probs, embeddings.
    pub trace: ArtifactRef,
    /// K.
    pub leaves: u32,
    /// The window of the iteration.
    pub window: Window,
    /// `H(run, iteration, tree, trace)`; leaves derive theirs from it.
    pub seed: Seed,
}

/// Score the images of one trace against the raw prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreWork {
    /// The raw prompt, with what scorers need to know of it.
    pub prompt: PromptRow,
    /// What the LLM made of it.
    pub refined_prompt: String,
    /// The rendered sub-tree's artifact.
    pub render: ArtifactRef,
    /// K.
    pub leaves: u32,
}

/// How a trace ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Finish {
    /// The model ended its turn.
    Stop,
    /// The token limit cut it off.
    Length,
}

/// One sampled trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// Tokens, log-probs and embeddings.
    pub artifact: ArtifactRef,
    /// All of the response text.
    pub text: String,
    /// The part after `Revised Prompt:`, or all of it when the marker is missing.
    pub refined_prompt: String,
    /// Whether the marker was there.
    pub well_formed: bool,
    /// Response length in tokens.
    pub tokens: u32,
    /// How it ended.
    pub finish: Finish,
}

/// The outcome of one scorer on one image. There is no number without `Scored` (DU-8).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// A finite number.
    Scored(#[serde(with = "crate::exact::number")] f64),
    /// The scorer could not say, and why.
    Failed(String),
    /// The scorer did not answer in time.
    TimedOut(Millis),
}

/// The scores of one image by component name (`semantic`, `aesthetic`, `consistency`, ...).
pub type LeafScores = BTreeMap<String, Score>;

/// The result of a lease.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Done {
    /// J traces, in order.
    Think(Vec<Trace>),
    /// The K leaves: latents of the window, log-probs and images in one artifact.
    Render(ArtifactRef),
    /// K score sets, in order.
    Score(Vec<LeafScores>),
}

/// What became of a lease.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Done, with how long it took at the worker.
    Done {
        /// The result.
        result: Done,
        /// Time spent on it, at the worker.
        took: Millis,
    },
    /// Failed, and why.
    Failed {
        /// A class of failures that is counted (`artifact`, `non-finite`, `model`, `scorer`, ...).
        kind: String,
        /// What happened, for a person.
        reason: String,
    },
    /// Handed back untouched (drain).
    HandedBack,
}

/// A trainer rank's part in a new process group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rendezvous {
    /// The incarnation of the group.
    pub epoch: TrainerEpoch,
    /// This worker's rank.
    pub rank: Rank,
    /// How many ranks there are.
    pub world: u32,
    /// Where rank 0 listens (`host:port`); `None` for rank 0 itself, which opens a port and says.
    pub store: Option<String>,
    /// The checkpoint to restore from; `None`: the base model, version 0.
    pub restore: Option<ArtifactRef>,
    /// The newest committed version. Where ranks of the group still hold it, the others take it from
    /// them and nothing is restored.
    pub newest: Option<Held>,
}

/// A state of models and optimisers, by the weights in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The policy version.
    pub version: PolicyVersion,
    /// Hash over all trained tensors.
    pub digest: Digest,
}

/// One optimiser step (or several updates, if so configured) over one iteration's trees.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// The trainer group this is for.
    pub epoch: TrainerEpoch,
    /// The iteration; the step takes version `iteration` to version `iteration + 1`.
    pub iteration: u32,
    /// Loss weights of the branches.
    pub gates: Gates,
    /// The window the leaves were sampled with.
    pub window: Window,
    /// The trees, in index order; the same list for every rank.
    pub trees: Vec<TrainTree>,
    /// Whether to update at all; false: the version stays, only the checkpoint is written.
    pub update: bool,
    /// Whether rank 0 shall write the new weights to the artifact store.
    pub publish: bool,
    /// Whether every rank shall write its checkpoint shard after the step, and say so with a report
    /// of its own; the next step need not wait for that.
    pub checkpoint: bool,
}

/// A tree as the trainer sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainTree {
    /// Which tree.
    pub id: TreeId,
    /// The raw prompt.
    pub prompt: PromptRow,
    /// Its traces that are trained on, by trace number.
    pub traces: Vec<TrainTrace>,
}

/// A trace as the trainer sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainTrace {
    /// Its number `j` in the tree.
    pub trace: u32,
    /// Tokens, log-probs, embeddings.
    pub artifact: ArtifactRef,
    /// LLM advantage; `None`: not trained on (zero spread, failed, gate closed).
    pub advantage: Option<f64>,
    /// The rendered leaves; `None` when none is trained on.
    pub render: Option<ArtifactRef>,
    /// DiT advantages of the K leaves; `None` where a leaf is not trained on.
    pub leaf_advantages: Vec<Option<f64>>,
}

/// A rank finished a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepDone {
    /// The trainer group.
    pub epoch: TrainerEpoch,
    /// The rank.
    pub rank: Rank,
    /// The iteration.
    pub iteration: u32,
    /// The policy after it; artifacts are named by rank 0 only, and only when asked to publish.
    pub weights: Weights,
    /// Losses, ratios, norms: TRL's names where TRL has one. Equal on all ranks.
    pub metrics: BTreeMap<String, f64>,
}

/// A rank has made its part of a checkpoint durable. Said once it is, while later steps may run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardDone {
    /// The trainer group.
    pub epoch: TrainerEpoch,
    /// The rank.
    pub rank: Rank,
    /// The version that the checkpoint is of.
    pub version: PolicyVersion,
    /// What the rank wrote.
    pub shards: Vec<ArtifactRef>,
}

/// What a worker gets when it asks for work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Assignment {
    /// A unit of work (rollout and reward workers).
    Lease(Lease),
    /// Fetch, verify and hold this policy version (rollout workers).
    Publish(Weights),
    /// Form a process group (trainers).
    Rendezvous(Rendezvous),
    /// Take an optimiser step (trainers).
    Step(Step),
    /// Finish up and leave with exit code 0: the run is over or the worker is drained.
    Leave {
        /// Why, for the worker's log.
        reason: String,
    },
}

/// What a worker tells the coordinator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Report {
    /// What became of a lease.
    Lease {
        /// Which.
        id: LeaseId,
        /// What.
        outcome: Outcome,
    },
    /// A rollout worker holds this version, verified.
    PublishAck {
        /// Which.
        version: PolicyVersion,
    },
    /// A rollout worker could not fetch or verify a version.
    PublishFailed {
        /// Which.
        version: PolicyVersion,
        /// Why.
        reason: String,
    },
    /// Rank 0 of a new trainer group listens here.
    StoreReady {
        /// Which group.
        epoch: TrainerEpoch,
        /// `host:port`.
        address: String,
    },
    /// A rank has joined its group and restored its state.
    TrainerReady {
        /// Which group.
        epoch: TrainerEpoch,
        /// The rank.
        rank: Rank,
        /// The version it now holds.
        version: PolicyVersion,
        /// Hash over its trained tensors.
        digest: Digest,
    },
    /// A rank finished a step.
    StepDone(StepDone),
    /// A rank's part of a checkpoint is durable.
    ShardDone(ShardDone),
    /// A rank could not join, restore or step; the group must be formed anew.
    TrainerFailed {
        /// Which group.
        epoch: TrainerEpoch,
        /// The rank.
        rank: Rank,
        /// A class of failures that is counted (`collective`, `non-finite`, `artifact`, ...).
        kind: String,
        /// What happened, for a person.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_survives_json() {
        let unit = Unit::Render(TreeId { iteration: 3, index: 1 }.subtree(2));
        let text = serde_json::to_string(&unit).unwrap();
        assert_eq!(serde_json::from_str::<Unit>(&text).unwrap(), unit);
        assert_eq!((unit.stage(), unit.tree().to_string().as_str()), ("render", "i3/t1"));
    }
}
