//! Policy losses. Every normaliser is an argument, counted over the global batch, so the sum of the
//! losses of micro-batches and ranks is the loss of the whole batch, however it was cut.

mod dit;
mod llm;
mod nft;

pub use dit::{DitBatch, DitKl, DitLoss, DitObjective, dit_loss};
pub use llm::{
    Aggregation, Kl, KlEstimator, LlmBatch, LlmLoss, LlmObjective, LlmTotals, llm_loss, llm_totals,
};
pub use nft::{NftBatch, NftLoss, nft_loss, nft_reward};

use std::collections::BTreeMap;
use tch::Tensor;

/// A loss and what is worth watching of it.
#[derive(Debug)]
pub struct Loss {
    /// Scalar with gradient; this micro-batch's share of the global loss.
    pub value: Tensor,
    /// Shares of global means: add them up over micro-batches and ranks. TRL's names where TRL has
    /// one.
    pub metrics: BTreeMap<&'static str, f64>,
}

/// `min(ratio A, clip(ratio) A)` as a loss: `max(-A ratio, -A clip(ratio, 1 - low, 1 + high))`.
pub(crate) fn clipped(ratio: &Tensor, advantage: &Tensor, low: f64, high: f64) -> Tensor {
    let raw = -(advantage * ratio);
    raw.maximum(&-(advantage * ratio.clamp(1.0 - low, 1.0 + high)))
}

/// Weighted sum as a number.
pub(crate) fn share(values: &Tensor, weights: &Tensor) -> f64 {
    (values.to_kind(tch::Kind::Float) * weights).sum(tch::Kind::Double).double_value(&[])
}
