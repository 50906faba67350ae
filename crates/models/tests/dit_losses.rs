//! The transformer's losses against plain float64 arithmetic, one latent dimension per leaf.

mod common;

use duet_models::loss::{DitBatch, DitKl, DitLoss, DitObjective, dit_loss};
use duet_models::render::Replay;
use duet_models::sde::{Coefficients, SdeKind};
use tch::Tensor;

const MEANS: [f32; 4] = [0.30, -0.20, 0.10, 0.55];
const OLD_MEANS: [f32; 4] = [0.25, -0.21, 0.18, 0.55];
const REFERENCE: [f32; 4] = [0.1, 0.1, 0.1, 0.1];
const NEXT: [f32; 4] = [0.8, -0.6, 0.2, 0.5];
const ADVANTAGES: [f64; 4] = [1.5, -0.8, 0.4, -9.0];
const CLIP: f64 = 5.0;

fn coefficients() -> Coefficients {
    Coefficients::new(SdeKind::FlowGrpo, 0.9, 0.77, 0.67, 0.92)
}

fn log_prob(c: &Coefficients, next: f64, mean: f64) -> f64 {
    let gap = next - mean;
    -gap * gap / (2.0 * c.noise * c.noise) - c.noise.ln() - (2.0 * std::f64::consts::PI).sqrt().ln()
}

fn column(values: &[f32]) -> Tensor {
    Tensor::from_slice(values).view([4, 1, 1])
}

/// The loss and its gradient with respect to the means.
fn run(loss: &DitLoss, advantages: &[Option<f64>]) -> (f64, Vec<f32>, f64) {
    common::one_thread();
    let c = coefficients();
    let mean = column(&MEANS).set_requires_grad(true);
    let old_mean = [column(&OLD_MEANS)];
    let reference = [column(&REFERENCE)];
    let next = column(&NEXT);
    let new = Replay {
        log_probs: c.log_prob(&next, &mean).unsqueeze(1),
        means: vec![mean.shallow_clone()],
        velocities: Vec::new(),
        coefficients: vec![c],
    };
    let old = c.log_prob(&next, &old_mean[0]).unsqueeze(1);
    let batch = DitBatch {
        new: &new,
        old: &old,
        old_means: Some(&old_mean),
        reference_means: Some(&reference),
        advantages,
    };
    let terms = advantages.iter().flatten().count() as f64;
    let out = dit_loss(loss, &batch, terms).unwrap();
    out.value.backward();
    let gradient = Vec::try_from(mean.grad().flatten(0, -1)).unwrap();
    (out.value.double_value(&[]), gradient, out.metrics["ratio"])
}

fn by_hand(loss: &DitLoss) -> f64 {
    let c = coefficients();
    let mut sum = 0.0;
    for leaf in 0..4 {
        let [mean, old, reference, next] =
            [MEANS, OLD_MEANS, REFERENCE, NEXT].map(|values| f64::from(values[leaf]));
        let advantage = ADVANTAGES[leaf].clamp(-CLIP, CLIP);
        let delta = log_prob(&c, next, mean) - log_prob(&c, next, old);
        let moved = (mean - old).powi(2) / (2.0 * c.noise * c.noise);
        let clip = |ratio: f64, range: f64| {
            (-advantage * ratio).max(-advantage * ratio.clamp(1.0 - range, 1.0 + range))
        };
        sum += match loss.objective {
            DitObjective::Clip { range } => clip(delta.exp(), range),
            DitObjective::Guard { range } => clip(((delta + moved) * c.noise).exp(), range) / -c.dt,
            DitObjective::Dppo { limit } => {
                let ratio = delta.exp();
                let outward = (ratio - 1.0) * advantage > 0.0;
                if moved >= limit && outward { 0.0 } else { -advantage * ratio }
            }
        };
        sum += match loss.kl {
            None => 0.0,
            Some(DitKl::Exact { coefficient }) => {
                coefficient * (mean - reference).powi(2) / (2.0 * c.std * c.std * -c.dt)
            }
            Some(DitKl::FlowGrpo { coefficient }) => {
                coefficient * (mean - reference).powi(2) / (2.0 * c.std * c.std)
            }
        };
    }
    sum / 4.0
}

