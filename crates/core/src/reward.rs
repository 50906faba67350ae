//! Rewards of a tree from the scores of its leaves (arXiv 2601.10332 eq. 10 and 12).
//!
//! A failed component is *missing*: it never becomes a number (DU-8). What a missing component does
//! to its leaf, trace or tree is the configured [`FailurePolicy`].

use crate::work::{Finish, LeafScores, Score, Trace};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

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

/// What an answer that the token limit cut off does to its trace's reward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Overlong {
    /// Nothing: it is rewarded like any other.
    #[default]
    Keep,
    /// Its trace has no reward: it is neither compared nor trained on (DAPO's overlong filtering,
    /// arXiv 2503.14476 section 3.4).
    Mask,
    /// R1 falls linearly over the last `soft` tokens before the limit `max`, by `weight` at the limit
    /// (DAPO eq. 13, soft overlong punishment).
    Penalty {
        /// Tokens over which the penalty rises.
        soft: u32,
        /// The token limit.
        max: u32,
        /// Penalty at the limit.
        weight: f64,
    },
}

/// What the form of an answer does to R1, besides the scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TraceShape {
    /// Answers at the token limit.
    pub overlong: Overlong,
    /// Taken off R1 of an answer without the `Revised Prompt:` marker.
    pub format_penalty: f64,
}

impl TraceShape {
    /// R1 of a trace with its form taken into account; `None`: missing.
    pub fn apply(&self, reward: Option<f64>, trace: &Trace) -> Option<f64> {
        let mut reward = reward?;
        if !trace.well_formed {
            reward -= self.format_penalty;
        }
        match self.overlong {
            Overlong::Keep => {}
            Overlong::Mask if trace.finish == Finish::Length => return None,
            Overlong::Mask => {}
            Overlong::Penalty { soft, max, weight } => {
                let over = f64::from(trace.tokens) - f64::from(max.saturating_sub(soft));
                reward -= weight * (over / f64::from(soft.max(1))).clamp(0.0, 1.0);
            }
        }
        Some(reward)
    }
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
    /// What the form of an answer does to R1.
    #[serde(default)]
    pub shape: TraceShape,
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
            shape: TraceShape::default(),
        }
    }
}

impl RewardSpec {
    /// The components that rewards are made of, in name order.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        let names: BTreeSet<&String> = self.llm.keys().chain(self.dit.keys()).collect();
        names.into_iter().map(String::as_str)
    }

    /// How many leaves lack a component; only components that some leaf lacks.
    pub fn missing<'a>(&'a self, leaves: &[LeafScores]) -> BTreeMap<&'a str, u64> {
        let lacks = |name: &str| {
            let there = |leaf: &&LeafScores| matches!(leaf.get(name), Some(Score::Scored(_)));
            leaves.len() as u64 - leaves.iter().filter(there).count() as u64
        };
        let counted = self.components().map(|name| (name, lacks(name)));
        counted.filter(|(_, missing)| *missing > 0).collect()
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

/// Rewards of a tree in one component alone, missing wherever the whole mix of a branch is: what
/// [`crate::advantage::Combine::NormaliseThenSum`] normalises.
pub fn component_rewards(
    spec: &RewardSpec,
    scores: &[Vec<LeafScores>],
    whole: &TreeRewards,
    name: &str,
) -> TreeRewards {
    let mix = Mix::from([(name.to_owned(), 1.0)]);
    let alone = RewardSpec { llm: mix.clone(), dit: mix, ..spec.clone() };
    // A leaf that lacks another component does not count for this one either.
    let kept: Vec<Vec<LeafScores>> = scores
        .iter()
        .map(|leaves| {
            let whole = |leaf: &&LeafScores| mixed(&spec.llm, leaf).is_some();
            leaves
                .iter()
                .map(|leaf| Some(leaf).filter(whole).cloned().unwrap_or_default())
                .collect()
        })
        .collect();
    let mut found =
        TreeRewards { llm: tree_rewards(&alone, &kept).llm, dit: tree_rewards(&alone, scores).dit };
    for (one, whole) in found.llm.iter_mut().zip(&whole.llm) {
        *one = one.filter(|_| whole.is_some());
    }
    for (one, whole) in found.dit.iter_mut().flatten().zip(whole.dit.iter().flatten()) {
        *one = one.filter(|_| whole.is_some());
    }
    found
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
        RewardSpec { llm: mix.clone(), dit: mix, failure, shape: TraceShape::default() }
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

    fn trace(tokens: u32, finish: Finish, well_formed: bool) -> Trace {
        let artifact =
            crate::ArtifactRef { key: "t".to_owned(), digest: crate::Digest([0; 32]), bytes: 1 };
        let (text, refined_prompt) = (String::new(), String::new());
        Trace { artifact, text, refined_prompt, well_formed, tokens, finish }
    }

    #[test]
    fn the_form_of_an_answer_shapes_its_reward() {
        let plain = TraceShape::default();
        let cut = trace(48, Finish::Length, false);
        assert_eq!(plain.apply(Some(0.5), &cut), Some(0.5));
        let mask = TraceShape { overlong: Overlong::Mask, format_penalty: 0.25 };
        assert_eq!(mask.apply(Some(0.5), &cut), None);
        assert_eq!(mask.apply(Some(0.5), &trace(9, Finish::Stop, false)), Some(0.25));
        assert_eq!(mask.apply(None, &trace(9, Finish::Stop, true)), None);
        // DAPO eq. 13: nothing up to max - soft, then linear, one at the limit.
        let overlong = Overlong::Penalty { soft: 8, max: 48, weight: 1.0 };
        let soft = TraceShape { overlong, format_penalty: 0.0 };
        let of = |tokens| soft.apply(Some(1.0), &trace(tokens, Finish::Stop, true));
        assert_eq!([of(10), of(40), of(44), of(48)], [1.0, 1.0, 0.5, 0.0].map(Some));
    }

    #[test]
    fn a_component_alone_is_missing_where_the_mix_is() {
        let mix = Mix::from([("semantic".to_owned(), 1.0), ("aesthetic".to_owned(), 1.0)]);
        let failure = FailurePolicy::AtLeast(1);
        let spec = RewardSpec { llm: mix.clone(), dit: mix, failure, ..RewardSpec::default() };
        let both = |semantic, aesthetic: Option<f64>| {
            let score =
                |value: Option<f64>| value.map_or(Score::Failed("x".to_owned()), Score::Scored);
            LeafScores::from([
                ("semantic".to_owned(), score(Some(semantic))),
                ("aesthetic".to_owned(), score(aesthetic)),
            ])
        };
        let scores = [vec![both(1.0, Some(0.5)), both(0.0, None)]];
        let whole = tree_rewards(&spec, &scores);
        let semantic = component_rewards(&spec, &scores, &whole, "semantic");
        assert_eq!(semantic.llm, [Some(1.0)], "the second leaf lacks a component");
        assert_eq!(semantic.dit, [vec![Some(1.0), None]]);
    }

    #[test]
    fn a_component_that_is_not_finite_or_absent_is_missing() {
        let mix = Mix::from([("semantic".to_owned(), 1.0), ("aesthetic".to_owned(), 1.0)]);
        assert_eq!(mixed(&mix, &leaf(Some(1.0))), None);
        let nan = LeafScores::from([("semantic".to_owned(), Score::Scored(f64::NAN))]);
        assert_eq!(mixed(&Mix::from([("semantic".to_owned(), 1.0)]), &nan), None);
    }
}
