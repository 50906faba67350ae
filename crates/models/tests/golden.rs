//! The sampler's steps and the schedule against numbers that were computed outside this project
//! (`tests/golden`).

use duet_models::flow::{FlowConfig, FlowSchedule};
use duet_models::sde::{Coefficients, SdeKind, step};
use serde_json::Value;
use std::f64::consts::PI;
use tch::Tensor;

fn vectors() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/formulas.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn real(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn reals(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(real).collect()
}

fn near(got: f64, want: f64, bound: f64, what: &str) {
    assert!((got - want).abs() < bound, "{what}: {got} != {want}");
}

#[test]
fn flow_grpo_steps_in_one_dimension() {
    let vectors = vectors();
    let steps = &vectors["flow_sde"];
    for row in steps["rows"].as_array().unwrap() {
        let [sigma, next, x, v, z] =
            ["sigma", "sigma_next", "x", "v", "z"].map(|key| real(&row[key]));
        let level = real(&steps["eta"]);
        let c = Coefficients::new(SdeKind::FlowGrpo, level, sigma, next, real(&steps["sigma_max"]));
        // The coefficients are float64: 1e-6.
        let mean = c.x * x + c.v * v;
        let after = mean + c.noise * z;
        let density = -(after - mean).powi(2) / (2.0 * c.noise * c.noise)
            - c.noise.ln()
            - (2.0 * PI).sqrt().ln();
        // The vectors' `std` is that of the transition.
        for (got, key) in [(mean, "mean"), (c.noise, "std"), (after, "next"), (density, "logp")] {
            near(got, real(&row[key]), 1e-6, &format!("{key} of {row}"));
        }
        // The tensors are fp32: 1e-5.
        let tensor = |value: f64| Tensor::from_slice(&[value as f32]).view([1, 1, 1]);
        let out = step(&c, &tensor(x), &tensor(v), Some(&tensor(z)));
        let of = |tensor: &Tensor| tensor.double_value(&[0, 0, 0]);
        near(of(&out.mean), real(&row["mean"]), 1e-5, "mean");
        near(of(&out.next), real(&row["next"]), 1e-5, "next");
        near(out.log_prob.unwrap().double_value(&[0]), real(&row["logp"]), 1e-5, "logp");
    }
}

#[test]
fn sigmas_are_those_of_diffusers() {
    let vectors = vectors();
    let cases = vectors["flow_match_euler"].as_object().unwrap();
    let cases = cases.iter().filter(|(_, case)| case.is_object());
    for (name, case) in cases {
        let config = FlowConfig::from_json(&case["config"], name).unwrap();
        let steps = case["steps"].as_u64().unwrap() as usize;
        // With a dynamic shift the pipeline hands in sigmas down to `1 / steps`; without, the
        // scheduler spreads them over its own training range, whose ends it has shifted already.
        let end = |sigma: f64| config.shift * sigma / (1.0 + (config.shift - 1.0) * sigma);
        let (most, least) = match config.use_dynamic_shifting {
            true => (1.0, 1.0 / steps as f64),
            false => (end(1.0), end(1.0 / config.num_train_timesteps as f64)),
        };
        let span = (least - most) / (steps - 1) as f64;
        let start = (0..steps).map(|i| (most + i as f64 * span) as f32).collect();
        let mu = case["mu"].as_f64().unwrap_or(f64::NAN);
        let schedule = FlowSchedule::shifted(&config, start, mu);
        let want = reals(&case["sigmas"]);
        assert_eq!(schedule.sigmas().len(), want.len());
        for (index, (got, want)) in schedule.sigmas().iter().zip(want).enumerate() {
            near(f64::from(*got), want, 1e-6, &format!("{name}: sigma {index}"));
        }
        for (got, want) in schedule.sigmas().iter().zip(reals(&case["timesteps"])) {
            let time = f64::from(*got) * config.num_train_timesteps as f64;
            near(time, want, 1e-3, &format!("{name}: timestep"));
        }
    }
}
