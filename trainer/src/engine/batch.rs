//! An iteration's trees as this rank sees them: the part it works on, with its artifacts, and the
//! counts over all of them.

use crate::error::TrainError;
use duet_core::TreeId;
use duet_core::work::{Gates, Step, TrainTrace, TrainTree, Window};
use duet_models::artifact::{RenderArtifact, ThinkArtifact};
use tch::Device;

/// Bytes of the artifacts of one trace.
#[derive(Clone, Debug)]
pub struct TraceFiles {
    /// The trace's, verified against its hash.
    pub think: Vec<u8>,
    /// Its rendered leaves', if any is trained on.
    pub render: Option<Vec<u8>>,
}

/// What one rank works on in a step.
#[derive(Clone, Debug)]
pub struct StepInput {
    /// The step, with all trees.
    pub step: Step,
    /// For each tree of this rank (see [`share`]), the files of its traces, in their order.
    pub files: Vec<Vec<TraceFiles>>,
}

/// The trees of one rank: those whose place in the list is `rank` modulo `world`.
pub fn share(trees: &[TrainTree], rank: u32, world: u32) -> impl Iterator<Item = &TrainTree> {
    trees.iter().skip(rank as usize).step_by(world.max(1) as usize)
}

/// A trace, decoded.
#[derive(Debug)]
pub struct LocalTrace {
    /// Tokens, log-probabilities, embeddings.
    pub think: ThinkArtifact,
    /// LLM advantage.
    pub advantage: Option<f64>,
    /// Latents, and the leaves' advantages.
    pub render: Option<(RenderArtifact, Vec<Option<f64>>)>,
}

/// A tree, decoded.
#[derive(Debug)]
pub struct LocalTree {
    /// Which.
    pub id: TreeId,
    /// Its traces.
    pub traces: Vec<LocalTrace>,
}

/// A rank's part of an iteration.
#[derive(Debug)]
pub struct Batch {
    /// The iteration.
    pub iteration: u32,
    /// Loss weights.
    pub gates: Gates,
    /// The window of the leaves.
    pub window: Window,
    /// This rank's trees.
    pub trees: Vec<LocalTree>,
    /// Trained (leaf, step) pairs of all ranks; for DiffusionNFT (leaf, time).
    pub dit_terms: f64,
    /// Micro-batches of the language model: this rank's, and those of the rank that has most.
    pub llm_micro_batches: (u32, u32),
    /// Those of the transformer.
    pub dit_micro_batches: (u32, u32),
}

impl Batch {
    /// Decodes this rank's artifacts to `device` and checks them against the step. Each leaf adds
    /// `terms_per_leaf` to the normaliser.
    ///
    /// # Errors
    /// [`TrainError`] naming the artifact that does not fit.
    pub fn decode(
        input: StepInput,
        (rank, world): (u32, u32),
        terms_per_leaf: u32,
        device: Device,
    ) -> Result<Batch, TrainError> {
        let StepInput { step, files } = input;
        let leaves = step.trees.iter().flat_map(|tree| &tree.traces);
        let leaves = leaves.flat_map(|trace| &trace.leaf_advantages).flatten().count();
        let micro_batches = |of: fn(&TrainTree) -> u32| {
            let count = |rank| share(&step.trees, rank, world).map(of).sum();
            (count(rank), (0..world).map(count).max().unwrap_or(0))
        };
        let llm_micro_batches = micro_batches(llm_micro_batches);
        let dit_micro_batches = micro_batches(dit_micro_batches);
        let trees = share(&step.trees, rank, world)
            .zip(files)
            .map(|(tree, files)| decode_tree(tree, files, step.window, device))
            .collect::<Result<_, _>>()?;
        Ok(Batch {
            iteration: step.iteration,
            gates: step.gates,
            window: step.window,
            trees,
            dit_terms: leaves as f64 * f64::from(terms_per_leaf),
            llm_micro_batches,
            dit_micro_batches,
        })
    }
}

/// A tree is one micro-batch, if any of its traces is trained on.
fn llm_micro_batches(tree: &TrainTree) -> u32 {
    u32::from(tree.traces.iter().any(|trace| trace.advantage.is_some()))
}

/// A trace is one micro-batch, if any of its leaves is trained on.
fn dit_micro_batches(tree: &TrainTree) -> u32 {
    let trained = |trace: &&TrainTrace| {
        trace.render.is_some() && trace.leaf_advantages.iter().any(Option::is_some)
    };
    tree.traces.iter().filter(trained).count() as u32
}

fn decode_tree(
    tree: &TrainTree,
    files: Vec<TraceFiles>,
    window: Window,
    device: Device,
) -> Result<LocalTree, TrainError> {
    let traces = tree.traces.iter().zip(files).map(|(trace, files)| {
        let think = ThinkArtifact::decode(&trace.artifact.key, files.think, device)?;
        let render = match (&trace.render, files.render) {
            (Some(at), Some(bytes)) => {
                let render = RenderArtifact::decode(&at.key, bytes, device)?;
                check_render(&at.key, &render, trace.leaf_advantages.len(), window)?;
                Some((render, trace.leaf_advantages.clone()))
            }
            _ => None,
        };
        Ok(LocalTrace { think, advantage: trace.advantage, render })
    });
    let traces = traces.collect::<Result<Vec<_>, TrainError>>()?;
    check_prompts(tree.id, &traces)?;
    Ok(LocalTree { id: tree.id, traces })
}

fn check_render(
    key: &str,
    render: &RenderArtifact,
    advantages: usize,
    window: Window,
) -> Result<(), TrainError> {
    let steps = render.log_probs.size()[1];
    let fits = render.leaves() == advantages
        && steps == i64::from(window.len)
        && render.window_start == window.start;
    if fits {
        return Ok(());
    }
    Err(TrainError::Protocol(format!(
        "{key} has {} leaves and the window {}+{steps}, the step says {advantages} and {}+{}",
        render.leaves(),
        render.window_start,
        window.start,
        window.len
    )))
}

/// All traces of a tree answer the same prompt.
fn check_prompts(tree: TreeId, traces: &[LocalTrace]) -> Result<(), TrainError> {
    let prompts = traces.iter().map(|trace| {
        let len = trace.think.prompt_len as i64;
        trace.think.tokens.narrow(0, 0, len)
    });
    let prompts: Vec<_> = prompts.collect();
    if prompts.windows(2).all(|pair| pair[0] == pair[1]) {
        return Ok(());
    }
    Err(TrainError::Protocol(format!("the traces of tree {tree} answer different prompts")))
}
