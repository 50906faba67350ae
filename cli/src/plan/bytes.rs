//! Bytes on the GPU of each role, by kind.

use super::shapes::Shapes;
use super::{Work, activations, sampling};
use duet_config::{Config, DitObjective, Dtype, NftOld, Reduce};
use serde::Serialize;

/// Bytes of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kind {
    /// What.
    pub name: &'static str,
    /// How many.
    pub bytes: u64,
}

/// What a process of a role needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Role {
    /// Which.
    pub name: &'static str,
    /// How many processes, each with a GPU.
    pub count: u32,
    /// By kind.
    pub kinds: Vec<Kind>,
    /// The sum.
    pub bytes: u64,
    /// What the activations would take with `trainer.recompute` the other way round.
    pub other_recompute: Option<u64>,
}

fn kind(name: &'static str, bytes: u64) -> Kind {
    Kind { name, bytes }
}

/// A trained branch.
struct Trained {
    params: u64,
    /// Bytes of an element of what is trained.
    element: u64,
    adapter: bool,
}

/// Bytes of an element in what models compute in.
pub fn element(config: &Config) -> u64 {
    match config.model.dtype {
        Dtype::Float32 => 4,
        Dtype::Bfloat16 => 2,
    }
}

/// Parameters that each branch trains: the language model's, the transformer's.
pub fn trained(config: &Config, shapes: &Shapes) -> [u64; 2] {
    let llm = match &config.llm.branch.lora {
        Some(lora) => shapes.lm.adapters(u64::from(lora.rank), &lora.targets),
        None => shapes.lm.params(),
    };
    let dit = match &config.dit.branch.lora {
        Some(lora) => shapes.dit.adapters(u64::from(lora.rank), &lora.targets),
        None => shapes.dit.params(),
    };
    let (llm_trains, dit_trains) = config.schedule.trains();
    [if llm_trains { llm } else { 0 }, if dit_trains { dit } else { 0 }]
}

fn branches(config: &Config, shapes: &Shapes) -> [Trained; 2] {
    let [llm, dit] = trained(config, shapes);
    let branch = |params, adapter| {
        let element = if adapter { 4 } else { element(config) };
        Trained { params, element, adapter }
    };
    [branch(llm, config.llm.branch.lora.is_some()), branch(dit, config.dit.branch.lora.is_some())]
}

/// Both roles that hold the models.
pub fn roles(config: &Config, shapes: &Shapes, work: &Work) -> Vec<Role> {
    let branches = branches(config, shapes);
    vec![rollout(config, shapes, work, &branches), trainer(config, shapes, work, &branches)]
}

fn models(config: &Config, shapes: &Shapes, branches: &[Trained; 2]) -> Vec<Kind> {
    let weights = (shapes.lm.params() + shapes.dit.params()) * element(config);
    let adapters: u64 = branches.iter().filter(|b| b.adapter).map(|b| 4 * b.params).sum();
    vec![kind("weights", weights + 4 * shapes.vae.params()), kind("adapters", adapters)]
}

fn role(name: &'static str, count: u32, kinds: Vec<Kind>, other_recompute: Option<u64>) -> Role {
    let bytes = kinds.iter().map(|kind| kind.bytes).sum();
    let kinds = kinds.into_iter().filter(|kind| kind.bytes > 0).collect();
    Role { name, count, kinds, bytes, other_recompute }
}

/// Thinks with J traces and draws K images at a time.
fn rollout(config: &Config, shapes: &Shapes, work: &Work, branches: &[Trained; 2]) -> Role {
    let mut kinds = models(config, shapes, branches);
    let cache = sampling::cache(config, shapes, work);
    kinds.push(kind("KV cache", cache));
    kinds.push(kind("latents", (work.window + 2) * work.leaves * latent(shapes, work)));
    // The cache is gone when the other phases begin.
    let beyond = sampling::workspace(config, shapes, work).saturating_sub(cache);
    kinds.push(kind("workspace", beyond));
    role("rollout worker", config.workers.rollout, kinds, None)
}

/// Latents, images and embeddings of a trace.
fn rollout_bytes(shapes: &Shapes, work: &Work) -> u64 {
    let leaf = (work.window + 1) * latent(shapes, work) + 3 * work.pixels;
    work.leaves * leaf + 4 * 2 * work.text_tokens * shapes.dit.text
}

/// A tree's J traces, or a sub-tree's K leaves, at a time; the rollouts of all its trees.
fn trainer(config: &Config, shapes: &Shapes, work: &Work, branches: &[Trained; 2]) -> Role {
    let mut kinds = models(config, shapes, branches);
    // What a rank takes steps for: all, or its share.
    let own = if config.trainer.zero >= 1 { config.trainer.world_size.max(1) } else { 1 };
    let sum = |bytes: &dyn Fn(&Trained) -> u64| -> u64 {
        branches.iter().map(|b| b.params.div_ceil(u64::from(own)) * bytes(b)).sum()
    };
    kinds.push(kind("master weights", sum(&|b| if b.element < 4 { 4 } else { 0 })));
    kinds.push(kind("moments", sum(&|_| 8)));
    kinds.push(kind("gradients", branches.iter().map(|b| gradients(config, b.params)).sum()));
    let ema: u64 = if config.trainer.ema > 0.0 { sum(&|b| b.element) } else { 0 };
    let lags = config.dit.objective == DitObjective::Nft && config.dit.nft_old != NftOld::Trained;
    let old = if lags { branches[1].params * branches[1].element } else { 0 };
    kinds.push(kind("averages and old policy", ema + old));
    let full = |branch: &Trained, kl: f64| kl > 0.0 && !branch.adapter && branch.params > 0;
    let mut copies = 0;
    if full(&branches[0], config.llm.kl) {
        copies += shapes.lm.params() * element(config);
    }
    if full(&branches[1], config.dit.kl) {
        copies += shapes.dit.params() * element(config);
    }
    kinds.push(kind("reference policy", copies));
    let world = u64::from(config.trainer.world_size.max(1));
    let trees = work.prompts.div_ceil(world);
    kinds.push(kind("rollouts", trees * work.traces * rollout_bytes(shapes, work)));
    let recompute = config.trainer.recompute;
    kinds.push(kind("activations", activations::peak(config, shapes, work, recompute)));
    let other = activations::peak(config, shapes, work, !recompute);
    role("trainer rank", config.trainer.world_size, kinds, Some(other))
}

/// Buckets of a gradient that a rank has in hand at most: those that are summed over ranks, and those
/// that the backward pass fills.
const BUCKETS: u64 = 8;

/// The sums of a gradient over micro-batches and ranks, fp32; what a backward pass has in hand is counted
/// with the activations.
fn gradients(config: &Config, params: u64) -> u64 {
    let trainer = &config.trainer;
    let world = u64::from(trainer.world_size.max(1));
    if world == 1 {
        return 4 * params;
    }
    let sums = if trainer.zero >= 2 { 4 * params.div_ceil(world) } else { 4 * params };
    let bucket = u64::from(trainer.bucket_mib) << 20;
    let local = match (trainer.reduce, trainer.zero) {
        // Adds up where the sums come to lie.
        (Reduce::Update, 0 | 1) => 0,
        (Reduce::MicroBatch, _) if trainer.overlap => (BUCKETS * bucket).min(4 * params),
        _ => 4 * params,
    };
    sums + local
}

/// Latents of an image in fp32.
pub fn latent(shapes: &Shapes, work: &Work) -> u64 {
    4 * work.image_tokens * shapes.dit.channels
}
