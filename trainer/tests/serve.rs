//! Two ranks working for a scripted coordinator: groups, steps, checkpoints, a group called off.

mod common;

use common::{pipeline, rollouts, settings};
use duet_core::work::{Assignment, Held, Rendezvous, Report, ShardDone, Step, StepDone};
use duet_core::{ArtifactRef, Digest, Generation, PolicyVersion, Rank, TrainerEpoch};
use duet_store::{Manifest, Store};
use duet_torch::device::DeviceThread;
use duet_trainer::TrainError;
use duet_trainer::engine::{OldPolicy, Settings};
use duet_trainer::rank::RankState;
use duet_trainer::serve::{Desk, Trainer, serve};
use std::path::Path;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// A rank, seen from the coordinator.
struct Worker {
    to: mpsc::Sender<Assignment>,
    from: mpsc::Receiver<Report>,
    task: JoinHandle<Result<String, Over>>,
}

struct Scripted {
    assignments: mpsc::Receiver<Assignment>,
    reports: mpsc::Sender<Report>,
}

/// The script is at its end.
#[derive(Debug)]
struct Over;

impl Desk for Scripted {
    type Error = Over;

    async fn next(&mut self) -> Result<Assignment, Over> {
        self.assignments.recv().await.ok_or(Over)
    }

    async fn report(&mut self, report: Report) -> Result<(), Over> {
        self.reports.send(report).await.map_err(|_| Over)
    }
}

fn worker(model: &Path, store: &Store, aborted: &watch::Sender<Option<TrainerEpoch>>) -> Worker {
    worker_with(settings(model), store, aborted)
}

fn worker_with(
    settings: Settings,
    store: &Store,
    aborted: &watch::Sender<Option<TrainerEpoch>>,
) -> Worker {
    let device = DeviceThread::spawn("device", move || RankState::new(settings, 1))
        .map_err(|e: TrainError| e);
    let place = ("127.0.0.1".to_owned(), Duration::from_secs(120));
    let mut trainer = Trainer::new(device.unwrap(), store.clone(), place, aborted.subscribe());
    let (to, assignments) = mpsc::channel(4);
    let (reports, from) = mpsc::channel(4);
    let mut desk = Scripted { assignments, reports };
    let task = tokio::spawn(async move { serve(&mut desk, &mut trainer).await });
    Worker { to, from, task }
}

/// Forms a group of two; gives the version and digest that both hold.
async fn form(
    workers: &mut [Worker; 2],
    epoch: u64,
    restore: Option<ArtifactRef>,
) -> (PolicyVersion, Digest) {
    form_at(workers, epoch, restore, None).await
}

