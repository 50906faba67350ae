//! One denoising step and its log-probability: the only such function of the project.
//!
//! Every kind has the form `mean = c_x x + c_v v`, `x' = mean + s eps`, with coefficients that are
//! plain numbers; they differ in those and in the form of the log-probability, which is the mean
//! over all latent dimensions (not their sum).

use std::f64::consts::PI;
use tch::{Kind, Tensor};

/// How noise is injected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SdeKind {
    /// Flow-GRPO (arXiv 2505.05470; `sd3_sde_with_logprob.py`), noise level `a`:
    /// `std = a sqrt(sigma / (1 - sigma))`.
    FlowGrpo,
    /// Coefficients-preserving sampling (arXiv 2509.05952), noise level `a` in (0, 1):
    /// `s = sigma' sin(a pi / 2)`.
    Cps,
    /// DanceGRPO (arXiv 2505.07818), constant `eta`: `std = eta`.
    Dance,
}

/// A step's coefficients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coefficients {
    /// Factor of the latent in the mean.
    pub x: f64,
    /// Factor of the velocity in the mean.
    pub v: f64,
    /// Standard deviation of the transition, `sqrt(-dt)` included.
    pub noise: f64,
    /// Diffusion coefficient without `sqrt(-dt)`, as Flow-GRPO returns it (for `Cps`: `noise`).
    pub std: f64,
    /// Step in sigma; negative.
    pub dt: f64,
    kind: SdeKind,
}

impl Coefficients {
    /// The Euler step of the ODE.
    pub fn ode(sigma: f64, next: f64) -> Coefficients {
        let dt = next - sigma;
        Coefficients { x: 1.0, v: dt, noise: 0.0, std: 0.0, dt, kind: SdeKind::FlowGrpo }
    }

    /// A step from `sigma` to `next`. `level` is the noise level `a` (or `eta`); zero gives the
    /// Euler step. `second` is the schedule's second sigma, which stands in for a sigma of one where
    /// Flow-GRPO would divide by zero.
    pub fn new(kind: SdeKind, level: f64, sigma: f64, next: f64, second: f64) -> Coefficients {
        if level == 0.0 {
            return Coefficients { kind, ..Coefficients::ode(sigma, next) };
        }
        let dt = next - sigma;
        match kind {
            SdeKind::FlowGrpo => {
                let safe = if sigma == 1.0 { second } else { sigma };
                let std = (sigma / (1.0 - safe)).sqrt() * level;
                Coefficients::diffusion(kind, std, sigma, dt)
            }
            SdeKind::Dance => Coefficients::diffusion(kind, level, sigma, dt),
            SdeKind::Cps => {
                let noise = next * (level * PI / 2.0).sin();
                let rest = (next * next - noise * noise).max(0.0).sqrt();
                Coefficients {
                    x: (1.0 - next) + rest,
                    v: rest * (1.0 - sigma) - (1.0 - next) * sigma,
                    noise,
                    std: noise,
                    dt,
                    kind,
                }
            }
        }
    }

    /// `mean = x + dt (v + std^2 / (2 sigma) (x + (1 - sigma) v))`.
    fn diffusion(kind: SdeKind, std: f64, sigma: f64, dt: f64) -> Coefficients {
        let drift = std * std / (2.0 * sigma);
        Coefficients {
            x: 1.0 + drift * dt,
            v: (1.0 + drift * (1.0 - sigma)) * dt,
            noise: std * (-dt).sqrt(),
            std,
            dt,
            kind,
        }
    }

    /// Whether a log-probability exists: some noise is injected.
    pub fn is_random(&self) -> bool {
        self.noise > 0.0
    }

    /// Mean of the transition, fp32.
    pub fn mean(&self, x: &Tensor, v: &Tensor) -> Tensor {
        if self.x == 1.0 {
            return x + v.to_kind(Kind::Float) * self.v;
        }
        x * self.x + v.to_kind(Kind::Float) * self.v
    }

    /// `mean + s eps`, fp32.
    pub fn sample(&self, mean: &Tensor, eps: &Tensor) -> Tensor {
        mean + eps * self.noise
    }

    /// Log-probability of `next` under the transition with this mean, `[B]` fp32: the mean over all
    /// dimensions but the first. CPS drops the normaliser and the variance, as published.
    ///
    /// Only meaningful when [`Coefficients::is_random`].
    pub fn log_prob(&self, next: &Tensor, mean: &Tensor) -> Tensor {
        let error = mean_square(&(next - mean));
        match self.kind {
            SdeKind::Cps => -error,
            SdeKind::FlowGrpo | SdeKind::Dance => {
                let constant = -self.noise.ln() - (2.0 * PI).sqrt().ln();
                error * (-0.5 / (self.noise * self.noise)) + constant
            }
        }
    }
}

