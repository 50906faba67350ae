//! The numbers of an iteration, under the names that users of TRL know.
//!
//! | name | what |
//! |---|---|
//! | `reward/llm`, `reward/dit` | mean reward of the branch: R1 over traces, R2 over leaves |
//! | `reward` | mean of these two |
//! | `reward_std/llm`, `reward_std/dit`, `reward_std` | mean over groups of the standard deviation within the group (ddof 0): groups are a tree's traces and a trace's leaves; the last is the mean of both |
//! | `rewards/<component>/mean`, `/std`, `/failed` | of a component over all leaves (ddof 0); share of leaves without a score |
//! | `frac_reward_zero_std`, `.../llm`, `.../dit` | share of groups without spread, groups of one counted; the first over both kinds |
//! | `completions/{mean,min,max}_length`, `completions/clipped_ratio` | tokens of a trace; share cut off at the limit |
//! | `well_formed` | share of traces with the marker of the refined prompt |
//! | `trees/trained`, `trees/zero_spread`, `trees/failed` | trees by fate |
//! | `gate/llm`, `gate/dit` | loss weights of the branches |
//!
//! The trainers' own numbers are added as they come. Missing rewards are left out of every mean; what
//! no value was found for is not in the row.

use duet_core::scheduler::{IterationLineage, TraceLineage};
use duet_core::work::{Finish, Score};
use std::collections::BTreeMap;

/// A row of `metrics.jsonl`, without iteration and time.
pub fn row(lineage: &IterationLineage) -> BTreeMap<String, f64> {
    let mut row = Row(lineage.metrics.clone());
    row.0.retain(|_, value| value.is_finite());
    branches(lineage, &mut row);
    components(lineage, &mut row);
    completions(lineage, &mut row);
    for (name, fate) in
        [("trained", "trained"), ("zero_spread", "zero-spread"), ("failed", "failed")]
    {
        let count = lineage.trees.iter().filter(|tree| tree.fate == fate).count();
        row.put(&format!("trees/{name}"), Some(count as f64));
    }
    row.put("gate/llm", Some(lineage.gates.llm));
    row.put("gate/dit", Some(lineage.gates.dit));
    row.0
}

/// Mean rewards of a row by branch and component: `llm`, `dit`, `semantic`, ...
pub fn rewards(row: &BTreeMap<String, f64>) -> BTreeMap<String, f64> {
    let name = |full: &str| match full.strip_prefix("reward/") {
        Some(branch) => Some(branch.to_owned()),
        None => Some(full.strip_prefix("rewards/")?.strip_suffix("/mean")?.to_owned()),
    };
    row.iter().filter_map(|(full, value)| Some((name(full)?, *value))).collect()
}

struct Row(BTreeMap<String, f64>);

impl Row {
    fn put(&mut self, name: &str, value: Option<f64>) {
        if let Some(value) = value.filter(|value| value.is_finite()) {
            self.0.insert(name.to_owned(), value);
        }
    }
}

fn traces(lineage: &IterationLineage) -> impl Iterator<Item = &TraceLineage> {
    lineage.trees.iter().flat_map(|tree| &tree.traces)
}

fn branches(lineage: &IterationLineage, row: &mut Row) {
    let present = |values: &[Option<f64>]| values.iter().flatten().copied().collect::<Vec<f64>>();
    let llm: Vec<Vec<f64>> = lineage
        .trees
        .iter()
        .map(|tree| present(&tree.traces.iter().map(|trace| trace.reward).collect::<Vec<_>>()))
        .filter(|group| !group.is_empty())
        .collect();
    let dit: Vec<Vec<f64>> = traces(lineage)
        .map(|trace| present(&trace.leaf_rewards))
        .filter(|group| !group.is_empty())
        .collect();
    let (mut means, mut stds, mut flat, mut all) = (Vec::new(), Vec::new(), 0, 0);
    for (name, groups) in [("llm", llm), ("dit", dit)] {
        let spreads: Vec<f64> = groups.iter().filter_map(|group| std(group)).collect();
        let zero = spreads.iter().filter(|spread| **spread == 0.0).count();
        let (reward, spread) = (mean(&groups.concat()), mean(&spreads));
        row.put(&format!("reward/{name}"), reward);
        row.put(&format!("reward_std/{name}"), spread);
        row.put(&format!("frac_reward_zero_std/{name}"), share(zero, groups.len()));
        means.extend(reward);
        stds.extend(spread);
        (flat, all) = (flat + zero, all + groups.len());
    }
    row.put("reward", mean(&means));
    row.put("reward_std", mean(&stds));
    row.put("frac_reward_zero_std", share(flat, all));
}

