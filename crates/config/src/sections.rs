//! The sections that say what is learned and how. Every field has its default stated; what is marked *required*
//! has none.

use duet_core::reward::Mix;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

pub use crate::processes::{
    Checkpoint, Collective, Coordinator, Device, Evaluation, Reduce, Security, Tls, Trainer,
    Workers,
};

/// Reward components that the built-in scorers know.
pub const COMPONENTS: [&str; 3] = ["semantic", "aesthetic", "consistency"];

/// `[run]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Run {
    /// Names the run and its folder. Default `run`.
    pub name: String,
    /// Everything random follows from it. Default 1.
    pub seed: u64,
    /// Optimiser steps to take. Default 100.
    pub iterations: u32,
    /// Where everything durable lies: a folder or an object-store URL. Default `runs/<name>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,
}

impl Default for Run {
    fn default() -> Self {
        Run { name: "run".to_owned(), seed: 1, iterations: 100, store: None }
    }
}

/// A base model of the built-in small world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bootstrap {
    /// Good enough to be taught: minutes.
    Demo,
    /// Just enough for tests: seconds.
    Test,
}

/// What models compute in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dtype {
    /// 32 bits.
    #[default]
    Float32,
    /// Brain floating point; trained parameters and their moments stay in 32 bits.
    Bfloat16,
}

/// `[model]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// Pipeline folder as diffusers has it. *Required* without `bootstrap`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Make the base model when it is not there: `demo` or `test`. Its folder is `path`, by default
    /// `runs/base/<profile>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bootstrap: Option<Bootstrap>,
    /// What models compute in. Default `float32`.
    pub dtype: Dtype,
}

/// `[data]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// Training prompts: one JSON object a line, `{"prompt": "...", "meta": ...}`. *Required* without
    /// `model.bootstrap`, which brings its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts: Option<PathBuf>,
}

/// How a denoising step inside the window injects noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampler {
    /// arXiv 2505.05470.
    FlowGrpo,
    /// Coefficients-preserving, arXiv 2509.05952.
    Cps,
    /// DanceGRPO, arXiv 2505.07818.
    Dance,
}

/// `[rollout]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rollout {
    /// P: prompts, and so trees, of an iteration. Default 8.
    pub prompts_per_iteration: u32,
    /// J: chains of thought of a prompt. Default 4.
    pub traces: u32,
    /// K: images of a chain of thought. Default 4.
    pub images_per_trace: u32,
    /// Logits are divided by it, in rollout and trainer alike. Default 1.
    pub temperature: f64,
    /// Most tokens of a chain of thought. Default 256.
    pub max_new_tokens: u32,
    /// Denoising steps. Default 10.
    pub steps: u32,
    /// True classifier-free guidance, in rollout and trainer alike; 1: none. Default 4.
    pub guidance_scale: f64,
    /// `a` of the sampler (`eta` of `dance`). Default 1.2.
    pub noise_level: f64,
    /// How the window's steps inject noise. Default `flow-grpo`.
    pub sampler: Sampler,
    /// Pixels, a multiple of 16. Default 512.
    pub width: u32,
    /// Pixels, a multiple of 16. Default 512.
    pub height: u32,
    /// Dynamic sampling: an iteration with fewer than P trees to learn from gets more prompts, at most
    /// so many; 0: none. Default 0.
    pub extra_prompts: u32,
    /// L: trees of iteration i are sampled with version i - L exactly. Default 0.
    pub lag: u32,
    /// A text file with what the LLM is told before the prompt. Default: as the model folder says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instruction: Option<PathBuf>,
}

impl Default for Rollout {
    fn default() -> Self {
        Rollout {
            prompts_per_iteration: 8,
            traces: 4,
            images_per_trace: 4,
            temperature: 1.0,
            max_new_tokens: 256,
            steps: 10,
            guidance_scale: 4.0,
            noise_level: 1.2,
            sampler: Sampler::FlowGrpo,
            width: 512,
            height: 512,
            extra_prompts: 0,
            lag: 0,
            instruction: None,
        }
    }
}

/// Something that scores images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scorer {
    /// The small world's own networks: `semantic`, `aesthetic`, `consistency`.
    Miniworld,
    /// A server of the user's: components as `[reward.http]` lists them.
    Http,
}

/// `[reward.http]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpScorer {
    /// Where it listens. *Required*.
    pub url: String,
    /// What it gives for each image. *Required*.
    pub components: Vec<String>,
    /// Components that are judged against the refined prompt; the others are against the raw one.
    /// Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refined: Vec<String>,
    /// The environment variable that holds a bearer token for it. Default: none is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_env: Option<String>,
}

