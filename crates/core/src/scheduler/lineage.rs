//! What is kept of an iteration for good: every prompt, trace, leaf, reward and advantage with the
//! policy version and worker it came from.

use super::record::Fate;
use super::state::{Tree, Tries, iteration_range};
use super::{Effect, Scheduler, batch};
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

impl Scheduler {
    /// Queues the rows of a committed iteration for writing.
    pub(super) fn emit_lineage(&mut self, iteration: u32) {
        let Some(step) = self.state.steps.get(&iteration).cloned() else { return };
        let judged = batch::judge(&self.state, &self.spec, iteration);
        let trees = self.state.trees.range(iteration_range(iteration)).map(|(id, tree)| {
            let fate = tree.fate.clone().unwrap_or(Fate::ZeroSpread);
            let (fate, reason) = match fate {
                Fate::Trained => ("trained", String::new()),
                Fate::ZeroSpread => ("zero-spread", String::new()),
                Fate::Failed(reason) => ("failed", reason),
            };
            TreeLineage {
                id: *id,
                row: tree.row as u64,
                prompt: self.prompts.get(tree.row).map(|p| p.text.clone()).unwrap_or_default(),
                fate: fate.to_owned(),
                reason,
                seed: self.tree_seed(*id),
                traces: trace_rows(tree, judged.get(id)),
            }
        });
        let lineage = IterationLineage {
            iteration,
            sampled_with: self.sampling_version(iteration),
            gates: self.state.gates(&self.spec, iteration),
            window: self.window(iteration),
            weights: step.weights,
            metrics: step.metrics,
            trees: trees.collect(),
        };
        self.output.effects.push(Effect::WriteLineage(Box::new(lineage)));
    }
}

fn trace_rows(tree: &Tree, judged: Option<&batch::Judged>) -> Vec<TraceLineage> {
    let who = |tries: &Tries| tries.worker.clone().unwrap_or_else(|| WorkerId(String::new()));
    let rows = tree.subtrees.iter().enumerate().map(|(j, s)| TraceLineage {
        trace: j as u32,
        think_worker: who(&tree.think_tries),
        think_attempt: tree.think_tries.given,
        render_worker: who(&s.render_tries),
        render_attempt: s.render_tries.given,
        score_worker: who(&s.score_tries),
        score_attempt: s.score_tries.given,
        text: s.trace.text.clone(),
        refined_prompt: s.trace.refined_prompt.clone(),
        well_formed: s.trace.well_formed,
        tokens: s.trace.tokens,
        finish: s.trace.finish,
        trace_artifact: s.trace.artifact.key.clone(),
        render_artifact: s.render.as_ref().map(|r| r.key.clone()).unwrap_or_default(),
        reward: judged.and_then(|t| t.llm_rewards[j]),
        advantage: judged.and_then(|t| t.llm[j]),
        scores: s.scores.clone().unwrap_or_default(),
        leaf_rewards: judged.map(|t| t.dit_rewards[j].clone()).unwrap_or_default(),
        leaf_advantages: judged.map(|t| t.dit[j].clone()).unwrap_or_default(),
    });
    rows.collect()
}
