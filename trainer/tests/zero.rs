//! Optimiser state and gradients shared out among real ranks: the same bits as where every rank holds
//! all, and checkpoints that any number of ranks reads.

mod common;

use common::{Rollouts, pipeline, ranks, rollouts, settings, settings_with_adapter};
use duet_models::loss::{DitObjective, LlmObjective};
use duet_torch::Tensors;
use duet_torch::collective::{Collective, Solo};
use duet_torch::tensorfile::{Assembly, TensorFile};
use duet_trainer::engine::gradient::Sharing;
use duet_trainer::engine::layout::Seat;
use duet_trainer::engine::{Engine, OldPolicy, Settings, WeightFiles, checkpoint};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use tch::Kind;

const STEPS: u32 = 3;
const MAX_NORM: f64 = 1e-4;

fn base() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    pipeline().save(folder.path()).unwrap();
    let path = folder.path().to_path_buf();
    (folder, path)
}

/// With averages, a policy that lags, and a gradient that is always clipped.
fn demanding(mut settings: Settings) -> Settings {
    settings.max_grad_norm = MAX_NORM;
    (settings.llm.ema, settings.dit.ema) = (0.5, 0.75);
    settings.dit.old = OldPolicy::Rising;
    // Ratios far from one count, so that later steps have gradients too.
    settings.llm_loss.objective = LlmObjective::Ppo { clip_low: 0.9, clip_high: 9.0, dual: None };
    settings.dit_loss.objective = DitObjective::Clip { range: 1e9 };
    settings
}

fn sharing(zero: u32, each_micro_batch: bool, overlap: bool) -> Sharing {
    Sharing { zero, each_micro_batch, overlap, bucket_bytes: 16 << 10 }
}

/// What a rank ends with.
#[derive(Clone)]
struct End {
    metrics: Vec<BTreeMap<String, u64>>,
    digest: String,
    published: WeightFiles,
    shard: Vec<u8>,
}

fn end(engine: &Engine, metrics: Vec<BTreeMap<String, f64>>, seat: (u32, u32)) -> End {
    let bits =
        |one: BTreeMap<String, f64>| one.into_iter().map(|(n, v)| (n, v.to_bits())).collect();
    End {
        metrics: metrics.into_iter().map(bits).collect(),
        digest: engine.digest().unwrap().to_string(),
        published: engine.weight_files().unwrap(),
        shard: checkpoint::shard(engine, seat.0, seat.1).unwrap(),
    }
}

fn run(settings: &Settings, rollouts: &Rollouts, group: &dyn Collective) -> End {
    duet_torch::init(1).unwrap();
    tch::set_num_threads(1);
    let mut engine = Engine::load(settings.clone()).unwrap();
    let seat = (group.rank(), group.world());
    let step = |i| engine.step(rollouts.input(i, seat), group).unwrap();
    let metrics: Vec<_> = (0..STEPS).map(step).collect();
    for one in &metrics {
        assert!(one["llm/grad_norm"] > MAX_NORM && one["dit/grad_norm"] > MAX_NORM, "clipped");
    }
    end(&engine, metrics, seat)
}

fn files(ends: &[End]) -> Vec<TensorFile> {
    let open = |end: &End| TensorFile::from_bytes("shard", end.shard.clone()).unwrap();
    ends.iter().map(open).collect()
}

/// The state that all ranks hold together.
fn state(ends: &[End]) -> Tensors {
    Assembly::new(files(ends)).unwrap().load_all().unwrap()
}

/// Every way to share out is every other, bit for bit: losses, norms, weights, moments, averages.
fn same_bits(settings: Settings, worlds: &[u32]) {
    let rollouts = Arc::new(rollouts(5));
    for world in worlds {
        for each_micro_batch in [false, true] {
            let run = |zero, overlap| {
                let mut settings = settings.clone();
                settings.sharing = sharing(zero, each_micro_batch, overlap);
                let rollouts = rollouts.clone();
                ranks(*world, move |group| run(&settings, &rollouts, group))
            };
            let expected = run(0, false);
            let held = state(&expected);
            assert!(held.keys().any(|name| name.starts_with("dit/ema/")));
            for zero in [0, 1, 2] {
                let found = run(zero, true);
                for (rank, end) in found.iter().enumerate() {
                    let place = format!("zero {zero}, rank {rank} of {world}, {each_micro_batch}");
                    assert_eq!(end.metrics, expected[0].metrics, "{place}");
                    assert_eq!(end.digest, expected[0].digest, "{place}");
                    assert_eq!(end.published, expected[0].published, "{place}");
                }
                assert_eq!(state(&found), held, "zero {zero}, {world} ranks, {each_micro_batch}");
            }
        }
    }
}

