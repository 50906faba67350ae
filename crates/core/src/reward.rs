//! Rewards of a tree from the scores of its leaves (arXiv 2601.10332 eq. 10 and 12).
//!
//! A failed component is *missing*: it never becomes a number (DU-8). What a missing component does
//! to its leaf, trace or tree is the configured [`FailurePolicy`].

use crate::work::{LeafScores, Score};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Weights of a branch's reward components; the weighted sum is not normalised.
pub type Mix = BTreeMap<String, f64>;

/// What missing scores do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailurePolicy {
    /// One missing leaf fails its whole sub-tree: its trace gets no reward, its leaves none.
    RequireAll,
    /// A trace is rewarded with the mean over its scored leaves when there are at least this many;
    /// missing leaves drop out of their group.
    AtLeast(u32),
    /// One missing leaf fails the whole tree.
    DropTree,
}

/// How scores become rewards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RewardSpec {
    /// R1: the LLM's mix, averaged over a trace's leaves (paper: semantic only).
    pub llm: Mix,
    /// R2: the DiT's mix, per leaf (paper: aesthetic, consistency and semantic).
    pub dit: Mix,
    /// What missing scores do.
    pub failure: FailurePolicy,
}

impl Default for RewardSpec {
    fn default() -> Self {
        let mix = |parts: &[(&str, f64)]| {
            parts.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect()
        };
        RewardSpec {
            llm: mix(&[("semantic", 1.0)]),
            dit: mix(&[("aesthetic", 0.1), ("consistency", 0.2), ("semantic", 0.7)]),
            failure: FailurePolicy::RequireAll,
        }
    }
}

/// Rewards of one tree; `None` is missing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TreeRewards {
    /// R1 of each trace.
    pub llm: Vec<Option<f64>>,
    /// R2 of each leaf of each trace.
    pub dit: Vec<Vec<Option<f64>>>,
}

/// The weighted sum of the components named in `mix`; `None` when one of them is missing or not a
/// finite number.
pub fn mixed(mix: &Mix, scores: &LeafScores) -> Option<f64> {
    mix.iter().try_fold(0.0, |sum, (name, weight)| match scores.get(name) {
        Some(Score::Scored(value)) if value.is_finite() => Some(sum + weight * value),
        _ if crate::mutation::Mutation::FailedScoreIsZero.on() => Some(sum),
        _ => None,
    })
}

/// Rewards of a tree; `scores[j]` are the leaves of trace j, empty when the sub-tree failed whole.
pub fn tree_rewards(spec: &RewardSpec, scores: &[Vec<LeafScores>]) -> TreeRewards {
    let mut rewards = TreeRewards::default();
    for leaves in scores {
        let llm: Vec<Option<f64>> = leaves.iter().map(|leaf| mixed(&spec.llm, leaf)).collect();
        let dit: Vec<Option<f64>> = leaves.iter().map(|leaf| mixed(&spec.dit, leaf)).collect();
        let scored: Vec<f64> = llm.iter().flatten().copied().collect();
        let needed = match spec.failure {
            FailurePolicy::AtLeast(n) => (n as usize).max(1),
            FailurePolicy::RequireAll | FailurePolicy::DropTree => leaves.len().max(1),
        };
        let whole = dit.iter().all(Option::is_some);
        let enough = scored.len() >= needed;
        let keep_leaves = whole || matches!(spec.failure, FailurePolicy::AtLeast(_));
        rewards.llm.push(enough.then(|| scored.iter().sum::<f64>() / scored.len() as f64));
        rewards.dit.push(if keep_leaves { dit } else { vec![None; leaves.len()] });
    }
    let broken = rewards.llm.iter().any(Option::is_none)
        || rewards.dit.iter().any(|leaves| leaves.iter().any(Option::is_none));
    if spec.failure == FailurePolicy::DropTree && broken {
        rewards.llm.iter_mut().for_each(|reward| *reward = None);
        rewards.dit.iter_mut().flatten().for_each(|reward| *reward = None);
    }
    rewards
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Millis;

    fn leaf(value: Option<f64>) -> LeafScores {
        let score = value.map_or(Score::TimedOut(Millis(5)), Score::Scored);
        [("semantic".to_owned(), score)].into()
    }

    fn spec(failure: FailurePolicy) -> RewardSpec {
        let mix = Mix::from([("semantic".to_owned(), 2.0)]);
        RewardSpec { llm: mix.clone(), dit: mix, failure }
    }

    #[test]
    fn du_8_a_missing_score_is_missing_never_zero() {
        let scores = [vec![leaf(Some(0.5)), leaf(None)], vec![leaf(Some(1.0)), leaf(Some(0.0))]];
        let all = tree_rewards(&spec(FailurePolicy::RequireAll), &scores);
        assert_eq!(all.llm, [None, Some(1.0)]);
        assert_eq!(all.dit, [vec![None, None], vec![Some(2.0), Some(0.0)]]);
        let some = tree_rewards(&spec(FailurePolicy::AtLeast(1)), &scores);
        assert_eq!(some.llm, [Some(1.0), Some(1.0)]);
        assert_eq!(some.dit[0], [Some(1.0), None]);
        let none = tree_rewards(&spec(FailurePolicy::DropTree), &scores);
        assert_eq!(none.llm, [None, None]);
    }

    #[test]
    fn a_component_that_is_not_finite_or_absent_is_missing() {
        let mix = Mix::from([("semantic".to_owned(), 1.0), ("aesthetic".to_owned(), 1.0)]);
        assert_eq!(mixed(&mix, &leaf(Some(1.0))), None);
        let nan = LeafScores::from([("semantic".to_owned(), Score::Scored(f64::NAN))]);
        assert_eq!(mixed(&Mix::from([("semantic".to_owned(), 1.0)]), &nan), None);
    }
}
