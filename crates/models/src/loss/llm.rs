//! Losses of the language model over the tokens of its answers.

use super::{Loss, clipped, share};
use crate::error::{ModelError, Result};
use crate::logprob::TokenLogProbs;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// Differences of log-probabilities are clamped to this before they are exponentiated (verl).
const MAX_LOG_RATIO: f64 = 20.0;

/// What is optimised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LlmObjective {
    /// PPO's clipped ratio per token (arXiv 1707.06347); `dual` bounds the loss of a negative
    /// advantage by `-A dual` (arXiv 1912.09729), usually 3.
    Ppo {
        /// epsilon below one.
        clip_low: f64,
        /// epsilon above one; larger than `clip_low` in DAPO (arXiv 2503.14476).
        clip_high: f64,
        /// Bound for negative advantages.
        dual: Option<f64>,
    },
    /// The ratio of whole sequences, a geometric mean over tokens (arXiv 2507.18071).
    Gspo {
        /// epsilon below one.
        clip_low: f64,
        /// epsilon above one.
        clip_high: f64,
    },
    /// `-sg(min(ratio, max)) A log p` (MiniMax-M1, arXiv 2506.13585).
    Cispo {
        /// Upper clamp of the ratio.
        max: f64,
    },
}

/// How token losses become one number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Aggregation {
    /// Mean over all tokens of the global batch (DAPO).
    TokenMean,
    /// Mean over sequences of the mean over tokens (GRPO, arXiv 2402.03300).
    SequenceMeanTokenMean,
    /// Sum over tokens, divided by sequences times a constant length (Dr. GRPO, arXiv 2503.20783).
    Constant {
        /// The constant, usually the token limit.
        length: f64,
    },
}

/// Estimators of the divergence from the reference, by J. Schulman's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KlEstimator {
    /// `log p - log p_ref`.
    K1,
    /// Half its square.
    K2,
    /// `e^d - d - 1` with `d = log p_ref - log p`.
    K3,
}

/// A penalty on the divergence from the reference policy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kl {
    /// Its weight.
    pub coefficient: f64,
    /// The estimator.
    pub estimator: KlEstimator,
    /// Value of the estimator, but the gradient of K2, which is unbiased (verl's `+` forms).
    pub straight_through: bool,
}

/// The whole loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LlmLoss {
    /// What is optimised.
    pub objective: LlmObjective,
    /// How it is averaged.
    pub aggregation: Aggregation,
    /// The penalty, if any.
    pub kl: Option<Kl>,
    /// Truncated importance sampling: tokens are weighed by `min(p_trainer / p_rollout, this)` where
    /// the rollout's log-probabilities are not the trainer's own.
    pub importance_cap: Option<f64>,
}

/// Counts over the global batch that the loss is divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LlmTotals {
    /// Tokens that are trained on.
    pub tokens: f64,
    /// Answers that are trained on.
    pub sequences: f64,
}

/// Counts of answers of these lengths, all ranks and micro-batches together.
pub fn llm_totals(lengths: impl IntoIterator<Item = u32>) -> LlmTotals {
    lengths.into_iter().fold(LlmTotals::default(), |sum, length| LlmTotals {
        tokens: sum.tokens + f64::from(length),
        sequences: sum.sequences + 1.0,
    })
}

/// A micro-batch: some answers, every tensor `[N]` over all their tokens, answer after answer.
#[derive(Clone, Copy, Debug)]
pub struct LlmBatch<'a> {
    /// Under the policy that is trained, with gradient.
    pub new: &'a TokenLogProbs,
    /// Under the policy before the update.
    pub old: &'a Tensor,
    /// As the rollout worker computed them, where that is another thing than `old`.
    pub rollout: Option<&'a Tensor>,
    /// Under the reference policy; needed for a penalty.
    pub reference: Option<&'a Tensor>,
    /// Advantage of each answer; `None`: not trained on, and not counted in the totals.
    pub advantages: &'a [Option<f64>],
}