/// As [`form`], where `newest` may still be held by a rank.
async fn form_at(
    workers: &mut [Worker; 2],
    epoch: u64,
    restore: Option<ArtifactRef>,
    newest: Option<Held>,
) -> (PolicyVersion, Digest) {
    let epoch = TrainerEpoch(epoch);
    let call = |rank: u32, store: Option<String>| {
        let (rank, restore) = (Rank(rank), restore.clone());
        Assignment::Rendezvous(Rendezvous { epoch, rank, world: 2, store, restore, newest })
    };
    workers[0].to.send(call(0, None)).await.unwrap();
    let Some(Report::StoreReady { address, .. }) = workers[0].from.recv().await else {
        panic!("rank 0 serves")
    };
    workers[1].to.send(call(1, Some(address))).await.unwrap();
    let mut held = Vec::new();
    for worker in workers {
        match worker.from.recv().await {
            Some(Report::TrainerReady { version, digest, .. }) => held.push((version, digest)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(held[0], held[1]);
    held[0]
}

/// Takes a step; gives each rank's report on it, and on its shard if it was to write one.
async fn step(workers: &mut [Worker; 2], step: &Step) -> ([StepDone; 2], Vec<ShardDone>) {
    for worker in workers.iter() {
        worker.to.send(Assignment::Step(step.clone())).await.unwrap();
    }
    let (mut done, mut shards) = (Vec::new(), Vec::new());
    for worker in workers {
        // In either order: a shard is written beside what else there is to do.
        for _ in 0..1 + u32::from(step.checkpoint) {
            match worker.from.recv().await {
                Some(Report::StepDone(one)) => done.push(one),
                Some(Report::ShardDone(one)) => shards.push(one),
                other => panic!("{other:?}"),
            }
        }
    }
    (done.try_into().expect("two"), shards)
}

/// Puts a rollout's files into the store and gives the step that trains on them.
async fn stored_step(store: &Store, epoch: u64, iteration: u32) -> Step {
    let input = rollouts(3).input(iteration, (0, 1));
    let mut step = input.step;
    step.epoch = TrainerEpoch(epoch);
    (step.publish, step.checkpoint) = (true, true);
    let put = |key: String, bytes: Vec<u8>| async move {
        store.artifacts().put(&key, bytes.into()).await.unwrap()
    };
    for (tree, files) in step.trees.iter_mut().zip(input.files) {
        for (trace, files) in tree.traces.iter_mut().zip(files) {
            trace.artifact = put(trace.artifact.key.clone(), files.think).await;
            if let (Some(at), Some(bytes)) = (&mut trace.render, files.render) {
                *at = put(at.key.clone(), bytes).await;
            }
        }
    }
    step
}

fn manifest(done: &[StepDone; 2], shards: &[ShardDone]) -> Manifest {
    Manifest {
        format: duet_store::checkpoint::FORMAT.to_owned(),
        version: done[0].weights.version,
        world: 2,
        shards: shards.iter().map(|one| one.shards.clone()).collect(),
        weights: done[0].weights.clone(),
        scheduler: None,
        journal_position: 0,
        generation: Generation(1),
        run: "test".to_owned(),
        config: Digest::of(b"config"),
        created_unix_ms: 0,
        notes: Default::default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_form_step_restore_and_form_again_after_being_called_off() {
    let folder = tempfile::tempdir().unwrap();
    pipeline().save(folder.path()).unwrap();
    let store = Store::memory();
    let aborted = watch::Sender::new(None);
    let mut workers = [0, 1].map(|_| worker(folder.path(), &store, &aborted));

    let (version, base) = form(&mut workers, 1, None).await;
    assert_eq!(version, PolicyVersion(0));
    let first = stored_step(&store, 1, 0).await;
    let (done, shards) = step(&mut workers, &first).await;
    assert_eq!(done[0].weights.digest, done[1].weights.digest);
    assert_ne!(done[0].weights.digest, base);
    assert_eq!(done[0].metrics, done[1].metrics);
    assert!(done[0].weights.llm.is_some() && done[0].weights.dit.is_some());
    assert!(done[1].weights.llm.is_none() && done[1].weights.dit.is_none());
    assert_eq!(shards.iter().map(|one| one.shards.len()).collect::<Vec<_>>(), [1, 1]);
    assert!(shards.iter().all(|one| one.version == done[0].weights.version));
    let saved = store.checkpoints().write(&manifest(&done, &shards)).await.unwrap();

    // A second step, to be repeated from the checkpoint.
    let second = Step { iteration: 1, publish: false, checkpoint: false, ..first.clone() };
    let (two, none) = step(&mut workers, &second).await;
    assert!(none.is_empty());
    assert_eq!(form(&mut workers, 2, Some(saved.clone())).await.1, done[0].weights.digest);
    let again = Step { epoch: TrainerEpoch(2), ..second.clone() };
    let (repeated, _) = step(&mut workers, &again).await;
    assert_eq!(repeated[0].weights.digest, two[0].weights.digest);
    assert_eq!(repeated[0].metrics, two[0].metrics);

    // Rank 1 never hears of the next step; the group is called off, and rank 0 says so.
    let third = Step { epoch: TrainerEpoch(2), iteration: 2, ..second };
    workers[0].to.send(Assignment::Step(third)).await.unwrap();
    aborted.send_replace(Some(TrainerEpoch(2)));
    match workers[0].from.recv().await {
        Some(Report::TrainerFailed { epoch, kind, reason, .. }) => {
            assert_eq!((epoch, kind.as_str()), (TrainerEpoch(2), "collective"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(form(&mut workers, 3, Some(saved)).await.1, done[0].weights.digest);

    for worker in workers {
        worker.to.send(Assignment::Leave { reason: "over".to_owned() }).await.unwrap();
        assert_eq!(worker.task.await.unwrap().unwrap(), "over");
    }
}

/// Three steps by two ranks, of which the third is begun, called off and taken by a new group: of the
/// same processes, or with one of them replaced by a new one. Gives what all that was at: the version
/// that the new group formed at, the weights in the end, the shards in the end.
async fn disturbed(
    settings: &Settings,
    replaced: Option<usize>,
) -> (PolicyVersion, Digest, Vec<Digest>) {
    let store = Store::memory();
    let aborted = watch::Sender::new(None);
    let mut workers = [0, 1].map(|_| worker_with(settings.clone(), &store, &aborted));
    form(&mut workers, 1, None).await;
    let first = stored_step(&store, 1, 0).await;
    let first = Step { checkpoint: false, ..first };
    step(&mut workers, &first).await;
    let second = Step { iteration: 1, publish: false, ..first };
    let (done, _) = step(&mut workers, &second).await;
    let weights = &done[0].weights;
    let newest = Some(Held { version: weights.version, digest: weights.digest });
    // Rank 1 never hears of the step; rank 0 leaves in the midst of it.
    let third = Step { iteration: 2, ..second };
    workers[0].to.send(Assignment::Step(third.clone())).await.unwrap();
    aborted.send_replace(Some(TrainerEpoch(1)));
    let report = workers[0].from.recv().await;
    assert!(matches!(report, Some(Report::TrainerFailed { .. })), "{report:?}");
    if let Some(rank) = replaced {
        workers[rank] = worker_with(settings.clone(), &store, &aborted);
    }
    let (formed, _) = form_at(&mut workers, 2, None, newest).await;
    let (mut done, mut shards) = (None, Vec::new());
    for iteration in formed.0 as u32..3 {
        let checkpoint = iteration == 2;
        let next = Step { epoch: TrainerEpoch(2), iteration, checkpoint, ..third.clone() };
        let taken = step(&mut workers, &next).await;
        (done, shards) = (Some(taken.0), taken.1);
    }
    let shards = shards.iter().flat_map(|one| &one.shards).map(|shard| shard.digest).collect();
    (formed, done.unwrap()[0].weights.digest, shards)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_rank_takes_the_state_from_one_that_holds_it_and_nothing_is_repeated() {
    let folder = tempfile::tempdir().unwrap();
    pipeline().save(folder.path()).unwrap();
    let mut settings = settings(folder.path());
    (settings.llm.ema, settings.dit.ema) = (0.5, 0.75);
    settings.dit.old = OldPolicy::Rising;
    let (kept, weights, shards) = disturbed(&settings, None).await;
    assert_eq!((kept, shards.len()), (PolicyVersion(2), 2));
    for replaced in [0, 1] {
        let (version, digest, found) = disturbed(&settings, Some(replaced)).await;
        assert_eq!(version, PolicyVersion(2), "nothing is repeated");
        assert_eq!(digest, weights);
        // Moments, averages and counters, too.
        assert_eq!(found, shards, "rank {replaced} was replaced");
    }
    // A share of the optimiser's state that was lost is nobody's to give: from the base model on.
    settings.sharing.zero = 1;
    let (version, digest, found) = disturbed(&settings, Some(1)).await;
    assert_eq!((version, digest), (PolicyVersion(0), weights));
    let (version, digest, whole) = disturbed(&settings, None).await;
    assert_eq!((version, digest), (PolicyVersion(2), weights));
    assert_eq!(found, whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_is_reported_and_the_rank_lives_on() {
    let folder = tempfile::tempdir().unwrap();
    pipeline().save(folder.path()).unwrap();
    let store = Store::memory();
    let aborted = watch::Sender::new(None);
    let mut worker = worker(folder.path(), &store, &aborted);
    let failed = |report: Option<Report>| match report {
        Some(Report::TrainerFailed { kind, reason, .. }) => (kind, reason),
        other => panic!("{other:?}"),
    };

    // A step without a group.
    let step = rollouts(1).input(0, (0, 1)).step;
    worker.to.send(Assignment::Step(step.clone())).await.unwrap();
    assert_eq!(failed(worker.from.recv().await).0, "protocol");

    // A checkpoint that is not there.
    let restore = Some(ArtifactRef {
        key: "checkpoints/step-00000009/manifest.json".to_owned(),
        digest: Digest::of(b"nothing"),
        bytes: 7,
    });
    let (epoch, rank) = (TrainerEpoch(1), Rank(0));
    let call = Rendezvous { epoch, rank, world: 1, store: None, restore, newest: None };
    worker.to.send(Assignment::Rendezvous(call.clone())).await.unwrap();
    assert!(matches!(worker.from.recv().await, Some(Report::StoreReady { .. })));
    let (kind, reason) = failed(worker.from.recv().await);
    assert_eq!(kind, "artifact", "{reason}");

    // Artifacts that are not there.
    let call = Rendezvous { restore: None, ..call };
    worker.to.send(Assignment::Rendezvous(call)).await.unwrap();
    assert!(matches!(worker.from.recv().await, Some(Report::StoreReady { .. })));
    assert!(matches!(worker.from.recv().await, Some(Report::TrainerReady { .. })));
    worker.to.send(Assignment::Step(step)).await.unwrap();
    let (kind, reason) = failed(worker.from.recv().await);
    assert!(kind == "artifact" && reason.contains("i0/t0/think-0"), "{kind} {reason}");
}
