//! What is kept of an iteration for good: every prompt, trace, leaf, reward and advantage with the
//! policy version and worker it came from.

use crate::work::{Finish, Gates, LeafScores, Weights, Window};
use crate::{PolicyVersion, Seed, TreeId, WorkerId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The rows of one committed iteration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IterationLineage {
    /// Which.
    pub iteration: u32,
    /// What its trees were sampled with.
    pub sampled_with: PolicyVersion,
    /// Loss weights.
    pub gates: Gates,
    /// The window.
    pub window: Window,
    /// The policy after the step.
    pub weights: Weights,
    /// The trainers' numbers.
    pub metrics: BTreeMap<String, f64>,
    /// Its trees.
    pub trees: Vec<TreeLineage>,
}

/// A tree's rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TreeLineage {
    /// Which.
    pub id: TreeId,
    /// Data set row and raw prompt.
    pub row: u64,
    /// The raw prompt.
    pub prompt: String,
    /// Fate: `trained`, `zero-spread` or `failed`.
    pub fate: String,
    /// Why it failed; empty otherwise.
    pub reason: String,
    /// Its seed.
    pub seed: Seed,
    /// Its traces.
    pub traces: Vec<TraceLineage>,
}

/// A trace's rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceLineage {
    /// Its number.
    pub trace: u32,
    /// Who sampled it, and at which attempt.
    pub think_worker: WorkerId,
    /// At which attempt.
    pub think_attempt: u32,
    /// Who rendered its leaves.
    pub render_worker: WorkerId,
    /// At which attempt.
    pub render_attempt: u32,
    /// Who scored its leaves.
    pub score_worker: WorkerId,
    /// At which attempt.
    pub score_attempt: u32,
    /// The response.
    pub text: String,
    /// The refined prompt.
    pub refined_prompt: String,
    /// Whether the marker was there.
    pub well_formed: bool,
    /// Tokens.
    pub tokens: u32,
    /// How it ended.
    pub finish: Finish,
    /// Key of the trace's artifact.
    pub trace_artifact: String,
    /// Key of the rendered leaves' artifact.
    pub render_artifact: String,
    /// R1.
    pub reward: Option<f64>,
    /// Its advantage over J.
    pub advantage: Option<f64>,
    /// Scores of its leaves.
    pub scores: Vec<LeafScores>,
    /// R2 of its leaves.
    pub leaf_rewards: Vec<Option<f64>>,
    /// Advantages of its leaves.
    pub leaf_advantages: Vec<Option<f64>>,
}
