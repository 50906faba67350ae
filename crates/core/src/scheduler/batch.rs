//! From scored trees to an optimiser step: rewards, advantages, and the trees worth training on.

use super::state::{State, Tree, iteration_range};
use crate::TreeId;
use crate::advantage::{AdvantageSpec, Combine, GroupKey, advantages, advantages_by_component};
use crate::reward::{Mix, TreeRewards};
use crate::spec::RunSpec;
use crate::work::{PromptRow, TrainTrace, TrainTree};
use std::collections::{BTreeMap, BTreeSet};

/// Rewards and advantages of one tree.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Judged {
    /// R1 of each trace.
    pub llm_rewards: Vec<Option<f64>>,
    /// Advantage of each trace over J; `None`: not trained on.
    pub llm: Vec<Option<f64>>,
    /// R2 of each leaf of each trace.
    pub dit_rewards: Vec<Vec<Option<f64>>>,
    /// Advantage of each leaf over K; `None`: not trained on.
    pub dit: Vec<Vec<Option<f64>>>,
}

impl Judged {
    fn teaches(&self) -> bool {
        self.llm.iter().any(Option::is_some) || self.dit.iter().flatten().any(Option::is_some)
    }
}

/// Rewards and advantages of every tree of an iteration that was not given up.
///
/// All of an iteration is judged together because a batch-wide scale needs all rewards.
pub fn judge(state: &State, spec: &RunSpec, iteration: u32) -> BTreeMap<TreeId, Judged> {
    let gates = state.gates(spec, iteration);
    let trees: Vec<(&TreeId, &Tree)> =
        state.trees.range(iteration_range(iteration)).filter(|(_, t)| !given_up(t)).collect();
    let rewards: Vec<TreeRewards> = trees.iter().map(|(_, tree)| tree.rewards(spec)).collect();

    let by_component = |name: &str| -> Vec<TreeRewards> {
        trees
            .iter()
            .zip(&rewards)
            .map(|((_, tree), whole)| tree.component(spec, whole, name))
            .collect()
    };

    let llm_groups =
        |rewards: &[TreeRewards]| -> Groups { rewards.iter().map(|r| r.llm.clone()).collect() };
    let llm = gated(gates.llm, &llm_groups(&rewards), || {
        compare(&spec.llm_advantage, &spec.reward.llm, &rewards, llm_groups, by_component)
    });

    let dit_groups = |rewards: &[TreeRewards]| -> Groups {
        match spec.dit_advantage.group {
            GroupKey::Trace => rewards.iter().flat_map(|r| r.dit.iter().cloned()).collect(),
            GroupKey::Tree => rewards.iter().map(|r| r.dit.concat()).collect(),
        }
    };
    let dit = gated(gates.dit, &dit_groups(&rewards), || {
        compare(&spec.dit_advantage, &spec.reward.dit, &rewards, dit_groups, by_component)
    });
    let mut dit = dit.into_iter().flatten();

    let mut judged = BTreeMap::new();
    for (((id, _), reward), llm) in trees.iter().zip(rewards).zip(llm) {
        let dit =
            reward.dit.iter().map(|leaves| dit.by_ref().take(leaves.len()).collect()).collect();
        let tree = Judged { llm_rewards: reward.llm, llm, dit_rewards: reward.dit, dit };
        judged.insert(**id, tree);
    }
    judged
}

/// Members of groups that are compared with one another.
type Groups = Vec<Vec<Option<f64>>>;

/// Advantages of a branch in the configured order of summing and normalising.
fn compare(
    advantage: &AdvantageSpec,
    mix: &Mix,
    rewards: &[TreeRewards],
    groups: impl Fn(&[TreeRewards]) -> Groups,
    by_component: impl Fn(&str) -> Vec<TreeRewards>,
) -> Groups {
    match advantage.combine {
        Combine::SumThenNormalise => advantages(advantage, &groups(rewards)),
        Combine::NormaliseThenSum => {
            let parts: Vec<(f64, Groups)> =
                mix.iter().map(|(name, weight)| (*weight, groups(&by_component(name)))).collect();
            advantages_by_component(advantage, &parts)
        }
    }
}

fn gated(
    gate: f64,
    groups: &[Vec<Option<f64>>],
    open: impl FnOnce() -> Vec<Vec<Option<f64>>>,
) -> Vec<Vec<Option<f64>>> {
    if gate != 0.0 { open() } else { groups.iter().map(|g| vec![None; g.len()]).collect() }
}

fn given_up(tree: &Tree) -> bool {
    matches!(tree.fate, Some(super::record::Fate::Failed(_)))
}

/// The trees of an iteration that have something to teach.
pub fn trainable(state: &State, spec: &RunSpec, iteration: u32) -> BTreeSet<TreeId> {
    let judged = judge(state, spec, iteration);
    judged.into_iter().filter(|(_, tree)| tree.teaches()).map(|(id, _)| id).collect()
}

/// The batch of an optimiser step, in tree order: the same for a first run and for a replay.
pub fn batch(
    state: &State,
    spec: &RunSpec,
    prompts: &[PromptRow],
    iteration: u32,
) -> Vec<TrainTree> {
    let judged = judge(state, spec, iteration);
    let teaching = judged.iter().filter(|(_, tree)| tree.teaches());
    teaching
        .filter_map(|(id, judged)| {
            let tree = state.trees.get(id)?;
            let traces = (0u32..).zip(&tree.subtrees).map(|(trace, subtree)| {
                let leaf_advantages = judged.dit[trace as usize].clone();
                let rendered = leaf_advantages.iter().any(Option::is_some);
                TrainTrace {
                    trace,
                    artifact: subtree.trace.artifact.clone(),
                    advantage: judged.llm[trace as usize],
                    render: if rendered { subtree.render.clone() } else { None },
                    leaf_advantages,
                }
            });
            let prompt = prompts.get(tree.row)?.clone();
            Some(TrainTree { id: *id, prompt, traces: traces.collect() })
        })
        .collect()
}
