//! What a run's configuration says to the engine, in the engine's own words.

use super::gradient::Sharing;
use duet_core::Seed;
use duet_models::lora::LoraConfig;
use duet_models::loss::{DitLoss, LlmLoss, NftLoss};
use duet_models::pipeline::LoadOptions;
use duet_models::render::RenderOptions;
use duet_torch::optim::AdamWOptions;
use std::path::PathBuf;

/// How one of the two models is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct BranchSettings {
    /// Learning rate.
    pub lr: f64,
    /// Constants of AdamW.
    pub adamw: AdamWOptions,
    /// Train an adapter; `None`: all weights.
    pub lora: Option<LoraConfig>,
    /// Decay of the moving average of the trained weights; zero: none.
    pub ema: f64,
    /// Which policy samples.
    pub old: OldPolicy,
    /// Never trained in this run: no gradients, no optimiser.
    pub frozen: bool,
}

/// How the policy that samples follows the one that is trained: after optimiser step n,
/// `old = d old + (1 - d) trained` (DiffusionNFT's `return_decay`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OldPolicy {
    /// It is the trained one.
    #[default]
    Trained,
    /// `d = min(n / 1000, 0.5)`.
    Rising,
    /// `d = 0` before step 75, then `min(0.0075 (n - 75), 0.999)`.
    Late,
}

impl OldPolicy {
    /// d after optimiser step `step`.
    pub fn decay(self, step: u64) -> f64 {
        match self {
            OldPolicy::Trained => 0.0,
            OldPolicy::Rising => (0.001 * step as f64).min(0.5),
            OldPolicy::Late => (0.0075 * step.saturating_sub(75) as f64).min(0.999),
        }
    }
}

/// DiffusionNFT.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nft {
    /// The loss.
    pub loss: NftLoss,
    /// Times of the rollout's schedule that each image is noised at.
    pub times: u32,
}

/// Everything the engine needs to know of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The base model's pipeline folder.
    pub model: PathBuf,
    /// Where and as what it is loaded.
    pub load: LoadOptions,
    /// The run's root seed; adapters start from it.
    pub seed: Seed,
    /// Temperature of the traces.
    pub temperature: f64,
    /// How images were sampled.
    pub render: RenderOptions,
    /// The language model's optimiser.
    pub llm: BranchSettings,
    /// The language model's loss.
    pub llm_loss: LlmLoss,
    /// The transformer's optimiser.
    pub dit: BranchSettings,
    /// The transformer's loss on windows.
    pub dit_loss: DitLoss,
    /// The transformer's loss on noised images, in place of that on windows.
    pub nft: Option<Nft>,
    /// Gradients of each branch are scaled down to this L2 norm.
    pub max_grad_norm: f64,
    /// Optimiser steps on each iteration's trees.
    pub updates: u32,
    /// Activations are computed again in the backward pass instead of kept.
    pub recompute: bool,
    /// How gradients are summed over ranks.
    pub sharing: Sharing,
    /// Ranks talk through NCCL, on this CUDA device; `None`: through Gloo.
    pub nccl: Option<usize>,
}
