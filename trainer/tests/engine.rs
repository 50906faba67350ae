//! One step of the engine: on-policy ratios, equality over ranks, checkpoints, errors.

mod common;

use common::{Rollouts, pipeline, ranks, rollouts, settings, settings_with_adapter};
use duet_core::work::Gates;
use duet_models::loss::NftLoss;
use duet_torch::collective::{Collective, Solo};
use duet_torch::tensorfile::{TensorFile, TensorSource};
use duet_trainer::TrainError;
use duet_trainer::engine::{Engine, Nft, OldPolicy, Settings, checkpoint};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use tch::Device;

/// A folder with the base model; kept as long as the handle.
fn base() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    pipeline().save(folder.path()).unwrap();
    let path = folder.path().to_path_buf();
    (folder, path)
}

/// What a rank ends with: metrics of each step, the digest, its checkpoint shard.
struct End {
    metrics: Vec<BTreeMap<String, f64>>,
    digest: String,
    shard: Vec<u8>,
}

fn open(shard: &[u8]) -> TensorFile {
    TensorFile::from_bytes("shard", shard.to_vec()).unwrap()
}

fn run(settings: &Settings, rollouts: &Rollouts, steps: u32, group: &dyn Collective) -> End {
    duet_torch::init(1).unwrap();
    let mut engine = Engine::load(settings.clone()).unwrap();
    let place = (group.rank(), group.world());
    let step = |i| engine.step(rollouts.input(i, place), group).unwrap();
    let metrics = (0..steps).map(step).collect();
    let shard = checkpoint::shard(&engine, place.0, place.1).unwrap();
    End { metrics, digest: engine.digest().unwrap().to_string(), shard }
}

#[test]
fn the_first_update_is_exactly_on_policy() {
    let (_folder, model) = base();
    let rollouts = rollouts(2);
    for settings in [settings(&model), settings_with_adapter(&model)] {
        let end = run(&settings, &rollouts, 1, &Solo::new());
        let metrics = &end.metrics[0];
        for name in ["llm/approx_kl", "dit/approx_kl"] {
            assert_eq!(metrics[name], 0.0, "{name}: the ratio is one, bit for bit");
        }
        for name in ["llm/ratio", "dit/ratio"] {
            assert!((metrics[name] - 1.0).abs() < 1e-6, "{name} {}", metrics[name]);
        }
        for name in ["llm/kl", "dit/kl"] {
            assert_eq!(metrics.get(name).copied().unwrap_or(0.0), 0.0, "{name}");
        }
        assert!(metrics["llm/grad_norm"] > 0.0 && metrics["dit/grad_norm"] > 0.0);
        assert_eq!(metrics["dit/terms"], 2.0 * 3.0 * 3.0 * 2.0);
    }
}

#[test]
fn ranks_agree_with_one_another_and_with_one_rank() {
    let (_folder, model) = base();
    // Five trees: uneven over two and three ranks; one of them has no advantage for the LLM.
    let rollouts = Arc::new(rollouts(5));
    let settings = settings_with_adapter(&model);
    let alone = run(&settings, &rollouts, 3, &Solo::new());
    for world in [2, 3] {
        let (settings, rollouts) = (settings.clone(), rollouts.clone());
        let ends = ranks(world, move |group| run(&settings, &rollouts, 3, group));
        for end in &ends {
            assert_eq!(end.digest, ends[0].digest, "all ranks hold the same bits");
            assert_eq!(end.metrics, ends[0].metrics);
        }
        for (step, (one, many)) in alone.metrics.iter().zip(&ends[0].metrics).enumerate() {
            assert_eq!(one.keys().collect::<Vec<_>>(), many.keys().collect::<Vec<_>>());
            for (name, value) in one {
                let gap = (value - many[name]).abs();
                assert!(
                    gap <= 1e-4 * (1e-2 + value.abs()),
                    "{world} ranks, step {step}, {name}: {value} {}",
                    many[name]
                );
            }
        }
    }
}