#[test]
fn transformer_losses_are_their_formulas() {
    let advantages = ADVANTAGES.map(Some);
    let objectives = [
        DitObjective::Clip { range: 1e-4 },
        DitObjective::Clip { range: 0.2 },
        DitObjective::Guard { range: 2e-6 },
        DitObjective::Dppo { limit: 1e-3 },
        DitObjective::Dppo { limit: 10.0 },
    ];
    let kls =
        [None, Some(DitKl::Exact { coefficient: 0.3 }), Some(DitKl::FlowGrpo { coefficient: 0.3 })];
    for objective in objectives {
        for kl in kls {
            let loss = DitLoss { objective, advantage_clip: CLIP, kl };
            let (got, want) = (run(&loss, &advantages).0, by_hand(&loss));
            assert!((got - want).abs() < 1e-5 * want.abs().max(1.0), "{loss:?}: {got} != {want}");
        }
    }
}

/// Law: advantage zero has gradient zero, and so has a leaf that is not trained on.
#[test]
fn leaves_without_advantage_do_not_count() {
    let plain = |objective| DitLoss { objective, advantage_clip: CLIP, kl: None };
    for objective in [
        DitObjective::Clip { range: 1e-4 },
        DitObjective::Guard { range: 1e-4 },
        DitObjective::Dppo { limit: 1e-5 },
    ] {
        let (_, gradient, _) = run(&plain(objective), &[Some(0.0); 4]);
        assert_eq!(gradient, [0.0; 4]);
    }
    let some = [Some(1.0), None, None, Some(-1.0)];
    let (_, gradient, _) = run(&plain(DitObjective::Clip { range: 10.0 }), &some);
    assert!(gradient[0] != 0.0 && gradient[1..3] == [0.0, 0.0]);
}

/// A policy that has not moved has ratio one under every objective, GRPO-Guard's included.
#[test]
fn a_policy_that_has_not_moved_has_ratio_one() {
    let c = coefficients();
    let mean = column(&OLD_MEANS);
    let next = column(&NEXT);
    let log_probs = c.log_prob(&next, &mean).unsqueeze(1);
    let new = Replay {
        log_probs: log_probs.copy(),
        means: vec![mean],
        velocities: Vec::new(),
        coefficients: vec![c],
    };
    for objective in [
        DitObjective::Clip { range: 1e-4 },
        DitObjective::Guard { range: 1e-4 },
        DitObjective::Dppo { limit: 1e-5 },
    ] {
        let batch = DitBatch {
            new: &new,
            old: &log_probs,
            old_means: None,
            reference_means: None,
            advantages: &[Some(1.0); 4],
        };
        let loss = DitLoss { objective, advantage_clip: CLIP, kl: None };
        let out = dit_loss(&loss, &batch, 4.0).unwrap();
        assert_eq!(out.metrics["ratio"], 1.0);
        assert_eq!(out.metrics["approx_kl"], 0.0);
    }
    let still = Replay {
        log_probs: log_probs.copy(),
        means: vec![column(&MEANS)],
        velocities: Vec::new(),
        coefficients: vec![Coefficients::ode(0.5, 0.4)],
    };
    let batch = DitBatch {
        new: &still,
        old: &log_probs,
        old_means: None,
        reference_means: None,
        advantages: &[Some(1.0); 4],
    };
    let objective = DitObjective::Clip { range: 1e-4 };
    let loss = DitLoss { objective, advantage_clip: CLIP, kl: None };
    assert!(dit_loss(&loss, &batch, 4.0).is_err(), "an ODE step has no ratio");
    assert!(dit_loss(&loss, &batch, 0.0).is_err());
}

/// Divergence per squared difference of velocities on Qwen-Image's 10-step schedule at 512 x 512,
/// a = 1.2, in float64: exact, and as Flow-GRPO's code has it.
#[test]
fn published_and_exact_divergence_differ_by_the_step() {
    for (sigma, next, exact, published) in [
        (0.766_623_831, 0.673_280_860, 0.029_189_1, 0.002_724_59),
        (0.673_280_860, 0.570_117_298, 0.051_424_4, 0.005_305_12),
    ] {
        let c = Coefficients::new(SdeKind::FlowGrpo, 1.2, sigma, next, 0.928_969_635);
        let per_unit = c.v * c.v / 2.0;
        assert!((per_unit / (c.noise * c.noise) - exact).abs() < 1e-6);
        assert!((per_unit / (c.std * c.std) - published).abs() < 1e-6);
    }
}
