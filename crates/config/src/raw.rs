//! The configuration as it is written, before it is checked as a whole.

use crate::sections::{
    Aggregation, Checkpoint, Coordinator, Data, DitKl, DitObjective, Evaluation, HttpScorer,
    KlEstimator, LlmObjective, Lora, Model, NftOld, RawMix, Rollout, Run, Scorer, Security,
    Trainer, Workers,
};
use crate::sft::Sft;
use duet_core::advantage::{AdvantageSpec, Center, Combine, GroupKey, Scale};
use serde::{Deserialize, Serialize};

/// All sections.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Raw {
    /// Defaults of a public system, below everything else. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    pub run: Run,
    pub model: Model,
    pub data: Data,
    pub rollout: Rollout,
    pub window: Window,
    pub schedule: Schedule,
    pub reward: Reward,
    pub advantage: Advantages,
    pub llm: Llm,
    pub dit: Dit,
    pub trainer: Trainer,
    pub workers: Workers,
    pub coordinator: Coordinator,
    pub checkpoint: Checkpoint,
    pub security: Security,
    pub evaluation: Evaluation,
    /// `[sft]`. Default: none, reinforcement learning starts from the model as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sft: Option<Sft>,
    pub telemetry: crate::telemetry::Telemetry,
}

/// Where the window lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WindowKind {
    /// Always the same steps: `start`, `len`.
    Fixed,
    /// A new place each iteration: `len` steps in `low..high`.
    #[default]
    Random,
    /// Moves on by `stride` every `every` iterations: `len` steps (MixGRPO).
    Progressive,
    /// All steps but the last.
    All,
}

impl WindowKind {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            WindowKind::Fixed => "fixed",
            WindowKind::Random => "random",
            WindowKind::Progressive => "progressive",
            WindowKind::All => "all",
        }
    }
}

/// `[window]`: the denoising steps that are sampled by the SDE and trained. Default: two steps,
/// anywhere in the first half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Window {
    /// Which kind. Default `random`.
    pub kind: WindowKind,
    /// Number of steps. Default 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub len: Option<u32>,
    /// First step (`fixed`). Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<u32>,
    /// First step it may hold (`random`). Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low: Option<u32>,
    /// One past the last step it may hold (`random`). Default half of `rollout.steps`, but at least
    /// `low + len`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub high: Option<u32>,
    /// Iterations at one place (`progressive`). Default 25.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<u32>,
    /// Steps moved (`progressive`). Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stride: Option<u32>,
}

/// Which branches are trained when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// Both at every iteration, weight 0.5 each.
    #[default]
    Balanced,
    /// The LLM alone before iteration `switch_at`, the DiT alone from it on.
    Staged,
    /// `llm_iterations` of the LLM alone, `dit_iterations` of the DiT alone, and again.
    Alternating,
    /// Fixed loss weights `llm_weight` and `dit_weight`; zero closes a branch.
    Weights,
    /// The LLM alone until its mean reward has not risen for `patience` iterations, then the DiT
    /// alone.
    Plateau,
    /// Loss weights by iteration: straight lines between `points`.
    Curve,
}

impl ScheduleKind {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            ScheduleKind::Balanced => "balanced",
            ScheduleKind::Staged => "staged",
            ScheduleKind::Alternating => "alternating",
            ScheduleKind::Weights => "weights",
            ScheduleKind::Plateau => "plateau",
            ScheduleKind::Curve => "curve",
        }
    }
}

/// `[schedule]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// Which kind. Default `balanced`.
    pub kind: ScheduleKind,
    /// First iteration of the DiT phase (`staged`, *required* there).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub switch_at: Option<u32>,
    /// Iterations of an LLM turn (`alternating`, *required* there).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub llm_iterations: Option<u32>,
    /// Iterations of a DiT turn (`alternating`, *required* there).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dit_iterations: Option<u32>,
    /// Loss weight of the LLM branch (`weights`, *required* there).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub llm_weight: Option<f64>,
    /// Loss weight of the DiT branch (`weights`, *required* there).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dit_weight: Option<f64>,
    /// Iterations without a new best that end the LLM phase (`plateau`, *required* there).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<u32>,
    /// A best must be better by more than this (`plateau`). Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_delta: Option<f64>,
    /// Iterations that the reward is averaged over, roughly (`plateau`). Default 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub smooth: Option<u32>,
    /// First iteration of the DiT phase at the latest (`plateau`, *required* there).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at_most: Option<u32>,
    /// `[iteration, llm weight, dit weight]`, iterations ascending (`curve`, *required* there).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub points: Option<Vec<(u32, f64, f64)>>,
}

