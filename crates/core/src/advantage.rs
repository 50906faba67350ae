//! Group-relative advantages (arXiv 2601.10332 eq. 11), with every convention of the field as a
//! named option.
//!
//! | system | centre | scale | ddof | eps |
//! |---|---|---|---|---|
//! | the paper | mean | group | unstated | none |
//! | Flow-GRPO `stat_tracking.py` | mean | group or batch | 0 | 1e-4 |
//! | verl `compute_grpo_outcome_advantage` | mean | group | 1 | 1e-6 |
//! | TRL `grpo_trainer.py` | mean | group, batch or none | 1 | 1e-4 |
//! | DanceGRPO, MixGRPO | mean | group | 1 | 1e-8 |
//! | NeMo-RL | leave-one-out | | | |

use serde::{Deserialize, Serialize};

/// What is subtracted from a reward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Center {
    /// The group's mean.
    Mean,
    /// The mean of the group's other members (RLOO).
    LeaveOneOut,
}

/// What a centred reward is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    /// The group's standard deviation plus eps.
    Group,
    /// The standard deviation over all rewards of the iteration plus eps (Flow-GRPO `global_std`).
    Batch,
    /// Nothing (Dr. GRPO).
    None,
}

/// Which leaves are compared with one another in the DiT branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupKey {
    /// The K leaves of one trace (paper, section 3.2).
    Trace,
    /// The J x K leaves of one tree.
    Tree,
}

/// In which order several reward components become one advantage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Combine {
    /// The weighted sum of components is the reward, and is normalised (the paper, Flow-GRPO).
    #[default]
    SumThenNormalise,
    /// Each component is normalised over the group, and the weighted sum of that is the advantage
    /// (DanceGRPO with several reward models; GDPO, arXiv 2601.05242): a component with a small
    /// spread counts as much as one with a large.
    NormaliseThenSum,
}

/// A convention for advantages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdvantageSpec {
    /// What is subtracted.
    pub center: Center,
    /// What is divided by.
    pub scale: Scale,
    /// Degrees of freedom taken off in the standard deviation: 0 (population) or 1 (sample).
    pub ddof: u32,
    /// Added to the standard deviation.
    pub eps: f64,
    /// Advantages are clipped to [-clip, clip]; zero: not at all.
    pub clip: f64,
    /// Groups with fewer scored members are not trained on.
    pub min_group: u32,
    /// The DiT branch's group.
    pub group: GroupKey,
    /// How several components become one advantage.
    #[serde(default)]
    pub combine: Combine,
}

impl Default for AdvantageSpec {
    /// The paper's formula, with Flow-GRPO's eps and clip where the paper is silent.
    fn default() -> Self {
        AdvantageSpec {
            center: Center::Mean,
            scale: Scale::Group,
            ddof: 0,
            eps: 1e-4,
            clip: 5.0,
            min_group: 2,
            group: GroupKey::Trace,
            combine: Combine::SumThenNormalise,
        }
    }
}

/// Spreads below this are rounding, not reward: such a group teaches nothing.
const NO_SPREAD: f64 = 1e-12;

/// Mean and standard deviation with `ddof`; `None` when there are too few numbers.
pub fn moments(values: &[f64], ddof: u32) -> Option<(f64, f64)> {
    let free = values.len().checked_sub(ddof as usize).filter(|free| *free > 0)?;
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    Some((mean, (squares / free as f64).sqrt()))
}

/// Advantages of several groups of one iteration.
///
/// `None` in the input is a missing reward. `None` in the output is a member that is not trained
/// on: missing, in a group smaller than `min_group` (a group of one has advantage zero, DU-7), or in
/// a group without spread, whose advantages would all be zero.
pub fn advantages(spec: &AdvantageSpec, groups: &[Vec<Option<f64>>]) -> Vec<Vec<Option<f64>>> {
    let all: Vec<f64> = groups.iter().flatten().flatten().copied().collect();
    let batch = moments(&all, spec.ddof).map(|(_, std)| std);
    groups.iter().map(|group| one_group(spec, group, batch)).collect()
}

