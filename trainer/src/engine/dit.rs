//! The transformer's part of an update: one micro-batch for each sub-tree.

use super::batch::{Batch, LocalTrace};
use super::gradient::Reduction;
use super::tally::Tally;
use super::{Before, Engine};
use crate::error::TrainError;
use duet_core::work::Window;
use duet_models::artifact::RenderArtifact;
use duet_models::dit::Dit;
use duet_models::flow::FlowSchedule;
use duet_models::loss::{DitBatch, dit_loss};
use duet_models::pipeline::Pipeline;
use duet_models::render::{Condition, RenderOptions, Replay, Sampler, replay};
use tch::Tensor;

/// Adds the gradients and metrics of this rank's sub-trees.
///
/// # Errors
/// [`TrainError`]; the gradient is then incomplete.
pub fn accumulate(
    engine: &mut Engine,
    batch: &Batch,
    before: &mut Before,
    (sums, tally): (&mut Reduction<'_>, &mut Tally),
) -> Result<(), TrainError> {
    for (t, tree) in batch.trees.iter().enumerate() {
        for (j, trace) in tree.traces.iter().enumerate() {
            let Some((render, advantages)) = &trace.render else { continue };
            if advantages.iter().all(Option::is_none) {
                continue;
            }
            let run = |dit: &Dit| {
                again(&engine.pipeline, dit, trace, render, batch.window, &engine.settings.render)
            };
            let new = run(&engine.pipeline.dit)?;
            let reference = engine.dit_reference(run)?;
            let inputs = DitBatch {
                new: &new,
                old: &render.log_probs,
                old_means: before.dit.get(&(t, j)).map(Vec::as_slice),
                reference_means: reference.as_ref().map(|r| r.means.as_slice()),
                advantages,
            };
            let loss = dit_loss(&engine.settings.dit_loss, &inputs, batch.dit_terms)?;
            let value = loss.value.double_value(&[]);
            tally.add("dit/loss", value);
            for (name, share) in &loss.metrics {
                tally.add(&format!("dit/{name}"), *share);
            }
            if engine.settings.updates > 1 {
                let means = || new.means.iter().map(Tensor::detach).collect();
                before.dit.entry((t, j)).or_insert_with(means);
            }
            if !value.is_finite() {
                tally.bad(format!("dit loss of {}", tree.id.subtree(j as u32)));
                continue;
            }
            engine.dit.backward(&(loss.value * batch.gates.dit), sums)?;
        }
    }
    Ok(())
}

/// The window of a sub-tree again, under `dit`, in the shapes of the rollout.
fn again(
    pipeline: &Pipeline,
    dit: &Dit,
    trace: &LocalTrace,
    render: &RenderArtifact,
    window: Window,
    options: &RenderOptions,
) -> Result<Replay, duet_models::ModelError> {
    let grid = pipeline.grid(options.width, options.height)?;
    let schedule = FlowSchedule::new(&pipeline.flow, options.steps, grid.0 * grid.1)?;
    let condition =
        Condition { embeds: &trace.think.embeds, negative: Some(&trace.think.negative_embeds) };
    let size = (render.leaves() as i64, grid);
    let sampler = Sampler::new(dit, schedule, condition, size, window, options)?;
    replay(&sampler, &render.latents, 0..window.len)
}

/// A second transformer with its own copy of the weights: the policy that a penalty measures from,
/// where all weights are trained.
///
/// # Errors
/// libtorch refuses.
pub fn copy(dit: &Dit) -> Result<Dit, TrainError> {
    let params = dit.params().iter().map(|(name, t)| (name.to_owned(), t.detach().copy()));
    Ok(Dit::new(dit.config().clone(), params.collect(), "the reference transformer")?)
}
