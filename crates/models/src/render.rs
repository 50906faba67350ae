//! Sampling images, and replaying their window for training.
//!
//! The K leaves of a trace are one batch. Steps inside the window are sampled by the SDE and
//! their latents and log-probabilities kept; all others are plain ODE steps. Latents are fp32
//! throughout. [`replay`] computes the same numbers from the kept latents, with the same shapes, so
//! that with unchanged weights its log-probabilities are the rollout's, bit for bit.

use crate::dit::{Dit, Mods, Positions, Text};
use crate::error::{ModelError, Result};
use crate::flow::FlowSchedule;
use crate::pipeline::Pipeline;
use crate::sde::{Coefficients, SdeKind, step};
use crate::vae;
use duet_core::work::Window;
use duet_core::{Purpose, Seed};
use std::ops::Range;
use tch::{Kind, Tensor};

/// How images are sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct RenderOptions {
    /// Denoising steps.
    pub steps: usize,
    /// True classifier-free guidance; 1: none.
    pub guidance: f64,
    /// How noise is injected in the window.
    pub sde: SdeKind,
    /// Noise level `a` (or `eta`).
    pub noise_level: f64,
    /// Width of the image in pixels.
    pub width: i64,
    /// Height of the image in pixels.
    pub height: i64,
}

/// What an image is conditioned on: embeddings without padding.
#[derive(Clone, Copy, Debug)]
pub struct Condition<'a> {
    /// The refined prompt's, `[T, D]`.
    pub embeds: &'a Tensor,
    /// The negative prompt's, `[T', D]`; not needed without guidance.
    pub negative: Option<&'a Tensor>,
}

/// The K leaves of a trace.
#[derive(Debug)]
pub struct Rendered {
    /// Latents before the window and after each of its steps, `[K, w + 1, S, C]` fp32.
    pub latents: Tensor,
    /// Log-probabilities of the window's steps, `[K, w]` fp32.
    pub log_probs: Tensor,
    /// Final latents, packed: `[K, S, C]` fp32.
    pub last: Tensor,
    /// `[K, H, W, 3]` u8.
    pub images: Tensor,
}

/// Everything a denoising run shares over its steps.
#[derive(Debug)]
pub struct Sampler<'a> {
    dit: &'a Dit,
    branches: Vec<(Text, Positions)>,
    mods: Mods,
    schedule: FlowSchedule,
    options: &'a RenderOptions,
    window: Window,
    shape: [i64; 3],
}