/// `[reward]`, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Reward {
    /// Who scores.
    pub scorers: Vec<Scorer>,
    /// The server, if there is one.
    pub http: Option<HttpScorer>,
    /// A component that takes longer counts as missing.
    pub timeout_ms: u64,
    /// Weights of R1, the LLM's reward.
    pub llm: Mix,
    /// Weights of R2, the DiT's reward.
    pub dit: Mix,
    /// What missing scores do.
    pub failure: duet_core::reward::FailurePolicy,
    /// What the form of an answer does to R1.
    pub shape: duet_core::reward::TraceShape,
}

/// `[llm.lora]`, `[dit.lora]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// Rank. *Required*.
    pub rank: u32,
    /// The adapter is scaled by alpha / rank. *Required*.
    pub alpha: f64,
    /// Layers: whole names, or what names end with after a dot. *Required*.
    pub targets: Vec<String>,
}

/// AdamW, as PyTorch computes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimizer {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled.
    pub weight_decay: f64,
}

/// What both branches have.
#[derive(Clone, Debug, PartialEq)]
pub struct Branch {
    /// How it steps.
    pub optimizer: Optimizer,
    /// Train an adapter; `None`: all weights.
    pub lora: Option<Lora>,
}

/// What the LLM branch optimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LlmObjective {
    /// Clipped ratio per token.
    Ppo,
    /// Ratio of whole sequences (arXiv 2507.18071).
    Gspo,
    /// Clipped weights on log-probabilities (arXiv 2506.13585).
    Cispo,
}

/// How token losses are averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregation {
    /// Over all tokens of the iteration (DAPO).
    TokenMean,
    /// Over sequences, of means over tokens (GRPO).
    SequenceMean,
    /// Sum over tokens by sequences times `llm.aggregation_length` (Dr. GRPO).
    Constant,
}

/// Estimators of a divergence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlEstimator {
    /// `log p - log p_ref`.
    K1,
    /// Half its square.
    K2,
    /// `e^d - d - 1`, `d = log p_ref - log p`.
    K3,
}

/// `[llm]`, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Llm {
    /// Optimiser and adapter.
    pub branch: Branch,
    /// What is optimised.
    pub objective: LlmObjective,
    /// epsilon below one.
    pub clip_low: f64,
    /// epsilon above one.
    pub clip_high: f64,
    /// Bound for negative advantages (PPO); `None`: none.
    pub dual_clip: Option<f64>,
    /// Largest weight (CISPO).
    pub cispo_max: f64,
    /// How token losses are averaged.
    pub aggregation: Aggregation,
    /// The constant of [`Aggregation::Constant`].
    pub aggregation_length: u32,
    /// Weight of the divergence from the base model; zero: none.
    pub kl: f64,
    /// Its estimator.
    pub kl_estimator: KlEstimator,
    /// Value of the estimator, gradient of K2.
    pub kl_straight_through: bool,
    /// Truncated importance sampling; `None`: none.
    pub importance_cap: Option<f64>,
}

/// What the DiT branch optimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DitObjective {
    /// Clipped ratio (Flow-GRPO).
    Clip,
    /// GRPO-Guard (arXiv 2510.22319).
    Guard,
    /// Flow-DPPO: samples that moved too far are dropped.
    Dppo,
    /// DiffusionNFT (arXiv 2509.16117): on noised images, without a likelihood; sampling is the plain
    /// ODE, and there is no window.
    Nft,
}

/// How the policy that samples for `nft` follows the one that is trained: after optimiser step n,
/// `old = d old + (1 - d) trained` (DiffusionNFT's `return_decay`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NftOld {
    /// It is the trained one: d = 0 (decay type 0).
    #[default]
    Trained,
    /// d = min(n / 1000, 0.5) (decay type 1).
    Rising,
    /// d = 0 before step 75, then min(0.0075 (n - 75), 0.999) (decay type 2).
    Late,
}

/// The DiT's divergence from the base model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DitKl {
    /// Of the Gaussians of a step, per dimension.
    Exact,
    /// As Flow-GRPO's code has it, without `|dt|`.
    FlowGrpo,
}

/// `[dit]`, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Dit {
    /// Optimiser and adapter.
    pub branch: Branch,
    /// What is optimised.
    pub objective: DitObjective,
    /// epsilon of `clip` and `guard`.
    pub clip_range: f64,
    /// Largest divergence of `dppo`.
    pub dppo_limit: f64,
    /// beta of `nft`.
    pub nft_beta: f64,
    /// Times that each image is noised at for `nft`.
    pub nft_times: u32,
    /// Which policy samples for `nft`.
    pub nft_old: NftOld,
    /// Advantages are clamped to this on both sides.
    pub adv_clip: f64,
    /// Weight of the divergence from the base model; zero: none.
    pub kl: f64,
    /// Which divergence.
    pub kl_kind: DitKl,
}

/// Weights by component, as written.
pub(crate) type RawMix = BTreeMap<String, f64>;
