//! The sections that say which processes there are and how they behave. Every field has its default
//! stated.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// `[trainer]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Trainer {
    /// Data-parallel ranks. Default 1.
    pub world_size: u32,
    /// Ranks that go on when others are lost and neither a spare nor a restarted one comes within
    /// `coordinator.heartbeat_timeout_ms`; steps repeated since the newest checkpoint then differ in
    /// rounding. Default: `world_size`, all must be there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_world_size: Option<u32>,
    /// What the ranks share out among themselves (ZeRO, arXiv 1910.02054): 0, nothing, every rank holds
    /// all; 1, the optimiser's state; 2, gradients too. The numbers stay the same. Default 0.
    pub zero: u32,
    /// When gradients are summed over ranks. Default `update`.
    pub reduce: Reduce,
    /// Sum gradients while the backward pass still runs. The numbers stay the same. Default true.
    pub overlap: bool,
    /// Gradients of each branch are scaled down to this L2 norm. Default 1.
    pub max_grad_norm: f64,
    /// Optimiser steps on each iteration's trees. Default 1.
    pub updates_per_rollout: u32,
    /// Decay of an exponential moving average of the trained weights, which the exported model then
    /// has (Flow-GRPO: 0.9); 0: none. Default 0.
    pub ema: f64,
    /// Compute each block's activations again in the backward pass instead of keeping them: less
    /// memory, a third more arithmetic, the same numbers. Default false.
    pub recompute: bool,
    /// Gradients are summed over ranks in pieces of this many MiB. Default 25.
    pub bucket_mib: u32,
    /// What the ranks talk through. Default `auto`.
    pub collective: Collective,
    /// A collective operation that takes longer has failed. Default 120000.
    pub collective_timeout_ms: u64,
}

impl Default for Trainer {
    fn default() -> Self {
        Trainer {
            world_size: 1,
            min_world_size: None,
            zero: 0,
            reduce: Reduce::Update,
            overlap: true,
            max_grad_norm: 1.0,
            updates_per_rollout: 1,
            ema: 0.0,
            recompute: false,
            bucket_mib: 25,
            collective: Collective::Auto,
            collective_timeout_ms: 120_000,
        }
    }
}

/// When gradients are summed over ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reduce {
    /// Once for each optimiser step: least traffic. A rank holds the whole gradient until then.
    #[default]
    Update,
    /// After each micro-batch: with `zero = 2` a rank holds its share of the gradient and no more.
    MicroBatch,
}

/// What the ranks talk through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Collective {
    /// NCCL where models run on GPUs, else Gloo.
    #[default]
    Auto,
    /// libtorch's Gloo, over TCP, with a copy through the processor's memory.
    Gloo,
    /// NCCL, each rank with a GPU of its own.
    Nccl,
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
    /// A worker whose connection closed, as it does when its process dies, is lost unless it is
    /// heard of again within this. Default 1000.
    pub reconnect_ms: u64,
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
    /// Requests a second that are taken from one address; more are refused with a hint when to come
    /// again. Default 5000.
    pub requests_per_second: u32,
    /// Connections at the same time; more are closed at once. Default 4096.
    pub max_connections: u32,
}

impl Default for Coordinator {
    fn default() -> Self {
        Coordinator {
            listen: "127.0.0.1:0".to_owned(),
            heartbeat_ms: 1_000,
            heartbeat_timeout_ms: 15_000,
            reconnect_ms: 1_000,
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
            requests_per_second: 5_000,
            max_connections: 4_096,
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
    /// Keeps the whole journal, so that `duet audit` can account for every attempt since the run
    /// began; false: what a restart needs, and older attempts by the tables. Default false.
    pub keep_journal: bool,
    /// Keeps all traces, latents and images, so that `duet replay` can compute any iteration again;
    /// false: what a restart needs. `duet plan` says how many bytes an iteration's are. Default
    /// false.
    pub keep_rollouts: bool,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every: 10, keep: 3, keep_every: 0, keep_journal: false, keep_rollouts: false }
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
    /// Own certificate, PEM; `{role}` in the name is the role of the process that reads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// Its key, PEM; `{role}` as for the certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// Talk beyond loopback without TLS all the same, on a network that is trusted. Default false.
    pub allow_plaintext: bool,
}

impl Security {
    /// The files of a process with this role, when all are named: `{role}` in their names is the role.
    pub fn tls(&self, role: &str) -> Option<Tls> {
        let own = |path: &Option<PathBuf>| {
            let path = path.as_ref()?;
            let Some(text) = path.to_str() else { return Some(path.clone()) };
            Some(PathBuf::from(text.replace("{role}", role)))
        };
        Some(Tls { ca: own(&self.ca)?, certificate: own(&self.certificate)?, key: own(&self.key)? })
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