#[test]
fn a_run_repeats_bit_for_bit_also_across_a_restart_with_other_ranks() {
    let (_folder, model) = base();
    let rollouts = Arc::new(rollouts(3));
    let settings = settings_with_adapter(&model);
    let (s, r) = (settings.clone(), rollouts.clone());
    let first = ranks(2, move |group| run(&s, &r, 2, group));
    let (s, r) = (settings.clone(), rollouts.clone());
    let again = ranks(2, move |group| run(&s, &r, 2, group).digest);
    assert_eq!(again, [first[0].digest.clone(), first[1].digest.clone()]);

    // Written by two ranks, read by one: the same state, and the same next step.
    let shards = || first.iter().map(|end| open(&end.shard)).collect::<Vec<_>>();
    let restored = || {
        let mut engine = Engine::load(settings.clone()).unwrap();
        checkpoint::restore(&mut engine, shards()).unwrap();
        engine
    };
    let mut engine = restored();
    assert_eq!(
        (engine.version(), engine.digest().unwrap().to_string()),
        (2, first[0].digest.clone())
    );
    engine.step(rollouts.input(2, (0, 1)), &Solo::new()).unwrap();
    let whole = checkpoint::shard(&restored(), 0, 1).unwrap();
    let mut other = Engine::load(settings.clone()).unwrap();
    checkpoint::restore(&mut other, vec![open(&whole)]).unwrap();
    other.step(rollouts.input(2, (0, 1)), &Solo::new()).unwrap();
    assert_eq!(engine.digest().unwrap(), other.digest().unwrap());

    let mut broken = Engine::load(settings.clone()).unwrap();
    let error = checkpoint::restore(&mut broken, vec![open(&first[0].shard)]).unwrap_err();
    assert!(
        error.to_string().starts_with("checkpoint: ") && error.kind() == "checkpoint",
        "{error}"
    );
}

#[test]
fn recomputing_activations_changes_no_bit() {
    // Libtorch counts its threads for each calling thread.
    tch::set_num_threads(1);
    let (_folder, model) = base();
    let rollouts = rollouts(2);
    for settings in [settings(&model), settings_with_adapter(&model)] {
        let kept = run(&settings, &rollouts, 2, &Solo::new());
        let again = Settings { recompute: true, ..settings };
        let again = run(&again, &rollouts, 2, &Solo::new());
        assert_eq!(again.digest, kept.digest);
        assert_eq!(again.metrics, kept.metrics);
    }
}

/// DiffusionNFT: while the policy is the one that sampled, the implicit positive and negative policies
/// are the same, and the next update on the same images moves them apart.
#[test]
fn nft_starts_where_both_implicit_policies_agree() {
    tch::set_num_threads(1);
    let (_folder, model) = base();
    let mut rollouts = rollouts(2);
    rollouts.end_without_window();
    let mut settings = settings(&model);
    settings.render.guidance = 1.0;
    let loss = NftLoss { beta: 1.0, advantage_clip: 5.0, kl: 0.0 };
    settings.nft = Some(Nft { loss, times: 2 });
    let once = run(&settings, &rollouts, 1, &Solo::new());
    let metrics = &once.metrics[0];
    assert_eq!(metrics["dit/nft/positive"], metrics["dit/nft/negative"]);
    assert!(metrics["dit/grad_norm"] > 0.0);
    assert_eq!(metrics["dit/terms"], 2.0 * 3.0 * 3.0 * 2.0);
    let twice = run(&Settings { updates: 2, ..settings }, &rollouts, 1, &Solo::new());
    let metrics = &twice.metrics[0];
    assert!(metrics["dit/nft/positive"] != metrics["dit/nft/negative"]);
}

