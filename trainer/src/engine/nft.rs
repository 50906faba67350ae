//! The transformer's part of an update by DiffusionNFT: final images noised at some of the rollout's
//! times, each once.
//!
//! The old policy is the one that sampled. With lag 0 that is the policy at the first update on a
//! batch, or the one that follows it, whose weights the branch keeps; its velocities are computed at
//! the first update and kept for further ones.

use super::batch::{Batch, LocalTrace};
use super::gradient::Reduction;
use super::settings::Nft;
use super::tally::Tally;
use super::{Before, Engine};
use crate::error::TrainError;
use duet_core::work::Window;
use duet_core::{Purpose, Seed, SubtreeId};
use duet_models::ModelError;
use duet_models::dit::Dit;
use duet_models::flow::FlowSchedule;
use duet_models::loss::{NftBatch, nft_loss};
use duet_models::render::{Condition, Sampler};
use duet_torch::normal_tensor;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// Marks the seeds of training noise apart from those of rollouts.
const NOISE: u64 = 1;

/// Adds the gradients and metrics of this rank's sub-trees.
///
/// # Errors
/// [`TrainError`]; the gradient is then incomplete.
pub fn accumulate(
    engine: &mut Engine,
    nft: Nft,
    batch: &Batch,
    before: &mut Before,
    (sums, tally): (&mut Reduction<'_>, &mut Tally),
) -> Result<(), TrainError> {
    if engine.dit.lags() && before.dit.is_empty() {
        // Together, so that the weights are changed once.
        before.dit = engine.dit.sampling(|| {
            let mut all = BTreeMap::new();
            for (place, lesson) in lessons(engine, nft, batch) {
                let velocities =
                    |lesson: Lesson<'_>| lesson.velocities(engine, &engine.pipeline.dit);
                all.insert(place, tch::no_grad(|| lesson.and_then(|l| Ok(velocities(l)?)))?);
            }
            Ok(all)
        })?;
    }
    for (t, tree) in batch.trees.iter().enumerate() {
        for (j, trace) in tree.traces.iter().enumerate() {
            let id = tree.id.subtree(j as u32);
            let Some(lesson) = Lesson::new(engine, nft, (id, trace))? else { continue };
            let known = before.dit.get(&(t, j));
            let computed = match known {
                Some(_) => None,
                None => Some(tch::no_grad(|| lesson.velocities(engine, &engine.pipeline.dit))?),
            };
            let old = known.or(computed.as_ref()).map_or(&[][..], Vec::as_slice);
            let reference = engine.dit_reference(|dit| lesson.velocities(engine, dit))?;
            for at in 0..lesson.times.len() {
                let new = lesson.velocity(engine, &engine.pipeline.dit, at)?;
                let inputs = NftBatch {
                    clean: &lesson.clean,
                    noised: &lesson.noised[at],
                    time: lesson.times[at].1,
                    new: &new,
                    old: &old[at],
                    reference: reference.as_ref().map(|reference| &reference[at]),
                    advantages: &lesson.advantages,
                };
                let loss = nft_loss(&nft.loss, &inputs, batch.dit_terms)?;
                let value = loss.value.double_value(&[]);
                tally.add("dit/loss", value);
                for (name, share) in &loss.metrics {
                    tally.add(&format!("dit/{name}"), *share);
                }
                if !value.is_finite() {
                    tally.bad(format!("dit loss of {id}"));
                    continue;
                }
                engine.dit.backward(&(loss.value * batch.gates.dit), sums)?;
            }
            if let (Some(computed), true) = (computed, engine.settings.updates > 1) {
                before.dit.insert((t, j), computed);
            }
        }
    }
    Ok(())
}

/// All lessons of this rank, by (tree, trace).
fn lessons<'a>(
    engine: &'a Engine,
    nft: Nft,
    batch: &'a Batch,
) -> impl Iterator<Item = ((usize, usize), Result<Lesson<'a>, TrainError>)> {
    let places = batch.trees.iter().enumerate();
    let places = places.flat_map(|(t, tree)| (0..tree.traces.len()).map(move |j| (t, j)));
    places.filter_map(move |(t, j)| {
        let tree = &batch.trees[t];
        let lesson = Lesson::new(engine, nft, (tree.id.subtree(j as u32), &tree.traces[j]));
        Some(((t, j), lesson.transpose()?))
    })
}