/// What missing scores do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    /// One missing leaf fails its whole sub-tree.
    #[default]
    RequireAll,
    /// A trace is rewarded when `at_least` of its leaves are scored.
    AtLeast,
    /// One missing leaf fails the whole tree.
    DropTree,
}

/// What an answer that the token limit cut off does to R1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overlong {
    /// Nothing.
    #[default]
    Keep,
    /// Its trace has no reward and is not trained on.
    Mask,
    /// R1 falls over the last `overlong_soft` tokens by `overlong_weight`.
    Penalty,
}

/// `[reward]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reward {
    /// Who scores. Default `["miniworld"]`.
    pub scorers: Vec<Scorer>,
    /// What missing scores do. Default `require-all`.
    pub failure: Failure,
    /// For `at-least`, *required* there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at_least: Option<u32>,
    /// A component that takes longer counts as missing. Default 60000.
    pub timeout_ms: u64,
    /// What an answer at the token limit does to R1: `keep`, `mask` or `penalty`. Default `keep`.
    pub overlong: Overlong,
    /// Tokens before the limit over which the penalty rises (`penalty`, *required* there).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlong_soft: Option<u32>,
    /// The penalty at the limit (`penalty`). Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlong_weight: Option<f64>,
    /// Taken off R1 of an answer without the `Revised Prompt:` marker. Default 0.
    pub format_penalty: f64,
    /// Weights of R1. Default `semantic = 1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub llm: Option<RawMix>,
    /// Weights of R2. Default `aesthetic = 0.1`, `consistency = 0.2`, `semantic = 0.7`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dit: Option<RawMix>,
    /// The server of scorer `http`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpScorer>,
}

impl Default for Reward {
    fn default() -> Self {
        Reward {
            scorers: vec![Scorer::Miniworld],
            failure: Failure::RequireAll,
            at_least: None,
            timeout_ms: 60_000,
            overlong: Overlong::Keep,
            overlong_soft: None,
            overlong_weight: None,
            format_penalty: 0.0,
            llm: None,
            dit: None,
            http: None,
        }
    }
}

/// `[advantage]`
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Advantages {
    /// `[advantage.llm]`, over the J traces of a tree.
    pub llm: LlmAdvantage,
    /// `[advantage.dit]`, over images.
    pub dit: DitAdvantage,
}

macro_rules! advantage {
    ($(#[$doc:meta])* $name:ident { $($(#[$own_doc:meta])* $own:ident: $type:ty = $default:expr),* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            /// What is subtracted: `mean` or `leave-one-out`. Default `mean`.
            pub center: Center,
            /// What is divided by: `group`, `batch` or `none`. Default `group`.
            pub scale: Scale,
            /// 0: population, 1: sample standard deviation. Default 0.
            pub ddof: u32,
            /// Added to the standard deviation. Default 1e-4.
            pub eps: f64,
            /// Advantages are clipped to it on both sides; 0: not at all. Default 5.
            pub clip: f64,
            /// Groups with fewer scored members are not trained on. Default 2.
            pub min_group: u32,
            /// `sum-then-normalise` the components, or `normalise-then-sum`. Default the first.
            pub combine: Combine,
            $($(#[$own_doc])* pub $own: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                let spec = AdvantageSpec::default();
                $name {
                    center: spec.center,
                    scale: spec.scale,
                    ddof: spec.ddof,
                    eps: spec.eps,
                    clip: spec.clip,
                    min_group: spec.min_group,
                    combine: spec.combine,
                    $($own: $default,)*
                }
            }
        }
    };
}

advantage! {
    /// `[advantage.llm]`
    LlmAdvantage {}
}
advantage! {
    /// `[advantage.dit]`
    DitAdvantage {
        /// Which images are compared: those of a `trace` or of the whole `tree`. Default `trace`.
        group: GroupKey = GroupKey::Trace
    }
}

/// All weights or an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Train {
    /// All weights.
    Full,
    /// An adapter.
    Lora,
}