/// The average is part of the checkpoint, follows its formula, and changes nothing else.
#[test]
fn the_moving_average_follows_its_formula_and_is_kept() {
    tch::set_num_threads(1);
    let (_folder, model) = base();
    let rollouts = rollouts(2);
    let mut settings = settings(&model);
    let plain = run(&settings, &rollouts, 1, &Solo::new());
    (settings.llm.ema, settings.dit.ema) = (0.75, 0.75);
    let averaged = run(&settings, &rollouts, 1, &Solo::new());
    assert_eq!(plain.digest, averaged.digest);
    let start = run(&settings, &rollouts, 0, &Solo::new());
    let read = |shard: Vec<u8>| TensorFile::from_bytes("shard", shard).unwrap();
    let (start, after) = (read(start.shard.clone()), read(averaged.shard.clone()));
    let load = |file: &TensorFile, name: &str| file.load(name, Device::Cpu).unwrap();
    let mut seen = 0;
    for name in after.names() {
        let Some((branch, own)) = name.split_once("/ema/") else { continue };
        let param = format!("{branch}/param/{own}");
        let expected = load(&start, &param) * 0.75 + load(&after, &param) * 0.25;
        let gap = (load(&after, name) - expected).abs().max().double_value(&[]);
        assert!(gap < 1e-6, "{name}: {gap}");
        seen += 1;
    }
    assert!(seen > 10);
    let mut engine = Engine::load(settings).unwrap();
    checkpoint::restore(&mut engine, vec![open(&averaged.shard)]).unwrap();
    assert_eq!(checkpoint::shard(&engine, 0, 1).unwrap(), averaged.shard);
}

/// DiffusionNFT's decay types: what is published lags behind what is trained, by the formula, and the
/// next iteration measures from it.
#[test]
fn the_policy_that_samples_follows_the_trained_one() {
    assert_eq!([0, 100, 2000].map(|n| OldPolicy::Rising.decay(n)), [0.0, 0.1, 0.5]);
    assert_eq!([75, 76, 9999].map(|n| OldPolicy::Late.decay(n)), [0.0, 0.0075, 0.999]);
    tch::set_num_threads(1);
    let (_folder, model) = base();
    let mut rollouts = rollouts(2);
    rollouts.end_without_window();
    let mut settings = settings(&model);
    settings.render.guidance = 1.0;
    let loss = NftLoss { beta: 1.0, advantage_clip: 5.0, kl: 0.0 };
    settings.nft = Some(Nft { loss, times: 2 });
    let plain = run(&settings, &rollouts, 1, &Solo::new());
    let start = run(&settings, &rollouts, 0, &Solo::new());
    settings.dit.old = OldPolicy::Rising;
    let lagging = run(&settings, &rollouts, 1, &Solo::new());
    assert_eq!(plain.digest, lagging.digest, "the first step is the same");
    let read = |shard: &Vec<u8>| TensorFile::from_bytes("shard", shard.clone()).unwrap();
    let (start, after) = (read(&start.shard), read(&lagging.shard));
    let load = |file: &TensorFile, name: &str| file.load(name, Device::Cpu).unwrap();
    let mut engine = Engine::load(settings.clone()).unwrap();
    checkpoint::restore(&mut engine, vec![open(&lagging.shard)]).unwrap();
    assert_eq!(checkpoint::shard(&engine, 0, 1).unwrap(), lagging.shard);
    let published = engine.weight_files().unwrap().dit.unwrap();
    let published = TensorFile::from_bytes("published", published).unwrap();
    let mut seen = 0;
    for name in after.names() {
        let Some(own) = name.strip_prefix("dit/old/") else { continue };
        let param = format!("dit/param/{own}");
        let expected = load(&start, &param) * 0.001 + load(&after, &param) * 0.999;
        let gap = (load(&after, name) - expected).abs().max().double_value(&[]);
        assert!(gap < 1e-6, "{name}: {gap}");
        assert_eq!(load(&published, own), load(&after, name));
        seen += 1;
    }
    assert!(seen > 10);
    let metrics = &run(&settings, &rollouts, 2, &Solo::new()).metrics[1];
    assert!(metrics["dit/nft/positive"] != metrics["dit/nft/negative"]);
    settings.dit.old = OldPolicy::Trained;
    let metrics = &run(&settings, &rollouts, 2, &Solo::new()).metrics[1];
    assert_eq!(metrics["dit/nft/positive"], metrics["dit/nft/negative"]);
}