/// The images of a sub-tree that are trained on, noised.
struct Lesson<'a> {
    trace: &'a LocalTrace,
    /// Final latents of leaves with an advantage, `[B, S, C]`.
    clean: Tensor,
    advantages: Vec<f64>,
    /// Step of the rollout's schedule and its time.
    times: Vec<(usize, f64)>,
    /// `(1 - t) clean + t noise` at each of the times.
    noised: Vec<Tensor>,
}

impl<'a> Lesson<'a> {
    /// `None` where no image of the sub-tree is trained on.
    fn new(
        engine: &Engine,
        nft: Nft,
        (id, trace): (SubtreeId, &'a LocalTrace),
    ) -> Result<Option<Lesson<'a>>, TrainError> {
        let Some((render, advantages)) = &trace.render else { return Ok(None) };
        if advantages.iter().all(Option::is_none) {
            return Ok(None);
        }
        let last = render.last.as_ref().ok_or_else(|| {
            TrainError::Protocol(format!("the images of {id} were stored without their latents"))
        })?;
        let kept: Vec<i64> =
            (0i64..).zip(advantages).filter(|(_, a)| a.is_some()).map(|(k, _)| k).collect();
        let clean = last.index_select(0, &Tensor::from_slice(&kept).to_device(last.device()));
        let schedule = schedule(engine)?;
        let tree = [u64::from(id.tree.iteration), u64::from(id.tree.index), u64::from(id.trace)];
        let seed =
            engine.settings.seed.derive(Purpose::StepNoise, &[NOISE, tree[0], tree[1], tree[2]]);
        let times: Vec<(usize, f64)> = order(&seed, schedule.steps())
            .into_iter()
            .take(nft.times as usize)
            .map(|step| (step, schedule.pair(step).0))
            .collect();
        let noised = times
            .iter()
            .map(|(step, time)| {
                let noise =
                    normal_tensor(&seed.derive(Purpose::StepNoise, &[*step as u64]), &clean.size());
                &clean * (1.0 - time) + noise.to_device(clean.device()) * *time
            })
            .collect();
        let advantages = advantages.iter().flatten().copied().collect();
        Ok(Some(Lesson { trace, clean, advantages, times, noised }))
    }

    fn velocity(&self, engine: &Engine, dit: &Dit, at: usize) -> Result<Tensor, ModelError> {
        let options = &engine.settings.render;
        let grid = engine.pipeline.grid(options.width, options.height)?;
        let think = &self.trace.think;
        let condition = Condition { embeds: &think.embeds, negative: Some(&think.negative_embeds) };
        let size = (self.clean.size()[0], grid);
        let schedule = FlowSchedule::new(&engine.pipeline.flow, options.steps, grid.0 * grid.1)?;
        let none = Window::default();
        let sampler = Sampler::new(dit, schedule, condition, size, none, options)?;
        Ok(sampler.velocity(&self.noised[at], self.times[at].0)?.to_kind(Kind::Float))
    }

    fn velocities(&self, engine: &Engine, dit: &Dit) -> Result<Vec<Tensor>, ModelError> {
        (0..self.times.len()).map(|at| self.velocity(engine, dit, at)).collect()
    }
}

fn schedule(engine: &Engine) -> Result<FlowSchedule, ModelError> {
    let options = &engine.settings.render;
    let grid = engine.pipeline.grid(options.width, options.height)?;
    FlowSchedule::new(&engine.pipeline.flow, options.steps, grid.0 * grid.1)
}

/// The steps of a schedule in a random order.
fn order(seed: &Seed, steps: usize) -> Vec<usize> {
    let mut keyed: Vec<(f64, usize)> =
        (0..steps).map(|step| (seed.uniform(step as u64), step)).collect();
    keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
    keyed.into_iter().map(|(_, step)| step).collect()
}