/// Mean of squares over all dimensions but the first, `[B]`.
pub fn mean_square(x: &Tensor) -> Tensor {
    x.square().flatten(1, -1).mean_dim(1, false, Kind::Float)
}

/// The outcome of a step.
#[derive(Debug)]
pub struct SdeStep {
    /// The next latent, without gradient.
    pub next: Tensor,
    /// `[B]`; `None` on a step without noise.
    pub log_prob: Option<Tensor>,
    /// Mean of the transition.
    pub mean: Tensor,
}

/// One step from latents `x` with velocity `v` (both `[B, S, C]`, the arithmetic fp32) and noise
/// `eps`, which is not read where the step injects none.
pub fn step(c: &Coefficients, x: &Tensor, v: &Tensor, eps: Option<&Tensor>) -> SdeStep {
    let mean = c.mean(x, v);
    match eps {
        Some(eps) if c.is_random() => {
            let next = c.sample(&mean, eps).detach();
            let log_prob = Some(c.log_prob(&next, &mean));
            SdeStep { next, log_prob, mean }
        }
        _ => SdeStep { next: mean.detach(), log_prob: None, mean },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIGMAS: [f64; 6] = [1.0, 0.928969635, 0.851484794, 0.766623831, 0.673280860, 0.570117298];

    fn scalar(kind: SdeKind, level: f64, i: usize) -> (Coefficients, f64, f64, f64) {
        let c = Coefficients::new(kind, level, SIGMAS[i], SIGMAS[i + 1], SIGMAS[1]);
        let x = Tensor::from_slice(&[0.5f32]).view([1, 1, 1]);
        let v = Tensor::from_slice(&[-0.3f32]).view([1, 1, 1]);
        let eps = Tensor::from_slice(&[1.0f32]).view([1, 1, 1]);
        let out = step(&c, &x, &v, Some(&eps));
        let logp = out.log_prob.unwrap().double_value(&[0]);
        (c, out.mean.double_value(&[0, 0, 0]), out.next.double_value(&[0, 0, 0]), logp)
    }

    fn near(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-5, "{got} != {want}");
    }

    /// One dimension, x = 0.5, v = -0.3, eps = 1 on Qwen-Image's 10-step schedule at 512 x 512,
    /// computed in float64 from the papers' formulas.
    #[test]
    fn steps_match_float64_values() {
        for (i, std, noise, mean, next, logp) in [
            (0, 4.502557, 1.2, 0.161309, 1.361309, -1.601260),
            (3, 2.174924, 0.664485, 0.404177, 1.068661, -1.010195),
            (4, 1.722630, 0.553293, 0.439560, 0.992853, -0.827071),
        ] {
            let (c, m, n, l) = scalar(SdeKind::FlowGrpo, 1.2, i);
            near(c.std, std);
            near(c.noise, noise);
            near(m, mean);
            near(n, next);
            near(l, logp);
        }
        for (i, noise, mean, next, logp) in [
            (0, 0.883503, 0.200358, 1.083861, -0.780577),
            (3, 0.640328, 0.327962, 0.968290, -0.410020),
            (4, 0.542214, 0.372591, 0.914805, -0.293996),
        ] {
            let (c, m, n, l) = scalar(SdeKind::Cps, 0.8, i);
            near(c.noise, noise);
            near(m, mean);
            near(n, next);
            near(l, logp);
        }
        for (i, mean, noise, logp) in [
            (0, 0.519711, 0.079955, 1.107358),
            (3, 0.525647, 0.091656, 0.970772),
            (4, 0.528177, 0.096357, 0.920754),
        ] {
            let (c, m, _, l) = scalar(SdeKind::Dance, 0.3, i);
            near(m, mean);
            near(c.noise, noise);
            near(l, logp);
        }
    }

    proptest! {
        /// Law: a noise level of zero is the Euler step, whatever the kind.
        #[test]
        fn no_noise_is_euler(
            sigma in 0.05f64..1.0, share in 0.0f64..0.99, x in -3f32..3.0, v in -3f32..3.0, which in 0..3,
        ) {
            let kind = [SdeKind::FlowGrpo, SdeKind::Cps, SdeKind::Dance][which as usize];
            let next = sigma * share;
            let c = Coefficients::new(kind, 0.0, sigma, next, 0.9);
            let (x, v) = (Tensor::from_slice(&[x]).view([1, 1]), Tensor::from_slice(&[v]).view([1, 1]));
            let out = step(&c, &x, &v, Some(&x.ones_like()));
            prop_assert!(out.log_prob.is_none());
            prop_assert_eq!(out.next, &x + &v * (next - sigma));
        }
    }
}