impl<'a> Sampler<'a> {
    /// Prepares `leaves` images of a grid of (height, width) tokens. Text and times go through
    /// their input layers here, once.
    pub fn new(
        dit: &'a Dit,
        schedule: FlowSchedule,
        condition: Condition<'_>,
        (leaves, grid): (i64, (i64, i64)),
        window: Window,
        options: &'a RenderOptions,
    ) -> Result<Sampler<'a>> {
        let end = window.start as usize + window.len as usize;
        if end > schedule.steps() {
            return Err(ModelError::BadInput(format!(
                "the window ends after step {end}, but there are {} steps",
                schedule.steps()
            )));
        }
        let guided = options.guidance != 1.0;
        let negative = match (guided, condition.negative) {
            (true, None) => {
                let reason = "guidance needs the embeddings of a negative prompt";
                return Err(ModelError::BadInput(reason.to_owned()));
            }
            (true, Some(negative)) => Some(negative),
            (false, _) => None,
        };
        let branch = |embeds: &Tensor| -> Result<(Text, Positions)> {
            let text = dit.text(&embeds.unsqueeze(0), None)?.expand(leaves);
            Ok((text, dit.positions(embeds.size()[0], grid)))
        };
        let mut branches = vec![branch(condition.embeds)?];
        if let Some(negative) = negative {
            branches.push(branch(negative)?);
        }
        let mods = dit.modulations(&schedule.times(dit.device()));
        let shape = [leaves, grid.0 * grid.1, dit.config().in_channels];
        Ok(Sampler { dit, branches, mods, schedule, options, window, shape })
    }

    /// The guided velocity at step `index`, fp32: `u + g (c - u)`, rescaled so that every token
    /// keeps the conditional branch's norm.
    pub fn velocity(&self, latents: &Tensor, index: usize) -> Result<Tensor> {
        let row = index as i64;
        let found = self.dit.forward_each(latents, &self.branches, &self.mods, row)?;
        let mut found = found.into_iter().map(|velocity| velocity.to_kind(Kind::Float));
        let conditional = found.next().unwrap_or_default();
        let Some(unconditional) = found.next() else {
            return Ok(conditional);
        };
        Ok(guide(&conditional, &unconditional, self.options.guidance))
    }

    /// Coefficients of step `index`: noisy inside the window, Euler outside.
    pub fn coefficients(&self, index: usize) -> Coefficients {
        let (sigma, next) = self.schedule.pair(index);
        let start = self.window.start as usize;
        if (start..start + self.window.len as usize).contains(&index) {
            let second = f64::from(self.schedule.sigmas()[1]);
            let options = self.options;
            return Coefficients::new(options.sde, options.noise_level, sigma, next, second);
        }
        Coefficients::ode(sigma, next)
    }

    /// Noise of all leaves, fp32, on the transformer's device.
    fn noise(&self, seeds: impl Iterator<Item = Seed>) -> Tensor {
        let count = (self.shape[1] * self.shape[2]) as usize;
        let numbers: Vec<f32> = seeds.flat_map(|seed| seed.normals(count)).collect();
        Tensor::from_slice(&numbers).view(self.shape).to_device(self.dit.device())
    }
}

/// True classifier-free guidance with norm rescale, over the last (channel) dimension.
pub fn guide(conditional: &Tensor, unconditional: &Tensor, guidance: f64) -> Tensor {
    let combined = unconditional + (conditional - unconditional) * guidance;
    let norm = |x: &Tensor| x.norm_scalaropt_dim(2.0, [-1], true);
    &combined * (norm(conditional) / norm(&combined))
}

/// Samples the K leaves of a trace. Leaf `k` takes its initial noise from
/// `seed.derive(InitialNoise, [k])` and the noise of step `i` from `seed.derive(StepNoise, [k, i])`.
///
/// # Errors
/// When sizes do not fit the model, or latents turn non-finite.
pub fn render(
    pipeline: &Pipeline,
    condition: Condition<'_>,
    leaves: usize,
    window: Window,
    seed: &Seed,
    options: &RenderOptions,
) -> Result<Rendered> {
    render_watched(pipeline, condition, leaves, (window, seed, options), &mut |_| ())
}

