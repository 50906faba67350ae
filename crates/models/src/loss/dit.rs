//! Losses of the transformer over the window steps of its leaves.

use super::{Loss, clipped, share};
use crate::error::{ModelError, Result};
use crate::render::Replay;
use crate::sde::{Coefficients, mean_square};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// What is optimised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DitObjective {
    /// Clipped ratio of each step (Flow-GRPO, arXiv 2505.05470). The ratio is one per latent
    /// dimension, geometrically averaged, so the range is 1e-4 rather than 0.2.
    Clip {
        /// epsilon.
        range: f64,
    },
    /// GRPO-Guard (arXiv 2510.22319): log-ratios re-centred and scaled alike over the steps,
    /// gradients re-weighted by the step size.
    Guard {
        /// epsilon.
        range: f64,
    },
    /// Flow-DPPO: no clip, but a sample that has moved further than `limit` and moves on is
    /// dropped.
    Dppo {
        /// Largest divergence per dimension.
        limit: f64,
    },
}

/// The divergence from the reference policy that is penalised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DitKl {
    /// Between the transitions' Gaussians, per dimension: `(mu - mu_ref)^2 / (2 std^2 |dt|)`.
    Exact {
        /// Its weight.
        coefficient: f64,
    },
    /// As Flow-GRPO's code has it, without `|dt|`.
    FlowGrpo {
        /// Its weight.
        coefficient: f64,
    },
}

/// The whole loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DitLoss {
    /// What is optimised.
    pub objective: DitObjective,
    /// Advantages are clamped to this on both sides.
    pub advantage_clip: f64,
    /// The penalty, if any.
    pub kl: Option<DitKl>,
}

/// Some steps of the K leaves of one trace.
#[derive(Clone, Copy, Debug)]
pub struct DitBatch<'a> {
    /// Under the policy that is trained, with gradient.
    pub new: &'a Replay,
    /// Log-probabilities before the update, `[K, steps]`.
    pub old: &'a Tensor,
    /// Means before the update, one `[K, S, C]` per step; `None`: the update starts here, so they are
    /// the present ones.
    pub old_means: Option<&'a [Tensor]>,
    /// Means of the reference policy; needed for a penalty.
    pub reference_means: Option<&'a [Tensor]>,
    /// Advantage of each leaf; `None`: not trained on, and not counted.
    pub advantages: &'a [Option<f64>],
}

/// The loss of these steps. `terms` is the number of trained (leaf, step) pairs in the global batch.
///
/// # Errors
/// When sizes do not fit, a reference is missing, or a step has no noise and so no ratio.
pub fn dit_loss(loss: &DitLoss, batch: &DitBatch<'_>, terms: f64) -> Result<Loss> {
    check(loss, batch, terms)?;
    let device = batch.old.device();
    let column =
        |values: Vec<f64>| Tensor::from_slice(&values).to_kind(Kind::Float).to_device(device);
    let bound = loss.advantage_clip;
    let advantages = batch.advantages.iter().map(|a| a.unwrap_or(0.0).clamp(-bound, bound));
    let advantage = column(advantages.collect());
    let counted = batch.advantages.iter().map(|a| if a.is_some() { 1.0 / terms } else { 0.0 });
    let weights = column(counted.collect());
    let mut total = Tensor::zeros([], (Kind::Float, device));
    let mut metrics = BTreeMap::new();
    for (index, c) in batch.new.coefficients.iter().enumerate() {
        let column = index as i64;
        let delta = batch.new.log_probs.select(1, column) - batch.old.select(1, column);
        let mean = &batch.new.means[index];
        let old_mean = batch.old_means.map_or_else(|| mean.detach(), |old| old[index].detach());
        let step = Step { c, delta, mean, old_mean, advantage: &advantage };
        let mut per_leaf = step.loss(loss.objective);
        step.watch(loss.objective, &weights, &mut metrics);
        if let (Some(kl), Some(reference)) = (loss.kl, batch.reference_means) {
            let (penalty, coefficient) = divergence(kl, c, mean, &reference[index]);
            *metrics.entry("kl").or_insert(0.0) += share(&penalty.detach(), &weights);
            per_leaf = penalty * coefficient + per_leaf;
        }
        total = (per_leaf * &weights).sum(Kind::Float) + total;
    }
    Ok(Loss { value: total, metrics })
}

