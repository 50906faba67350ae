//! Layers, presets, printing and the digest.

use duet_config::{Config, ConfigError, PRESETS};
use duet_core::schedule::{Schedule, WindowSpec};
use proptest::prelude::*;
use std::collections::BTreeMap;

const BASE: &str = "[model]\nbootstrap = \"test\"\n[data]\nprompts = \"p.jsonl\"\n";

fn load(text: &str, env: &[(&str, &str)], set: &[&str]) -> Result<Config, ConfigError> {
    let env: BTreeMap<String, String> =
        env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let set: Vec<String> = set.iter().map(|text| (*text).to_owned()).collect();
    Config::from_text("test.toml", &format!("{text}\n{BASE}"), &env, &set)
}

#[test]
fn set_beats_environment_beats_file_beats_preset_beats_default() {
    let steps = |text: &str, env: &[(&str, &str)], set: &[&str]| {
        load(text, env, set).unwrap().rollout.images_per_trace
    };
    assert_eq!(steps("", &[], &[]), 4);
    assert_eq!(steps("preset = \"t2g\"", &[], &[]), 16);
    let file = "preset = \"t2g\"\n[rollout]\nimages_per_trace = 8";
    assert_eq!(steps(file, &[], &[]), 8);
    let env = [("DUET__ROLLOUT__IMAGES_PER_TRACE", "6"), ("PATH", "/bin"), ("DUET_OTHER", "x")];
    assert_eq!(steps(file, &env, &[]), 6);
    assert_eq!(steps(file, &env, &["rollout.images_per_trace=5"]), 5);
    assert_eq!(steps("", &[("DUET__PRESET", "t2g")], &[]), 16);
    assert_eq!(steps("", &[], &["preset=t2g"]), 16);
}

#[test]
fn values_of_overrides_are_toml_or_text() {
    let set = [
        "run.name=other",
        "run.seed=7",
        "llm.lr=1e-3",
        "llm.betas=[0.8, 0.9]",
        "run.store=/tmp/x y",
        "reward.dit={ semantic = 2.0 }",
        "schedule.kind=\"staged\"",
        "schedule.switch_at = 5",
        "security.allow_plaintext=true",
    ];
    let config = load("", &[], &set).unwrap();
    assert_eq!((config.run.name.as_str(), config.run.seed), ("other", 7));
    assert_eq!(
        (config.llm.branch.optimizer.lr, config.llm.branch.optimizer.betas),
        (1e-3, [0.8, 0.9])
    );
    assert_eq!(config.store_url(), "/tmp/x y");
    assert_eq!(config.schedule, Schedule::Staged { switch_at: 5 });
    assert_eq!(config.reward.dit, BTreeMap::from([("semantic".to_owned(), 2.0)]));
    assert!(config.security.allow_plaintext);
}

#[test]
fn wrong_overrides_say_where_they_come_from() {
    let said = |env: &[(&str, &str)], set: &[&str]| load("", env, set).unwrap_err().to_string();
    assert!(said(&[], &["rollout.steps"]).contains("write `section.key=value`"));
    assert!(said(&[], &["rollout..steps=3"]).contains("`rollout..steps` is no key"));
    let typed = said(&[], &["rollout.steps=ten"]);
    assert!(typed.contains("rollout.steps: invalid type") && typed.contains("--set"), "{typed}");
    let unknown = said(&[("DUET__RUN__SEDE", "3")], &[]);
    assert!(unknown.contains("run.sede") && unknown.contains("DUET__RUN__SEDE"), "{unknown}");
    assert!(unknown.contains("did you mean `seed`?"), "{unknown}");
    assert!(said(&[], &["run.name=12"]).contains("goes in quotes"));
}

#[test]
fn all_problems_are_told_at_once() {
    let text = "[rollout]\ntraces = 1\nwidth = 17\n[checkpoint]\nevery = 0";
    let error = load(text, &[], &[]).unwrap_err();
    let ConfigError::Invalid { problems, .. } = &error else { panic!("{error}") };
    let keys: Vec<&str> = problems.iter().map(|problem| problem.key.as_str()).collect();
    assert_eq!(keys, ["checkpoint.every", "rollout.traces", "rollout.width"]);
}

#[test]
fn a_table_of_a_kind_replaces_the_presets_whole() {
    let text = "preset = \"t2g\"\n[window]\nkind = \"progressive\"\nlen = 3\n[schedule]\n\
                kind = \"alternating\"\nllm_iterations = 2\ndit_iterations = 1";
    let config = load(text, &[], &[]).unwrap();
    assert_eq!(config.window, WindowSpec::Progressive { len: 3, every: 25, stride: 1 });
    assert_eq!(config.schedule, Schedule::Alternating { llm: 2, dit: 1 });
    let longer = load("preset = \"t2g\"\n[window]\nlen = 3", &[], &[]).unwrap();
    assert_eq!(longer.window, WindowSpec::Random { len: 3, low: 0, high: 5 });
}

#[test]
fn every_preset_is_valid_by_itself_and_is_what_its_system_uses() {
    let of = |name: &str| load(&format!("preset = \"{name}\""), &[], &[]).unwrap();
    for (name, _) in PRESETS {
        of(name);
    }
    let t2g = of("t2g");
    assert_eq!((t2g.rollout.traces, t2g.rollout.images_per_trace, t2g.rollout.steps), (5, 16, 10));
    assert_eq!((t2g.llm.branch.optimizer.lr, t2g.dit.branch.optimizer.lr), (2e-6, 3e-4));
    assert_eq!(
        t2g.dit.branch.lora.as_ref().map(|lora| (lora.rank, lora.targets.len())),
        Some((64, 12))
    );
    assert_eq!(t2g.dit.clip_range, 1e-4);
    assert_eq!(of("mix-grpo").window, WindowSpec::Progressive { len: 4, every: 25, stride: 1 });
    assert_eq!(of("dapo").llm.clip_high, 0.28);
    assert_eq!(of("dr-grpo").llm.aggregation_length, of("dr-grpo").rollout.max_new_tokens);
    let full = load("preset = \"t2g\"\n[dit]\ntrain = \"full\"", &[], &[]).unwrap();
    assert_eq!(full.dit.branch.lora, None);
}