/// `[llm]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Llm {
    /// `full` or `lora`. Default: `lora` when there is `[llm.lora]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<Train>,
    /// Learning rate. Default 2e-6.
    pub lr: f64,
    /// Decay of AdamW's moments. Default `[0.9, 0.999]`.
    pub betas: [f64; 2],
    /// AdamW's eps. Default 1e-8.
    pub eps: f64,
    /// AdamW's decoupled weight decay. Default 0.
    pub weight_decay: f64,
    /// What is optimised. Default `ppo`.
    pub objective: LlmObjective,
    /// epsilon below one. Default 0.2.
    pub clip_low: f64,
    /// epsilon above one. Default 0.2.
    pub clip_high: f64,
    /// Bound for negative advantages (`ppo`); 0: none. Default 0.
    pub dual_clip: f64,
    /// Largest weight (`cispo`). Default 5.
    pub cispo_max: f64,
    /// How token losses are averaged. Default `token-mean`.
    pub aggregation: Aggregation,
    /// Constant length of `aggregation = "constant"`; 0: `rollout.max_new_tokens`. Default 0.
    pub aggregation_length: u32,
    /// Weight of the divergence from the base model; 0: none. Default 0.
    pub kl: f64,
    /// Its estimator. Default `k3`.
    pub kl_estimator: KlEstimator,
    /// Value of the estimator, gradient of k2. Default false.
    pub kl_straight_through: bool,
    /// Truncated importance sampling of tokens; 0: none. Default 0.
    pub importance_cap: f64,
    /// `[llm.lora]`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
}

impl Default for Llm {
    fn default() -> Self {
        Llm {
            train: None,
            lr: 2e-6,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            objective: LlmObjective::Ppo,
            clip_low: 0.2,
            clip_high: 0.2,
            dual_clip: 0.0,
            cispo_max: 5.0,
            aggregation: Aggregation::TokenMean,
            aggregation_length: 0,
            kl: 0.0,
            kl_estimator: KlEstimator::K3,
            kl_straight_through: false,
            importance_cap: 0.0,
            lora: None,
        }
    }
}

/// `[dit]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dit {
    /// `full` or `lora`. Default: `lora` when there is `[dit.lora]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<Train>,
    /// Learning rate. Default 3e-4.
    pub lr: f64,
    /// Decay of AdamW's moments. Default `[0.9, 0.999]`.
    pub betas: [f64; 2],
    /// AdamW's eps. Default 1e-8.
    pub eps: f64,
    /// AdamW's decoupled weight decay. Default 1e-4.
    pub weight_decay: f64,
    /// What is optimised. Default `clip`.
    pub objective: DitObjective,
    /// epsilon of `clip` and `guard`. Default 1e-4.
    pub clip_range: f64,
    /// Largest divergence per dimension of `dppo`. Default 1e-5.
    pub dppo_limit: f64,
    /// How far the implicit policies of `nft` lie from the old one. Default 1.
    pub nft_beta: f64,
    /// Times that each image is noised at for `nft`; 0: all of the rollout's but one. Default 0.
    pub nft_times: u32,
    /// Which policy samples for `nft`: the `trained` one, or one that follows it, `rising` or `late`.
    /// Default `trained`.
    pub nft_old: NftOld,
    /// Advantages are clamped to this on both sides in the loss. Default 5.
    pub adv_clip: f64,
    /// Weight of the divergence from the base model; 0: none. Default 0.
    pub kl: f64,
    /// Which divergence. Default `exact`.
    pub kl_kind: DitKl,
    /// `[dit.lora]`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
}

impl Default for Dit {
    fn default() -> Self {
        Dit {
            train: None,
            lr: 3e-4,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 1e-4,
            objective: DitObjective::Clip,
            clip_range: 1e-4,
            dppo_limit: 1e-5,
            nft_beta: 1.0,
            nft_times: 0,
            nft_old: NftOld::Trained,
            adv_clip: 5.0,
            kl: 0.0,
            kl_kind: DitKl::Exact,
            lora: None,
        }
    }
}