/// The loss of a micro-batch.
///
/// # Errors
/// When tensors or advantages do not fit the answers, or a reference is missing.
pub fn llm_loss(loss: &LlmLoss, batch: &LlmBatch<'_>, totals: LlmTotals) -> Result<Loss> {
    check(loss, batch, totals)?;
    let new = &batch.new.values;
    let token = |values: Vec<f64>| {
        let values = Tensor::from_slice(&values).to_kind(Kind::Float).to_device(new.device());
        let lengths = Tensor::from_slice(&batch.new.lengths).to_device(new.device());
        values.repeat_interleave_self_tensor(&lengths, 0, None)
    };
    let advantage = token(batch.advantages.iter().map(|a| a.unwrap_or(0.0)).collect());
    let lengths = batch.new.lengths.iter().map(|length| *length as f64);
    let trained = batch.advantages.iter().map(|a| f64::from(u8::from(a.is_some())));
    let weigh = |(length, trained): (f64, f64)| match loss.aggregation {
        Aggregation::TokenMean => trained / totals.tokens,
        Aggregation::SequenceMeanTokenMean => trained / (totals.sequences * length),
        Aggregation::Constant { length } => trained / (totals.sequences * length),
    };
    let weights = token(lengths.zip(trained.clone()).map(weigh).collect());
    let counts = token(trained.map(|trained| trained / totals.tokens).collect());

    let delta = (new - batch.old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
    let mut per_token = objective(loss.objective, batch, &delta, &advantage);
    if let (Some(cap), Some(rollout)) = (loss.importance_cap, batch.rollout) {
        let gap = (batch.old - rollout).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
        per_token = gap.exp().clamp_max(cap).detach() * per_token;
    }
    let mut metrics = watch(loss.objective, &delta.detach(), &advantage, &counts);
    if let (Some(kl), Some(reference)) = (loss.kl, batch.reference) {
        let penalty = divergence(kl, new, reference);
        metrics.insert("kl", share(&penalty.detach(), &counts));
        per_token = penalty * kl.coefficient + per_token;
    }
    if let Some(entropy) = &batch.new.entropy {
        metrics.insert("entropy", share(entropy, &counts));
    }
    Ok(Loss { value: (per_token * weights).sum(Kind::Float), metrics })
}

fn objective(
    objective: LlmObjective,
    batch: &LlmBatch<'_>,
    delta: &Tensor,
    advantage: &Tensor,
) -> Tensor {
    match objective {
        LlmObjective::Ppo { clip_low, clip_high, dual } => {
            let loss = clipped(&delta.exp(), advantage, clip_low, clip_high);
            match dual {
                Some(bound) => {
                    let bounded = loss.minimum(&(-(advantage * bound)));
                    bounded.where_self(&advantage.lt(0.0), &loss)
                }
                None => loss,
            }
        }
        LlmObjective::Gspo { clip_low, clip_high } => {
            let parts = delta.split_with_sizes(batch.new.lengths.as_slice(), 0);
            let means: Vec<Tensor> =
                parts.iter().map(|part| part.mean(Kind::Float).detach().expand_as(part)).collect();
            let new = &batch.new.values;
            let ratio = (Tensor::cat(&means, 0) + new - new.detach()).exp();
            clipped(&ratio, advantage, clip_low, clip_high)
        }
        LlmObjective::Cispo { max } => {
            -(delta.exp().clamp_max(max).detach() * advantage * &batch.new.values)
        }
    }
}

/// Per-token divergence from the reference.
fn divergence(kl: Kl, new: &Tensor, reference: &Tensor) -> Tensor {
    let gap = new - reference;
    let square = || gap.square() * 0.5;
    let value = match kl.estimator {
        KlEstimator::K1 => gap.shallow_clone(),
        KlEstimator::K2 => square(),
        KlEstimator::K3 => {
            let d = (-&gap).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
            (d.exp() - d - 1.0).clamp(-10.0, 10.0)
        }
    };
    match kl.straight_through {
        true => {
            let carrier = square();
            &carrier - carrier.detach() + value.detach()
        }
        false => value,
    }
}

fn watch(
    objective: LlmObjective,
    delta: &Tensor,
    advantage: &Tensor,
    counts: &Tensor,
) -> BTreeMap<&'static str, f64> {
    let ratio = delta.exp();
    let (low, high) = match objective {
        LlmObjective::Ppo { clip_low, clip_high, .. }
        | LlmObjective::Gspo { clip_low, clip_high } => (1.0 - clip_low, 1.0 + clip_high),
        LlmObjective::Cispo { max } => (0.0, max),
    };
    let below = ratio.lt(low).logical_and(&advantage.lt(0.0));
    let above = ratio.gt(high).logical_and(&advantage.gt(0.0));
    BTreeMap::from([
        ("ratio", share(&ratio, counts)),
        ("approx_kl", share(&(delta.square() * 0.5), counts)),
        ("clip_ratio/low_mean", share(&below, counts)),
        ("clip_ratio/high_mean", share(&above, counts)),
    ])
}

fn check(loss: &LlmLoss, batch: &LlmBatch<'_>, totals: LlmTotals) -> Result<()> {
    let tokens: i64 = batch.new.lengths.iter().sum();
    let all = [Some(&batch.new.values), Some(batch.old), batch.rollout, batch.reference];
    let fits = all.iter().flatten().all(|tensor| tensor.size() == [tokens])
        && batch.advantages.len() == batch.new.lengths.len();
    let bad = |reason: &str| Err(ModelError::BadInput(reason.to_owned()));
    if !fits {
        return bad("log-probabilities and advantages do not fit the answers' lengths");
    }
    if totals.tokens <= 0.0 || totals.sequences <= 0.0 {
        return bad("the global batch has no tokens to train on");
    }
    if loss.kl.is_some() && batch.reference.is_none() {
        return bad("a kl penalty needs the reference policy's log-probabilities");
    }
    match batch.advantages.iter().flatten().all(|advantage| advantage.is_finite()) {
        true => Ok(()),
        false => Err(ModelError::NotFinite { what: "an advantage", place: String::new() }),
    }
}