#[test]
fn all_weights_are_trained_to_the_same_bits_however_the_state_is_shared_out() {
    let (_folder, model) = base();
    same_bits(demanding(settings(&model)), &[1, 2, 3, 4]);
}

#[test]
fn adapters_are_trained_to_the_same_bits_however_the_state_is_shared_out() {
    let (_folder, model) = base();
    same_bits(demanding(settings_with_adapter(&model)), &[2, 3]);
}

#[test]
fn half_precision_is_trained_to_the_same_bits_however_the_state_is_shared_out() {
    let (_folder, model) = base();
    let mut settings = demanding(settings(&model));
    (settings.load.lm, settings.load.dit) = (Kind::BFloat16, Kind::BFloat16);
    same_bits(settings, &[2, 4]);
}

#[test]
fn what_four_ranks_saved_any_number_resumes() {
    let (_folder, model) = base();
    let rollouts = Arc::new(rollouts(5));
    let mut settings = demanding(settings(&model));
    settings.sharing = sharing(2, true, true);
    let (s, r) = (settings.clone(), rollouts.clone());
    let saved = ranks(4, move |group| run(&s, &r, group));
    assert!(
        saved.iter().all(|end| end.shard.len() < state_bytes(&saved) / 3),
        "each has its share"
    );
    let (held, digest) = (state(&saved), saved[0].digest.clone());
    let resume = |world: u32, zero: u32| {
        let (mut settings, rollouts, saved) = (settings.clone(), rollouts.clone(), saved.clone());
        settings.sharing.zero = zero;
        let resumed = move |group: &dyn Collective| {
            tch::set_num_threads(1);
            let (rank, world) = (group.rank(), group.world());
            let mut engine = Engine::load(settings.clone()).unwrap();
            engine.sit(Seat { rank, world }).unwrap();
            checkpoint::restore(&mut engine, files(&saved)).unwrap();
            let before = end(&engine, Vec::new(), (rank, world));
            let step = engine.step(rollouts.input(STEPS, (rank, world)), group).unwrap();
            (before, end(&engine, vec![step], (rank, world)))
        };
        let (before, after): (Vec<_>, Vec<_>) = ranks(world, resumed).into_iter().unzip();
        assert_eq!(before[0].digest, digest);
        assert_eq!(state(&before), held, "{world} ranks hold what four saved");
        after
    };
    for world in [1, 2, 3] {
        let (shared, whole) = (resume(world, 2), resume(world, 0));
        assert_eq!(shared[0].metrics, whole[0].metrics);
        assert_eq!(shared[0].digest, whole[0].digest);
        assert_eq!(state(&shared), state(&whole));
    }

    let mut engine = Engine::load(settings).unwrap();
    let missing = files(&saved[..3]);
    let error = checkpoint::restore(&mut engine, missing).unwrap_err();
    assert!(error.kind() == "checkpoint" && error.to_string().contains("missing"), "{error}");
}

fn state_bytes(ends: &[End]) -> usize {
    ends.iter().map(|end| end.shard.len()).sum()
}

/// When sums over ranks are made changes no more than rounding.
#[test]
fn summing_after_each_micro_batch_is_summing_once() {
    let (_folder, model) = base();
    let rollouts = Arc::new(rollouts(5));
    let run = |each_micro_batch: bool| {
        let mut settings = settings(&model);
        settings.sharing = sharing(2, each_micro_batch, true);
        let rollouts = rollouts.clone();
        let steps = move |group: &dyn Collective| {
            let mut engine = Engine::load(settings.clone()).unwrap();
            let seat = (group.rank(), group.world());
            (0..STEPS).map(|i| engine.step(rollouts.input(i, seat), group).unwrap()).collect()
        };
        let mut all: Vec<Vec<BTreeMap<String, f64>>> = ranks(2, steps);
        all.remove(0)
    };
    for (once, often) in run(false).iter().zip(&run(true)) {
        for (name, value) in once {
            let gap = (value - often[name]).abs();
            assert!(gap <= 1e-4 * (1e-2 + value.abs()), "{name}: {value} {}", often[name]);
        }
    }
}

#[test]
fn a_share_is_of_no_use_to_another_group() {
    let (_folder, model) = base();
    let rollouts = Arc::new(rollouts(2));
    let mut settings = settings(&model);
    settings.sharing = sharing(1, false, true);
    let errors = ranks(2, move |group| {
        let mut engine = Engine::load(settings.clone()).unwrap();
        engine.step(rollouts.input(0, (group.rank(), 2)), group).unwrap();
        engine.step(rollouts.input(1, (0, 1)), &Solo::new()).unwrap_err().to_string()
    });
    assert!(errors.iter().all(|text| text.contains("must be restored")), "{errors:?}");
}
