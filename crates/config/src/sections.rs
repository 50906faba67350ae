//! The sections of a configuration. Every field has its default stated; what is marked *required*
//! has none.

use duet_core::reward::Mix;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

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
    /// Advantages are clamped to this on both sides.
    pub adv_clip: f64,
    /// Weight of the divergence from the base model; zero: none.
    pub kl: f64,
    /// Which divergence.
    pub kl_kind: DitKl,
}

/// `[trainer]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Trainer {
    /// Data-parallel ranks. Default 1.
    pub world_size: u32,
    /// Gradients of each branch are scaled down to this L2 norm. Default 1.
    pub max_grad_norm: f64,
    /// Optimiser steps on each iteration's trees. Default 1.
    pub updates_per_rollout: u32,
    /// Gradients are summed over ranks in pieces of this many MiB. Default 25.
    pub bucket_mib: u32,
    /// A collective operation that takes longer has failed. Default 120000.
    pub collective_timeout_ms: u64,
}

impl Default for Trainer {
    fn default() -> Self {
        Trainer {
            world_size: 1,
            max_grad_norm: 1.0,
            updates_per_rollout: 1,
            bucket_mib: 25,
            collective_timeout_ms: 120_000,
        }
    }
}

/// Where models run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// A GPU.
    Cuda,
}

/// `[workers]`: what `duet launch` starts on this machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Workers {
    /// Rollout workers. Default 1.
    pub rollout: u32,
    /// Reward workers. Default 1.
    pub reward: u32,
    /// Threads of a worker's arithmetic; results depend on it. Default 1.
    pub threads: u32,
    /// Where models run. Default `cpu`.
    pub device: Device,
}

impl Default for Workers {
    fn default() -> Self {
        Workers { rollout: 1, reward: 1, threads: 1, device: Device::Cpu }
    }
}

/// `[coordinator]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Coordinator {
    /// Address and port; port 0 takes a free one. Default `127.0.0.1:0`.
    pub listen: String,
    /// Between two heartbeats of a worker. Default 1000.
    pub heartbeat_ms: u64,
    /// A worker not heard of for so long is lost. Default 15000.
    pub heartbeat_timeout_ms: u64,
    /// A request for work is answered after this at the latest. Default 10000.
    pub poll_ms: u64,
    /// For sampling the traces of a tree. Default 300000.
    pub think_ms: u64,
    /// For sampling the images of a trace. Default 300000.
    pub render_ms: u64,
    /// For scoring the images of a trace. Default 120000.
    pub score_ms: u64,
    /// For an optimiser step. Default 1800000.
    pub step_ms: u64,
    /// For forming a trainer group and restoring its state. Default 600000.
    pub rendezvous_ms: u64,
    /// Wait before the second try of a unit; doubles with each further one. Default 500.
    pub backoff_ms: u64,
    /// Longest such wait. Default 30000.
    pub backoff_max_ms: u64,
    /// Tries of a unit before its tree is given up. Default 5.
    pub max_attempts: u32,
    /// Failures in a row after which a worker gets no more work. Default 8.
    pub quarantine_after: u32,
    /// From the wish to stop to the end, checkpoint or not. Default 600000.
    pub stop_ms: u64,
}

impl Default for Coordinator {
    fn default() -> Self {
        Coordinator {
            listen: "127.0.0.1:0".to_owned(),
            heartbeat_ms: 1_000,
            heartbeat_timeout_ms: 15_000,
            poll_ms: 10_000,
            think_ms: 300_000,
            render_ms: 300_000,
            score_ms: 120_000,
            step_ms: 1_800_000,
            rendezvous_ms: 600_000,
            backoff_ms: 500,
            backoff_max_ms: 30_000,
            max_attempts: 5,
            quarantine_after: 8,
            stop_ms: 600_000,
        }
    }
}

/// `[checkpoint]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// One every so many iterations, and at the end. Default 10.
    pub every: u32,
    /// The newest so many are kept. Default 3.
    pub keep: u32,
    /// Besides, every checkpoint whose version is divisible by this; 0: none. Default 0.
    pub keep_every: u32,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every: 10, keep: 3, keep_every: 0 }
    }
}

/// Files of mutual TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Certificates of who is trusted, PEM.
    pub ca: PathBuf,
    /// Own certificate, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
}

/// `[security]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Security {
    /// Certificates of who is trusted, PEM. Default: none, loopback only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// Own certificate, PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// Its key, PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// Listen beyond loopback without TLS all the same, on a network that is trusted. Default false.
    pub allow_plaintext: bool,
}

impl Security {
    /// The files, when all are named.
    pub fn tls(&self) -> Option<Tls> {
        Some(Tls {
            ca: self.ca.clone()?,
            certificate: self.certificate.clone()?,
            key: self.key.clone()?,
        })
    }
}

/// `[evaluation]`: held-out prompts, before and after training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Evaluation {
    /// Prompts, as `data.prompts`. Default: the bootstrapped model's test prompts, else none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts: Option<PathBuf>,
    /// The first so many; 0: all. Default 0.
    pub limit: u32,
    /// Images of a prompt. Default 1.
    pub images_per_prompt: u32,
    /// Denoising steps. Default 20.
    pub steps: u32,
}

impl Default for Evaluation {
    fn default() -> Self {
        Evaluation { prompts: None, limit: 0, images_per_prompt: 1, steps: 20 }
    }
}

/// Weights by component, as written.
pub(crate) type RawMix = BTreeMap<String, f64>;