/// As [`render`]; `watch` is told after each denoising step how many are done.
///
/// # Errors
/// As [`render`].
pub fn render_watched(
    pipeline: &Pipeline,
    condition: Condition<'_>,
    leaves: usize,
    (window, seed, options): (Window, &Seed, &RenderOptions),
    watch: &mut dyn FnMut(usize),
) -> Result<Rendered> {
    tch::no_grad(|| {
        let grid = pipeline.grid(options.width, options.height)?;
        let schedule = FlowSchedule::new(&pipeline.flow, options.steps, grid.0 * grid.1)?;
        let size = (leaves as i64, grid);
        // Outside the window nobody computes a step again, so its bits may be others there.
        let outside = schedule.steps() > window.len as usize;
        let folded = outside.then(|| pipeline.dit.folded()).transpose()?.flatten();
        let plain = schedule.clone();
        let plain =
            folded.as_ref().map(|dit| Sampler::new(dit, plain, condition, size, window, options));
        let plain = plain.transpose()?;
        let sampler = Sampler::new(&pipeline.dit, schedule, condition, size, window, options)?;
        let leaf = |purpose: Purpose, step: Option<u64>| {
            (0..leaves as u64).map(move |k| match step {
                Some(step) => seed.derive(purpose, &[k, step]),
                None => seed.derive(purpose, &[k]),
            })
        };
        let mut x = sampler.noise(leaf(Purpose::InitialNoise, None));
        let (mut kept, mut log_probs) = (Vec::new(), Vec::new());
        for index in 0..sampler.schedule.steps() {
            let c = sampler.coefficients(index);
            let inside = (window.start..window.start + window.len).contains(&(index as u32));
            if inside && kept.is_empty() {
                kept.push(x.shallow_clone());
            }
            let model = if inside { &sampler } else { plain.as_ref().unwrap_or(&sampler) };
            let velocity = model.velocity(&x, index)?;
            let eps =
                c.is_random().then(|| sampler.noise(leaf(Purpose::StepNoise, Some(index as u64))));
            let out = step(&c, &x, &velocity, eps.as_ref());
            x = out.next;
            watch(index + 1);
            if inside {
                kept.push(x.shallow_clone());
                log_probs.push(
                    out.log_prob.unwrap_or_else(|| {
                        Tensor::zeros([leaves as i64], (Kind::Float, x.device()))
                    }),
                );
            }
        }
        if x.isfinite().all().int64_value(&[]) == 0 {
            return Err(ModelError::NotFinite {
                what: "a latent",
                place: " after sampling".into(),
            });
        }
        let images = decode(pipeline, &x, grid);
        let empty = || Tensor::zeros([leaves as i64, 0], (Kind::Float, x.device()));
        let (latents, log_probs) = match kept.is_empty() {
            true => (empty().view([leaves as i64, 0, sampler.shape[1], sampler.shape[2]]), empty()),
            false => (Tensor::stack(&kept, 1), Tensor::stack(&log_probs, 1)),
        };
        Ok(Rendered { latents, log_probs, last: x, images })
    })
}

/// Packed latents to images `[K, H, W, 3]` u8.
pub fn decode(pipeline: &Pipeline, packed: &Tensor, grid: (i64, i64)) -> Tensor {
    let latents = pipeline.vae.denormalize(&vae::unpack(packed, grid));
    vae::to_bytes(&pipeline.vae.decode(&latents.to_kind(pipeline.vae.kind())))
}

/// A window computed again.
#[derive(Debug)]
pub struct Replay {
    /// `[K, w]` fp32, with gradient where gradients are on.
    pub log_probs: Tensor,
    /// Means of the transitions, `[K, S, C]` each.
    pub means: Vec<Tensor>,
    /// Velocities, `[K, S, C]` each.
    pub velocities: Vec<Tensor>,
    /// Coefficients of the steps.
    pub coefficients: Vec<Coefficients>,
}

/// Computes the log-probabilities of kept latents `[K, w + 1, S, C]` again, for the steps `which` of
/// the window (`0..w` for all; one at a time keeps the graph small).
pub fn replay(sampler: &Sampler<'_>, latents: &Tensor, which: Range<u32>) -> Result<Replay> {
    let size = latents.size();
    let [leaves, tokens, channels] = sampler.shape;
    let steps = i64::from(sampler.window.len);
    if size != [leaves, steps + 1, tokens, channels] || which.end > sampler.window.len {
        return Err(ModelError::BadInput(format!(
            "kept latents have shape {size:?}, not {:?}",
            [leaves, steps + 1, tokens, channels]
        )));
    }
    let mut out = Replay {
        log_probs: Tensor::new(),
        means: Vec::new(),
        velocities: Vec::new(),
        coefficients: Vec::new(),
    };
    let mut log_probs = Vec::new();
    for offset in which {
        let index = (sampler.window.start + offset) as usize;
        let at = |offset: u32| latents.select(1, i64::from(offset)).contiguous();
        let (x, next) = (at(offset), at(offset + 1));
        let c = sampler.coefficients(index);
        let velocity = sampler.velocity(&x, index)?;
        let mean = c.mean(&x, &velocity);
        log_probs.push(c.log_prob(&next, &mean));
        out.means.push(mean);
        out.velocities.push(velocity);
        out.coefficients.push(c);
    }
    if !log_probs.is_empty() {
        out.log_probs = Tensor::stack(&log_probs, 1);
    }
    Ok(out)
}
