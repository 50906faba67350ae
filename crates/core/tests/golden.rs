//! Advantages against numbers that were computed outside this project (`tests/golden`).

use duet_core::advantage::{AdvantageSpec, Center, Scale, advantages, moments};
use serde_json::Value;

fn vectors() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/formulas.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Option<Vec<f64>> {
    value.as_array().map(|list| list.iter().map(|x| x.as_f64().unwrap()).collect())
}

fn near(got: f64, want: f64, what: &str) {
    assert!((got - want).abs() < 1e-6, "{what}: {got} != {want}");
}

/// What an untrained member counts as: nothing.
fn of(spec: AdvantageSpec, rewards: &[f64]) -> Vec<f64> {
    let group: Vec<Option<f64>> = rewards.iter().copied().map(Some).collect();
    let found = advantages(&spec, &[group]).remove(0);
    found.into_iter().map(|advantage| advantage.unwrap_or(0.0)).collect()
}

#[test]
fn group_advantages_are_those_of_public_systems() {
    let vectors = vectors();
    for (name, case) in vectors["group_advantage"].as_object().unwrap() {
        let rewards = numbers(&case["rewards"]).unwrap();
        for (key, ddof) in [("std0", 0), ("std1", 1)] {
            match (moments(&rewards, ddof), case[key].as_f64()) {
                (Some((mean, std)), Some(want)) => {
                    near(mean, case["mean"].as_f64().unwrap(), name);
                    near(std, want, name);
                }
                (found, want) => assert!(found.is_none() && want.is_none(), "{name}: {key}"),
            }
        }
        for (key, ddof, eps) in [
            ("ddof0_eps1e-4", 0, 1e-4),
            ("ddof1_eps1e-4", 1, 1e-4),
            ("ddof1_eps1e-6", 1, 1e-6),
            ("ddof1_eps1e-8", 1, 1e-8),
        ] {
            // A group of one is compared with nothing: systems that divide its reward by eps teach
            // noise (DU-7).
            if rewards.len() == 1 {
                assert_eq!(of(AdvantageSpec::default(), &rewards), [0.0]);
                continue;
            }
            let spec = AdvantageSpec { ddof, eps, clip: 0.0, ..AdvantageSpec::default() };
            let want = numbers(&case[key]).unwrap();
            for (got, want) in of(spec, &rewards).into_iter().zip(want) {
                near(got, want, &format!("{name}: {key}"));
            }
        }
        if let Some(baselines) = numbers(&case["loo_baseline"]) {
            let (center, scale) = (Center::LeaveOneOut, Scale::None);
            let spec = AdvantageSpec { center, scale, clip: 0.0, ..AdvantageSpec::default() };
            for ((got, baseline), reward) in of(spec, &rewards).iter().zip(baselines).zip(&rewards)
            {
                near(*got, reward - baseline, &format!("{name}: leave-one-out"));
            }
        }
    }
}