#[test]
fn a_closed_gate_leaves_its_branch_alone() {
    let (_folder, model) = base();
    let rollouts = rollouts(2).gated(Gates { llm: 1.0, dit: 0.0 });
    duet_torch::init(1).unwrap();
    let mut engine = Engine::load(settings(&model)).unwrap();
    let metrics = engine.step(rollouts.input(0, (0, 1)), &Solo::new()).unwrap();
    assert!(metrics.keys().all(|name| !name.starts_with("dit/") || name == "dit/terms"));
    let files = engine.weight_files().unwrap();
    assert!(files.llm.is_some() && files.dit.is_none());
}

#[test]
fn several_updates_move_off_the_policy_and_are_clipped() {
    let (_folder, model) = base();
    let mut settings = settings(&model);
    settings.updates = 3;
    let end = run(&settings, &rollouts(2), 1, &Solo::new());
    let metrics = &end.metrics[0];
    assert_eq!(metrics["updates"], 3.0);
    assert!(metrics["llm/approx_kl"] > 0.0 && metrics["dit/approx_kl"] > 0.0);
    let clipped = metrics["dit/clip_ratio/low_mean"] + metrics["dit/clip_ratio/high_mean"];
    assert!(clipped > 0.0, "a range of 1e-4 is left at once");
}

#[test]
fn what_one_rank_cannot_read_ends_the_step_on_all_and_changes_nothing() {
    let (_folder, model) = base();
    let rollouts = Arc::new(rollouts(2));
    let settings = settings(&model);
    let errors = ranks(2, move |group| {
        duet_torch::init(1).unwrap();
        let mut engine = Engine::load(settings.clone()).unwrap();
        let before = engine.digest().unwrap();
        let mut input = rollouts.input(0, (group.rank(), 2));
        if group.rank() == 1 {
            input.files[0][1].think.truncate(100);
        }
        let error = engine.step(input, group).unwrap_err();
        assert_eq!(engine.digest().unwrap(), before);
        (error.kind().to_owned(), error.to_string())
    });
    for (kind, text) in errors {
        assert_eq!(kind, "artifact");
        assert!(text.starts_with("rank 1: i0/t1/think-1 is truncated"), "{text}");
    }
}

#[test]
fn a_branch_that_is_never_trained_costs_nothing_and_stays() {
    let (_folder, model) = base();
    duet_torch::init(1).unwrap();
    let mut settings = settings(&model);
    settings.dit.frozen = true;
    let mut engine = Engine::load(settings).unwrap();
    let rollouts = rollouts(1).gated(Gates { llm: 1.0, dit: 0.0 });
    engine.step(rollouts.input(0, (0, 1)), &Solo::new()).unwrap();
    assert!(engine.weight_files().unwrap().dit.is_none());
    let shard = String::from_utf8_lossy(&checkpoint::shard(&engine, 0, 1).unwrap()).into_owned();
    assert!(shard.contains("llm/param/") && !shard.contains("dit/"));
}

#[test]
fn a_step_that_asks_for_no_update_changes_nothing() {
    let (_folder, model) = base();
    duet_torch::init(1).unwrap();
    let mut engine = Engine::load(settings(&model)).unwrap();
    let before = (engine.version(), engine.digest().unwrap());
    let mut input = rollouts(1).input(0, (0, 1));
    input.step.update = false;
    assert!(engine.step(input, &Solo::new()).unwrap().is_empty());
    assert_eq!((engine.version(), engine.digest().unwrap()), before);
}

#[test]
fn a_step_out_of_order_is_refused() {
    let (_folder, model) = base();
    duet_torch::init(1).unwrap();
    let mut engine = Engine::load(settings(&model)).unwrap();
    let error = engine.step(rollouts(1).input(4, (0, 1)), &Solo::new()).unwrap_err();
    assert!(matches!(error, TrainError::Protocol(_)), "{error}");
}