/// Advantages of groups whose members have several components: [`Combine::NormaliseThenSum`].
///
/// `components` are the weights and rewards of each, all of the same shape. A component without
/// spread in a group adds nothing to it; where no component has any, the group teaches nothing.
pub fn advantages_by_component(
    spec: &AdvantageSpec,
    components: &[(f64, Vec<Vec<Option<f64>>>)],
) -> Vec<Vec<Option<f64>>> {
    let open = AdvantageSpec { clip: 0.0, ..*spec };
    let clip = if spec.clip > 0.0 { spec.clip } else { f64::INFINITY };
    let mut sums: Vec<Vec<Option<f64>>> = Vec::new();
    for (weight, groups) in components {
        let found = advantages(&open, groups);
        if sums.is_empty() {
            sums = found.iter().map(|group| vec![None; group.len()]).collect();
        }
        for (sum, one) in sums.iter_mut().flatten().zip(found.iter().flatten()) {
            if let Some(advantage) = one {
                *sum = Some(sum.unwrap_or(0.0) + weight * advantage);
            }
        }
    }
    for sum in sums.iter_mut().flatten() {
        *sum = sum.map(|value| value.clamp(-clip, clip));
    }
    sums
}

fn one_group(spec: &AdvantageSpec, group: &[Option<f64>], batch: Option<f64>) -> Vec<Option<f64>> {
    let values: Vec<f64> = group.iter().flatten().copied().collect();
    let nothing = || vec![None; group.len()];
    if values.len() < (spec.min_group.max(2)) as usize {
        return nothing();
    }
    let Some((mean, std)) = moments(&values, spec.ddof) else { return nothing() };
    if std <= NO_SPREAD * mean.abs().max(1.0) {
        return nothing();
    }
    let scale = match spec.scale {
        Scale::Group => std + spec.eps,
        Scale::Batch => batch.unwrap_or(std) + spec.eps,
        Scale::None => 1.0,
    };
    let n = values.len() as f64;
    let centred = |value: f64| match spec.center {
        Center::Mean => value - mean,
        Center::LeaveOneOut => value - (mean * n - value) / (n - 1.0),
    };
    let clip = if spec.clip > 0.0 { spec.clip } else { f64::INFINITY };
    group
        .iter()
        .map(|reward| reward.map(|value| (centred(value) / scale).clamp(-clip, clip)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(spec: AdvantageSpec, rewards: &[f64]) -> Vec<Option<f64>> {
        let group = rewards.iter().copied().map(Some).collect();
        advantages(&spec, &[group]).remove(0)
    }

    fn close(spec: AdvantageSpec, rewards: &[f64], expected: &[f64]) {
        for (got, want) in of(spec, rewards).iter().zip(expected) {
            assert!((got.unwrap() - want).abs() < 1e-6, "{got:?} is not {want}");
        }
    }

    /// Vectors computed with numpy and torch from the public formulas.
    #[test]
    fn the_four_public_standard_deviations() {
        let with = |ddof, eps| AdvantageSpec { ddof, eps, ..AdvantageSpec::default() };
        let r = [0.1, 0.2, 0.3, 0.4];
        let flow_grpo =
            [-1.3404418588533609, -0.4468139529511202, 0.4468139529511202, 1.340441858853361];
        close(with(0, 1e-4), &r, &flow_grpo);
        close(with(1, 1e-4), &r, &[-1.1609957004596456, -0.38699856681988176]);
        close(with(1, 1e-6), &r, &[-1.1618860039319383, -0.38729533464397936]);
        close(with(1, 1e-8), &r, &[-1.161894913862232, -0.387298304620744]);
        close(with(1, 1e-4), &[1.0, 3.0], &[-0.7070567847218314, 0.7070567847218314]);
    }

    /// More of the same: binary rewards under the four conventions.
    #[test]
    fn one_success_in_four() {
        let with = |ddof, eps| AdvantageSpec { ddof, eps, ..AdvantageSpec::default() };
        let r = [0.0, 0.0, 0.0, 1.0];
        let low = -0.577_216_966_641_197_4;
        close(with(0, 1e-4), &r, &[low, low, low, 1.731_650_899_923_592]);
        close(with(1, 1e-4), &r, &[-0.499_900_019_996, -0.499_900_019_996]);
        close(with(1, 1e-6), &r, &[-0.499_999_000_002, -0.499_999_000_002]);
        close(with(0, 1e-4), &[0.0, 2.0], &[-0.999_900_009_999, 0.999_900_009_999]);
    }

    /// verl-omni `test_flow_grpo_advantage_grouped_uids`: groups [1, 3] and [0, 2] without scale give
    /// -1, 1, -1, 1; verl `test_multi_trajectories_advantage_on_cpu.py`: groups do not mix.
    #[test]
    fn groups_do_not_mix() {
        let spec = AdvantageSpec { scale: Scale::None, ..AdvantageSpec::default() };
        let groups = [vec![Some(1.0), Some(3.0)], vec![Some(0.0), Some(2.0)]];
        let expected = vec![Some(-1.0), Some(1.0)];
        assert_eq!(advantages(&spec, &groups), [expected.clone(), expected]);
        let scaled = AdvantageSpec { scale: Scale::Batch, eps: 0.0, ..spec };
        let (_, std) = moments(&[1.0, 3.0, 0.0, 2.0], 0).unwrap();
        assert_eq!(advantages(&scaled, &groups)[1], [Some(-1.0 / std), Some(1.0 / std)]);
    }

    /// NeMo-RL `tests/unit/algorithms/test_utils.py`: rewards 1..6 in groups of three have the
    /// leave-one-out baselines 2.5, 2, 1.5, 5.5, 5, 4.5.
    #[test]
    fn leave_one_out_baselines() {
        let spec = AdvantageSpec {
            center: Center::LeaveOneOut,
            scale: Scale::None,
            ..AdvantageSpec::default()
        };
        close(spec, &[1.0, 2.0, 3.0], &[1.0 - 2.5, 0.0, 3.0 - 1.5]);
        close(spec, &[4.0, 5.0, 6.0], &[4.0 - 5.5, 0.0, 6.0 - 4.5]);
        let baseline = [0.3, 0.8 / 3.0, 0.7 / 3.0, 0.2];
        let rewards = [0.1, 0.2, 0.3, 0.4];
        let expected: Vec<f64> = rewards.iter().zip(baseline).map(|(r, b)| r - b).collect();
        close(spec, &rewards, &expected);
    }

    /// prime-rl's example of a tree advantage without scale: 1, 1, 0 gives 1/3, 1/3, -2/3.
    #[test]
    fn mean_only() {
        let spec = AdvantageSpec { scale: Scale::None, ..AdvantageSpec::default() };
        close(spec, &[1.0, 1.0, 0.0], &[1.0 / 3.0, 1.0 / 3.0, -2.0 / 3.0]);
    }

    /// Two components of very different spread count alike when each is normalised first, and hardly
    /// when the sum is.
    #[test]
    fn normalise_then_sum_weighs_components_alike() {
        let spec = AdvantageSpec { eps: 0.0, clip: 0.0, ..AdvantageSpec::default() };
        let some = |values: &[f64]| vec![values.iter().copied().map(Some).collect::<Vec<_>>()];
        let (large, small) = ([0.0, 10.0, 0.0, 10.0], [0.02, 0.0, 0.0, 0.02]);
        let parts = [(1.0, some(&large)), (1.0, some(&small))];
        let found = advantages_by_component(&spec, &parts).remove(0);
        let expected = [0.0, 0.0, -2.0, 2.0];
        for (got, want) in found.iter().zip(expected) {
            assert!((got.unwrap() - want).abs() < 1e-12, "{found:?}");
        }
        let still = [(1.0, some(&[1.0; 4])), (0.5, some(&small))];
        let found = advantages_by_component(&spec, &still).remove(0);
        assert_eq!(found, [Some(0.5), Some(-0.5), Some(-0.5), Some(0.5)]);
        let nothing = [(1.0, some(&[1.0; 4])), (1.0, some(&[3.0; 4]))];
        assert_eq!(advantages_by_component(&spec, &nothing), [vec![None; 4]]);
        let one = [(2.0, some(&large))];
        let plain = advantages(&spec, &one[0].1).remove(0);
        let twice: Vec<Option<f64>> = plain.iter().map(|a| a.map(|a| 2.0 * a)).collect();
        assert_eq!(advantages_by_component(&spec, &one), [twice]);
    }

    #[test]
    fn du_7_groups_of_one_and_groups_without_spread_teach_nothing() {
        let spec = AdvantageSpec::default();
        assert_eq!(of(spec, &[0.7]), [None]);
        assert_eq!(of(spec, &[0.5, 0.5, 0.5]), [None, None, None]);
        let missing = advantages(&spec, &[vec![Some(1.0), None]]);
        assert_eq!(missing, [vec![None, None]]);
    }

    /// The same by a loop over pairs, as verl's `test_core_algos_on_cpu.py` checks its vectorised
    /// forms: mean of the others, and the scaled mean, for any number of members.
    fn by_pairs(rewards: &[f64], i: usize) -> (f64, f64) {
        let n = rewards.len() as f64;
        let others: f64 = (0..rewards.len()).filter(|j| *j != i).map(|j| rewards[j]).sum();
        let mut square = 0.0;
        for a in rewards {
            for b in rewards {
                square += (a - b) * (a - b) / (2.0 * n * n);
            }
        }
        let mean = (others + rewards[i]) / n;
        (rewards[i] - others / (n - 1.0), (rewards[i] - mean) / (square.sqrt() + 1e-4))
    }

    proptest! {
        #[test]
        fn the_loop_over_pairs_agrees(rewards in proptest::collection::vec(-3.0..3.0f64, 2..12)) {
            let clip = 0.0;
            let scaled = of(AdvantageSpec { clip, ..AdvantageSpec::default() }, &rewards);
            prop_assume!(scaled[0].is_some());
            let (center, scale) = (Center::LeaveOneOut, Scale::None);
            let rloo = of(AdvantageSpec { center, scale, clip, ..AdvantageSpec::default() }, &rewards);
            for i in 0..rewards.len() {
                let (others, mean) = by_pairs(&rewards, i);
                prop_assert!((rloo[i].unwrap() - others).abs() < 1e-9);
                prop_assert!((scaled[i].unwrap() - mean).abs() < 1e-6);
            }
        }

        #[test]
        fn du_7_centred_groups_sum_to_zero_and_permute_with_their_members(
            rewards in proptest::collection::vec(-10.0..10.0f64, 2..20), shift in -5.0..5.0f64,
            beta in 0.01..100.0f64, turn in 0usize..20,
        ) {
            let spec = AdvantageSpec { eps: 0.0, clip: 0.0, ..AdvantageSpec::default() };
            let a = of(spec, &rewards);
            prop_assume!(a[0].is_some());
            let sum: f64 = a.iter().flatten().sum();
            prop_assert!(sum.abs() < 1e-7, "{sum}");
            let scaled: Vec<f64> = rewards.iter().map(|r| beta * r + shift).collect();
            for (x, y) in a.iter().zip(of(spec, &scaled)) {
                prop_assert!((x.unwrap() - y.unwrap()).abs() < 1e-6);
            }
            let mut turned = rewards.clone();
            let turn = turn % rewards.len();
            turned.rotate_left(turn);
            let mut expected = a.clone();
            expected.rotate_left(turn);
            for (x, y) in expected.iter().zip(of(spec, &turned)) {
                prop_assert!((x.unwrap() - y.unwrap()).abs() < 1e-9);
            }
        }
    }
}