#[test]
fn the_digest_changes_with_what_decides_results_and_with_nothing_else() {
    let digest = |set: &[&str]| load("", &[], set).unwrap().digest();
    let base = digest(&[]);
    for same in [
        "run.name=other",
        "run.store=elsewhere",
        "run.iterations=7",
        "workers.rollout=9",
        "coordinator.heartbeat_ms=900",
        "checkpoint.every=3",
        "trainer.world_size=2",
        "model.path=moved",
        "data.prompts=q.jsonl",
        "evaluation.steps=9",
        "reward.timeout_ms=5",
        "rollout.steps=10",
    ] {
        assert_eq!(digest(&[same]), base, "{same}");
    }
    for other in [
        "run.seed=2",
        "rollout.steps=11",
        "rollout.lag=1",
        "llm.lr=1e-3",
        "dit.kl=0.1",
        "reward.failure=drop-tree",
        "reward.llm={ semantic = 0.5 }",
        "window.len=1",
        "schedule.kind=alternating\u{1}",
        "advantage.dit.scale=batch",
        "model.bootstrap=demo",
        "workers.threads=2",
    ] {
        let set: Vec<&str> = match other.strip_suffix('\u{1}') {
            Some(kind) => vec![kind, "schedule.llm_iterations=1", "schedule.dit_iterations=1"],
            None => vec![other],
        };
        assert_ne!(digest(&set), base, "{other}");
    }
}

#[test]
fn credentials_are_neither_taken_nor_printed() {
    let scorer = "[reward]\nscorers = [\"miniworld\", \"http\"]\n[reward.http]\n\
                  url = \"https://judge/score?key=hidden\"\ncomponents = [\"style\"]";
    let printed = load(scorer, &[], &[]).unwrap().to_toml();
    assert!(!printed.contains("hidden") && printed.contains("https://judge/score"), "{printed}");
    for (key, url) in [
        ("run.store", "s3://user:secret@bucket/run"),
        ("run.store", "az://bucket/run?sig=secret"),
        ("model.path", "s3://user:secret@bucket/model"),
        ("data.prompts", "s3://user:secret@bucket/prompts"),
        ("sft.data", "s3://bucket/data?token=secret"),
        ("telemetry.otlp", "http://user:secret@127.0.0.1:4317"),
        ("telemetry.otlp", "https://user:secret@127.0.0.1:4317"),
        ("reward.http.url", "https://user:secret@judge/score"),
        ("reward.http.url", "gopher://user:secret@judge/score"),
    ] {
        let said = load(scorer, &[], &[&format!("{key}={url}")]).unwrap_err().to_string();
        assert!(said.contains(key) && said.contains("credentials"), "{said}");
        assert!(!said.contains("secret"), "{said}");
    }
}

#[test]
fn paths_have_defaults() {
    let env = BTreeMap::new();
    let config = Config::from_text("t", "[model]\nbootstrap = \"demo\"", &env, &[]).unwrap();
    assert_eq!(config.model_path().to_str(), Some("runs/base/demo"));
    assert_eq!(
        config.prompts_path().to_str(),
        Some("runs/base/demo/miniworld/prompts-train.jsonl")
    );
    assert_eq!(config.store_url(), "runs/run");
    assert_eq!(config.local_folder().to_str(), Some("runs/run"));
    let set = ["run.store=s3://bucket/x".to_owned()];
    let far = Config::from_text("t", "[model]\nbootstrap = \"demo\"", &env, &set).unwrap();
    assert_eq!(far.local_folder().to_str(), Some("runs/run"));
}

proptest! {
    #[test]
    fn whatever_is_accepted_is_printed_and_read_back_the_same(
        p in 1u32..40, j in 1u32..6, k in 1u32..6, steps in 1u32..20, len in 0u32..6, low in 0u32..6,
        lr in 1e-8..1.0f64, lag in 0u32..3, kind in 0usize..4,
    ) {
        let window = ["all", "random", "fixed", "progressive"][kind];
        let extra = match kind { 0 => String::new(), 1 => format!("len = {len}\nlow = {low}\n"), 2 => format!("len = {len}\nstart = {low}\n"), _ => format!("len = {len}\n") };
        let text = format!(
            "[rollout]\nprompts_per_iteration = {p}\ntraces = {j}\nimages_per_trace = {k}\n\
             steps = {steps}\nlag = {lag}\n[llm]\nlr = {lr:?}\n[window]\nkind = \"{window}\"\n{extra}"
        );
        let Ok(config) = load(&text, &[], &[]) else { return Ok(()) };
        let again = Config::from_text("again", &config.to_toml(), &BTreeMap::new(), &[]).unwrap();
        prop_assert_eq!(&again, &config);
        // What passed the checks can be scheduled: every window lies within the steps.
        let spec = config.run_spec();
        prop_assert!(spec.check(p as usize).is_ok());
        for iteration in 0..60 {
            let w = spec.window.window(&spec.root(), iteration, spec.steps);
            prop_assert!(w.len >= 1 && w.start + w.len <= spec.steps);
        }
    }

    #[test]
    fn arbitrary_text_is_refused_without_panic(text in "\\PC{0,80}", set in "\\PC{0,30}") {
        let _ = Config::from_text("t", &text, &BTreeMap::new(), &[set]);
    }
}
