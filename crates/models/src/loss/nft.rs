//! DiffusionNFT (arXiv 2509.16117): a forward-process loss that needs no likelihood.

use super::{Loss, share};
use crate::error::{ModelError, Result};
use crate::sde::mean_square;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// Smallest weight that a reconstruction error is divided by.
const MIN_WEIGHT: f64 = 1e-5;

/// The loss' parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NftLoss {
    /// How far the implicit positive and negative policies lie from the old one.
    pub beta: f64,
    /// Advantages are clamped to this; the loss is scaled by it.
    pub advantage_clip: f64,
    /// Weight of `(v - v_ref)^2`.
    pub kl: f64,
}

/// Some noised samples at one time.
#[derive(Clone, Copy, Debug)]
pub struct NftBatch<'a> {
    /// Final latents of the rollout, `[B, S, C]`.
    pub clean: &'a Tensor,
    /// `(1 - t) clean + t noise`.
    pub noised: &'a Tensor,
    /// The time in (0, 1].
    pub time: f64,
    /// Velocity under the policy that is trained, with gradient.
    pub new: &'a Tensor,
    /// Velocity under the rollout's policy.
    pub old: &'a Tensor,
    /// Velocity under the reference policy; needed for a penalty.
    pub reference: Option<&'a Tensor>,
    /// Advantage of each sample.
    pub advantages: &'a [f64],
}

/// The advantage as the probability that a sample is good: `clamp(A / clip / 2 + 1 / 2, 0, 1)`.
pub fn nft_reward(advantage: f64, clip: f64) -> f64 {
    (advantage.clamp(-clip, clip) / clip / 2.0 + 0.5).clamp(0.0, 1.0)
}

/// The loss of these samples; `terms` is the number of (sample, time) pairs in the global batch.
///
/// # Errors
/// When sizes do not fit or a reference is missing.
pub fn nft_loss(loss: &NftLoss, batch: &NftBatch<'_>, terms: f64) -> Result<Loss> {
    let shape = batch.clean.size();
    let all = [Some(batch.noised), Some(batch.new), Some(batch.old), batch.reference];
    let fits = all.iter().flatten().all(|tensor| tensor.size() == shape)
        && batch.advantages.len() as i64 == shape[0]
        && terms > 0.0
        && loss.beta > 0.0;
    if !fits || (loss.kl != 0.0 && batch.reference.is_none()) {
        let reason = "velocities, latents and advantages do not fit, or a reference is missing";
        return Err(ModelError::BadInput(reason.to_owned()));
    }
    let old = batch.old.detach();
    let rewards: Vec<f64> =
        batch.advantages.iter().map(|a| nft_reward(*a, loss.advantage_clip)).collect();
    let reward = Tensor::from_slice(&rewards).to_kind(Kind::Float).to_device(old.device());
    let beta = loss.beta;
    let positive = error(batch, &(batch.new * beta + &old * (1.0 - beta)));
    let negative = error(batch, &(&old * (1.0 + beta) - batch.new * beta));
    let mixed = &reward * &positive + (reward.ones_like() - &reward) * &negative;
    let mut per_sample = mixed * (loss.advantage_clip / beta);
    let weights = reward.ones_like() / terms;
    let mut metrics = BTreeMap::from([
        ("nft/positive", share(&positive.detach(), &weights)),
        ("nft/negative", share(&negative.detach(), &weights)),
    ]);
    if let Some(reference) = batch.reference.filter(|_| loss.kl != 0.0) {
        let gap = mean_square(&(batch.new - reference.detach()));
        metrics.insert("kl", share(&gap.detach(), &weights));
        per_sample = gap * loss.kl + per_sample;
    }
    Ok(Loss { value: (per_sample * weights).sum(Kind::Float), metrics })
}

/// `mean (x0 - clean)^2` over dimensions, divided by the detached mean absolute error.
fn error(batch: &NftBatch<'_>, velocity: &Tensor) -> Tensor {
    let gap = batch.noised - velocity * batch.time - batch.clean;
    let weight = gap.detach().to_kind(Kind::Double).abs().flatten(1, -1);
    let weight = weight.mean_dim(1, false, Kind::Double).clamp_min(MIN_WEIGHT);
    mean_square(&gap) / weight.to_kind(Kind::Float)
}