struct Step<'a> {
    c: &'a Coefficients,
    /// Log-ratio of each leaf.
    delta: Tensor,
    mean: &'a Tensor,
    old_mean: Tensor,
    advantage: &'a Tensor,
}

impl Step<'_> {
    /// Mean over dimensions of `(mu - mu_old)^2 / (2 s^2)`, per leaf.
    fn moved(&self) -> Tensor {
        mean_square(&(self.mean - &self.old_mean)) * (0.5 / (self.c.noise * self.c.noise))
    }

    fn ratio(&self, objective: DitObjective) -> Tensor {
        match objective {
            DitObjective::Guard { .. } => ((&self.delta + self.moved()) * self.c.noise).exp(),
            _ => self.delta.exp(),
        }
    }

    fn loss(&self, objective: DitObjective) -> Tensor {
        let ratio = self.ratio(objective);
        match objective {
            DitObjective::Clip { range } => clipped(&ratio, self.advantage, range, range),
            DitObjective::Guard { range } => {
                clipped(&ratio, self.advantage, range, range) / -self.c.dt
            }
            DitObjective::Dppo { limit } => {
                let far = self.moved().detach().ge(limit);
                let up = ratio.gt(1.0).logical_and(&self.advantage.gt(0.0));
                let down = ratio.lt(1.0).logical_and(&self.advantage.lt(0.0));
                let keep = far.logical_and(&up.logical_or(&down)).logical_not();
                -(self.advantage * ratio * keep.to_kind(Kind::Float))
            }
        }
    }

    fn watch(
        &self,
        objective: DitObjective,
        weights: &Tensor,
        metrics: &mut BTreeMap<&'static str, f64>,
    ) {
        tch::no_grad(|| {
            let ratio = self.ratio(objective);
            let range = match objective {
                DitObjective::Clip { range } | DitObjective::Guard { range } => range,
                DitObjective::Dppo { .. } => f64::INFINITY,
            };
            let below = ratio.lt(1.0 - range).logical_and(&self.advantage.lt(0.0));
            let above = ratio.gt(1.0 + range).logical_and(&self.advantage.gt(0.0));
            for (name, values) in [
                ("approx_kl", self.delta.square() * 0.5),
                ("clip_ratio/low_mean", below),
                ("clip_ratio/high_mean", above),
                ("ratio", ratio),
            ] {
                *metrics.entry(name).or_insert(0.0) += share(&values, weights);
            }
        });
    }
}

fn divergence(kl: DitKl, c: &Coefficients, mean: &Tensor, reference: &Tensor) -> (Tensor, f64) {
    let (std, coefficient) = match kl {
        DitKl::Exact { coefficient } => (c.noise, coefficient),
        DitKl::FlowGrpo { coefficient } => (c.std, coefficient),
    };
    (mean_square(&(mean - reference.detach())) * (0.5 / (std * std)), coefficient)
}

fn check(loss: &DitLoss, batch: &DitBatch<'_>, terms: f64) -> Result<()> {
    let steps = batch.new.coefficients.len();
    let leaves = batch.advantages.len();
    let shape = [leaves as i64, steps as i64];
    let bad = |reason: &str| Err(ModelError::BadInput(reason.to_owned()));
    let lists = [batch.old_means, batch.reference_means];
    let fits = lists.iter().flatten().all(|means| means.len() == steps)
        && steps > 0
        && batch.old.size() == shape
        && batch.new.log_probs.size() == shape;
    if !fits {
        return bad("log-probabilities, means and advantages do not fit the steps");
    }
    if terms <= 0.0 {
        return bad("the global batch has no leaves to train on");
    }
    if loss.kl.is_some() && batch.reference_means.is_none() {
        return bad("a kl penalty needs the reference policy's means");
    }
    if !batch.new.coefficients.iter().all(Coefficients::is_random) {
        return bad(
            "a step without noise has no log-probability; raise noise_level or move the window",
        );
    }
    match batch.advantages.iter().flatten().all(|advantage| advantage.is_finite()) {
        true => Ok(()),
        false => Err(ModelError::NotFinite { what: "an advantage", place: String::new() }),
    }
}