fn components(lineage: &IterationLineage, row: &mut Row) {
    let mut found: BTreeMap<&str, (Vec<f64>, usize)> = BTreeMap::new();
    for (name, score) in traces(lineage).flat_map(|trace| trace.scores.iter().flatten()) {
        let (values, missing) = found.entry(name).or_default();
        match score {
            Score::Scored(value) => values.push(*value),
            Score::Failed(_) | Score::TimedOut(_) => *missing += 1,
        }
    }
    for (name, (values, missing)) in found {
        row.put(&format!("rewards/{name}/mean"), mean(&values));
        row.put(&format!("rewards/{name}/std"), std(&values));
        row.put(&format!("rewards/{name}/failed"), share(missing, values.len() + missing));
    }
}

fn completions(lineage: &IterationLineage, row: &mut Row) {
    let lengths: Vec<f64> = traces(lineage).map(|trace| f64::from(trace.tokens)).collect();
    row.put("completions/mean_length", mean(&lengths));
    row.put("completions/min_length", lengths.iter().copied().reduce(f64::min));
    row.put("completions/max_length", lengths.iter().copied().reduce(f64::max));
    let clipped = traces(lineage).filter(|trace| trace.finish == Finish::Length).count();
    row.put("completions/clipped_ratio", share(clipped, lengths.len()));
    let formed = traces(lineage).filter(|trace| trace.well_formed).count();
    row.put("well_formed", share(formed, lengths.len()));
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Standard deviation with ddof 0, exactly zero when all values are equal.
fn std(values: &[f64]) -> Option<f64> {
    let (first, mean) = (values.first()?, mean(values)?);
    if values.iter().all(|value| value == first) {
        return Some(0.0);
    }
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    Some((squares / values.len() as f64).sqrt())
}

fn share(part: usize, whole: usize) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use duet_core::scheduler::TreeLineage;
    use duet_core::work::{Gates, Weights, Window};
    use duet_core::{Digest, PolicyVersion, Seed, TreeId, WorkerId};

    fn lineage(iteration: u32, traces: Vec<TraceLineage>) -> IterationLineage {
        let version = PolicyVersion(u64::from(iteration) + 1);
        let tree = TreeLineage {
            id: TreeId { iteration, index: 0 },
            row: 0,
            prompt: "p".to_owned(),
            fate: "trained".to_owned(),
            reason: String::new(),
            seed: Seed([0; 32]),
            traces,
        };
        IterationLineage {
            iteration,
            sampled_with: PolicyVersion(u64::from(iteration)),
            gates: Gates { llm: 0.5, dit: 0.5 },
            window: Window::default(),
            weights: Weights { version, llm: None, dit: None, digest: Digest([0; 32]) },
            metrics: [("loss".to_owned(), 0.25), ("odd".to_owned(), f64::NAN)].into(),
            trees: vec![tree],
        }
    }

    fn trace(reward: Option<f64>, leaves: &[Option<f64>], finish: Finish) -> TraceLineage {
        let nobody = || WorkerId(String::new());
        let score = |leaf: &Option<f64>| {
            let score = leaf.map_or(Score::Failed("no".to_owned()), Score::Scored);
            [("semantic".to_owned(), score)].into()
        };
        TraceLineage {
            trace: 0,
            think_worker: nobody(),
            think_attempt: 1,
            render_worker: nobody(),
            render_attempt: 1,
            score_worker: nobody(),
            score_attempt: 1,
            text: String::new(),
            refined_prompt: String::new(),
            well_formed: finish == Finish::Stop,
            tokens: 10,
            finish,
            trace_artifact: String::new(),
            render_artifact: String::new(),
            reward,
            advantage: None,
            scores: leaves.iter().map(score).collect(),
            leaf_rewards: leaves.to_vec(),
            leaf_advantages: vec![None; leaves.len()],
        }
    }

    #[test]
    fn missing_rewards_are_left_out_and_never_zero() {
        let with = [Some(0.2), None, Some(0.6)];
        let traces = vec![
            trace(Some(0.4), &with, Finish::Stop),
            trace(None, &[None, None, None], Finish::Length),
        ];
        let row = row(&lineage(0, traces));
        let close = |name: &str, value: f64| {
            assert!((row[name] - value).abs() < 1e-12, "{name} is {}, not {value}", row[name]);
        };
        close("reward/llm", 0.4);
        close("reward/dit", 0.4);
        close("reward_std/dit", 0.2);
        close("rewards/semantic/mean", 0.4);
        close("rewards/semantic/failed", 4.0 / 6.0);
        close("frac_reward_zero_std/llm", 1.0); // a group of one has no spread
        close("frac_reward_zero_std/dit", 0.0);
        close("frac_reward_zero_std", 0.5);
        close("completions/clipped_ratio", 0.5);
        close("well_formed", 0.5);
        close("loss", 0.25);
        assert!(!row.contains_key("odd"), "a number that is none has no place in a row");
        assert_eq!(rewards(&row).keys().collect::<Vec<_>>(), ["dit", "llm", "semantic"]);
    }

    #[test]
    fn nothing_rewarded_gives_no_reward() {
        let row = row(&lineage(0, vec![trace(None, &[None], Finish::Stop)]));
        assert!(!row.contains_key("reward") && !row.contains_key("reward_std"));
        assert_eq!(row["rewards/semantic/failed"], 1.0);
    }
}
