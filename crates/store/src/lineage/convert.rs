//! From the scheduler's account of an iteration to rows.

use super::Rows;
use super::rows::{AdvantageRow, LeafRow, PromptRow, RewardRow, TraceRow, UpdateRow};
use duet_core::Digest;
use duet_core::scheduler::{IterationLineage, TraceLineage, TreeLineage};
use duet_core::work::{Finish, Score};

impl From<&IterationLineage> for Rows {
    fn from(lineage: &IterationLineage) -> Rows {
        let mut rows = Rows::default();
        for tree in &lineage.trees {
            let seed = Digest(tree.seed.0).to_string();
            rows.prompts.push(PromptRow {
                tree: tree.id.index,
                row: tree.row,
                prompt: tree.prompt.clone(),
                policy_version: lineage.sampled_with.0,
                seed: seed.clone(),
                fate: tree.fate.clone(),
                reason: tree.reason.clone(),
            });
            for trace in &tree.traces {
                rows.trace(lineage, tree, trace, &seed);
            }
        }
        rows.updates.push(update(lineage));
        rows
    }
}

impl Rows {
    fn trace(
        &mut self,
        lineage: &IterationLineage,
        tree: &TreeLineage,
        trace: &TraceLineage,
        seed: &str,
    ) {
        let (tree, j) = (tree.id.index, trace.trace);
        self.traces.push(TraceRow {
            tree,
            trace: j,
            policy_version: lineage.sampled_with.0,
            seed: seed.to_owned(),
            worker: trace.think_worker.0.clone(),
            attempt: trace.think_attempt,
            text: trace.text.clone(),
            refined_prompt: trace.refined_prompt.clone(),
            well_formed: trace.well_formed,
            tokens: trace.tokens,
            finish: finish(trace.finish).to_owned(),
            artifact: trace.trace_artifact.clone(),
        });
        self.advantages.push(AdvantageRow {
            branch: "llm".to_owned(),
            tree,
            trace: j,
            leaf: None,
            reward: trace.reward,
            advantage: trace.advantage,
        });
        let counts = [trace.scores.len(), trace.leaf_rewards.len(), trace.leaf_advantages.len()];
        let images = counts.into_iter().max().filter(|_| !trace.render_artifact.is_empty());
        for (leaf, k) in (0u32..).zip(0..images.unwrap_or(0)) {
            self.leaves.push(LeafRow {
                tree,
                trace: j,
                leaf,
                policy_version: lineage.sampled_with.0,
                seed: seed.to_owned(),
                worker: trace.render_worker.0.clone(),
                attempt: trace.render_attempt,
                window_start: lineage.window.start,
                window_len: lineage.window.len,
                artifact: trace.render_artifact.clone(),
            });
            self.advantages.push(AdvantageRow {
                branch: "dit".to_owned(),
                tree,
                trace: j,
                leaf: Some(leaf),
                reward: trace.leaf_rewards.get(k).copied().flatten(),
                advantage: trace.leaf_advantages.get(k).copied().flatten(),
            });
        }
        for (leaf, scores) in (0u32..).zip(&trace.scores) {
            for (component, score) in scores {
                let (status, value, reason) = outcome(score);
                self.rewards.push(RewardRow {
                    tree,
                    trace: j,
                    leaf,
                    component: component.clone(),
                    status: status.to_owned(),
                    value,
                    reason,
                    worker: trace.score_worker.0.clone(),
                    attempt: trace.score_attempt,
                });
            }
        }
    }
}

fn finish(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

/// Status, number and reason of a score. There is a number only when it was scored (DU-8).
fn outcome(score: &Score) -> (&'static str, Option<f64>, String) {
    match score {
        Score::Scored(value) => ("scored", Some(*value), String::new()),
        Score::Failed(reason) => ("failed", None, reason.clone()),
        Score::TimedOut(after) => ("timed-out", None, format!("no answer within {} ms", after.0)),
    }
}

fn update(lineage: &IterationLineage) -> UpdateRow {
    let weights = &lineage.weights;
    UpdateRow {
        policy_version: weights.version.0,
        sampled_with: lineage.sampled_with.0,
        llm_weight: lineage.gates.llm,
        dit_weight: lineage.gates.dit,
        window_start: lineage.window.start,
        window_len: lineage.window.len,
        weights_digest: weights.digest.to_string(),
        llm_weights: weights.llm.as_ref().map(|weights| weights.key.clone()),
        dit_weights: weights.dit.as_ref().map(|weights| weights.key.clone()),
        // A map of names to finite numbers: JSON can hold it.
        metrics: serde_json::to_string(&lineage.metrics).unwrap_or_default(),
    }
}
