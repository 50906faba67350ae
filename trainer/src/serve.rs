//! Working for a coordinator: forms groups, restores, steps, writes artifacts, reports.
//!
//! ```text
//! next assignment --Rendezvous--> rank 0: serve a store, report where
//!                                 all: join; go on from what a rank still holds, or restore the
//!                                 checkpoint or the base model --> TrainerReady
//!                 --Step--------> fetch this rank's trees, step with the others,
//!                                 write weights (rank 0) --> StepDone
//!                                 copy the checkpoint shard; write it beside the next steps
//!                                                                             --> ShardDone
//!                 --Leave-------> end
//! any failure ------------------> TrainerFailed; then wait for the next rendezvous
//! group called off elsewhere ---> its collectives are aborted: a failure as any other
//! ```
//! Torch works on the device thread only; here is nothing but waiting.

use crate::engine::batch::{StepInput, TraceFiles, share};
use crate::error::TrainError;
use crate::rank::{Place, RankState, Stepped};
use crate::saver::Saver;
use crate::shards;
use duet_core::work::{Assignment, Rendezvous, Report, Step, StepDone, TrainTrace, Weights};
use duet_core::{ArtifactRef, Digest, PolicyVersion, Rank, TrainerEpoch};
use duet_store::keys::{self, Branch};
use duet_store::{Artifacts, Store};
use duet_torch::collective::AbortHandle;
use duet_torch::device::DeviceThread;
use duet_torch::tensorfile::TensorFile;
use std::collections::BTreeMap;
use std::future::Future;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// Most characters of a reason that is reported.
const MOST_REASON: usize = 2000;

/// The coordinator, as a worker sees it.
pub trait Desk {
    /// Why there is nothing more to do: it cannot be reached, or this process is told to stop.
    type Error;

    /// The next assignment; waits until there is one. May be dropped and called again.
    fn next(&mut self) -> impl Future<Output = Result<Assignment, Self::Error>>;

    /// Delivers a report.
    fn report(&mut self, report: Report) -> impl Future<Output = Result<(), Self::Error>>;
}

/// What carries assignments out.
pub struct Trainer {
    device: DeviceThread<RankState>,
    store: Store,
    /// This machine's address, as the other ranks reach it.
    host: String,
    /// Bound on forming a group and on each collective operation.
    deadline: Duration,
    /// The newest group that was called off.
    aborted: watch::Receiver<Option<TrainerEpoch>>,
    group: Option<Group>,
    saver: Saver,
    /// The weights files that this process published last, by branch.
    published: Published,
    /// What became of shards, to be reported.
    saved: mpsc::Receiver<Report>,
}

/// The newest weights file of each branch, by `llm` and `dit`.
type Published = BTreeMap<&'static str, ArtifactRef>;

/// The group this rank is in.
struct Group {
    place: Place,
    abort: AbortHandle,
    /// Aborts it when it is called off.
    watcher: JoinHandle<()>,
}

impl Drop for Group {
    fn drop(&mut self) {
        // Whoever still waits in it waits in vain.
        self.abort.abort();
        self.watcher.abort();
    }
}

/// Works until the coordinator says to leave; returns its reason.
///
/// # Errors
/// The desk's, between assignments: a step in hand is always finished and reported.
pub async fn serve<D: Desk>(desk: &mut D, trainer: &mut Trainer) -> Result<String, D::Error> {
    loop {
        let assignment = tokio::select! {
            biased;
            Some(report) = trainer.saved.recv() => {
                trainer.tell_saved(desk, report).await?;
                continue;
            }
            assignment = desk.next() => assignment?,
        };
        match assignment {
            Assignment::Leave { reason } => return Ok(reason),
            Assignment::Rendezvous(work) => {
                let (epoch, rank) = (work.epoch, work.rank);
                let report = match trainer.rendezvous(desk, work).await? {
                    Ok(ready) => ready,
                    Err(error) => trainer.failed(epoch, rank, &error).await,
                };
                desk.report(report).await?;
            }
            Assignment::Step(step) => {
                let epoch = step.epoch;
                let rank = Rank(trainer.group.as_ref().map_or(0, |group| group.place.rank));
                let report = match trainer.step_and_tell(desk, step).await? {
                    Ok(done) => Report::StepDone(done),
                    Err(error) => trainer.failed(epoch, rank, &error).await,
                };
                desk.report(report).await?;
            }
            Assignment::Lease(_) | Assignment::Publish(_) => {
                tracing::warn!("an assignment for a rollout worker came to a trainer: passed over");
            }
        }
    }
}

impl Trainer {
    /// A trainer with this device thread and this store.
    pub fn new(
        device: DeviceThread<RankState>,
        store: Store,
        (host, deadline): (String, Duration),
        aborted: watch::Receiver<Option<TrainerEpoch>>,
    ) -> Trainer {
        let (saver, saved) = Saver::new(store.clone());
        Trainer {
            device,
            store,
            host,
            deadline,
            aborted,
            group: None,
            saver,
            published: Published::new(),
            saved,
        }
    }

    /// Gives everything of libtorch back: it must not be at work when the process ends.
    pub async fn end(self) {
        // A thread that is gone holds nothing.
        let _ = self.device.call(RankState::end).await;
    }

    /// Forms a group and restores; the outer error is the desk's.
    async fn rendezvous<D: Desk>(
        &mut self,
        desk: &mut D,
        work: Rendezvous,
    ) -> Result<Result<Report, TrainError>, D::Error> {
        let place = self.enter(&work);
        tracing::info!(epoch = place.epoch.0, rank = place.rank, world = place.world, "rendezvous");
        if work.store.is_none() {
            let own = place.clone();
            let served = self.device.call(move |state| state.serve(&own)).await;
            match flat(served) {
                Ok(address) => {
                    desk.report(Report::StoreReady { epoch: work.epoch, address }).await?;
                }
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(self.join(place, work).await)
    }

    /// Leaves the group before, and watches the new one.
    fn enter(&mut self, work: &Rendezvous) -> Place {
        self.group = None;
        // What another group published meanwhile may have made these nobody's.
        self.published.clear();
        let (epoch, abort) = (work.epoch, AbortHandle::default());
        let (mut aborted, handle) = (self.aborted.clone(), abort.clone());
        let watcher = tokio::spawn(async move {
            let over = aborted.wait_for(|newest| newest.is_some_and(|newest| newest >= epoch));
            if over.await.is_ok() {
                tracing::info!(epoch = epoch.0, "the group was called off");
                handle.abort();
            }
        });
        let place = Place {
            epoch,
            rank: work.rank.0,
            world: work.world,
            host: self.host.clone(),
            deadline: self.deadline,
        };
        self.group = Some(Group { place: place.clone(), abort, watcher });
        place
    }

    async fn join(&mut self, place: Place, work: Rendezvous) -> Result<Report, TrainError> {
        let abort = self.group.as_ref().map(|group| group.abort.clone()).unwrap_or_default();
        let (own, address) = (place.clone(), work.store.clone());
        flat(self.device.call(move |state| state.join(&own, address.as_deref(), abort)).await)?;
        let newest = work.newest;
        let held = flat(self.device.call(move |state| state.go_on(newest)).await)?;
        let (version, digest) = match held {
            Some(held) => held,
            None => self.restore(&work).await?,
        };
        Ok(Report::TrainerReady { epoch: work.epoch, rank: work.rank, version, digest })
    }

    async fn restore(&self, work: &Rendezvous) -> Result<(PolicyVersion, Digest), TrainError> {
        let shards = match &work.restore {
            Some(manifest) => self.open_shards(manifest).await?,
            None => Vec::new(),
        };
        let (version, digest) = flat(self.device.call(move |state| state.restore(shards)).await)?;
        tracing::info!(%version, digest = digest.short(), "restored");
        Ok((version, digest))
    }

    async fn open_shards(&self, manifest: &ArtifactRef) -> Result<Vec<TensorFile>, TrainError> {
        let manifest = self.store.checkpoints().read(manifest).await.map_err(stored)?;
        shards::open(&self.store, &manifest).await
    }

    /// Reports what became of a shard, and leaves the group with it if that is a failure.
    async fn tell_saved<D: Desk>(&mut self, desk: &mut D, report: Report) -> Result<(), D::Error> {
        if let Report::TrainerFailed { epoch, .. } = &report
            && self.group.as_ref().is_some_and(|group| group.place.epoch == *epoch)
        {
            self.group = None;
            let _ = self.device.call(RankState::leave).await;
        }
        desk.report(report).await
    }

    /// A step; meanwhile, shards of steps before are reported as soon as they are durable.
    async fn step_and_tell<D: Desk>(
        &mut self,
        desk: &mut D,
        step: Step,
    ) -> Result<Result<StepDone, TrainError>, D::Error> {
        let Trainer { device, store, group, saver, published, saved, .. } = self;
        let stepper = Stepper { device, store, group: group.as_ref() };
        let mut done = std::pin::pin!(stepper.step((saver, published), step));
        loop {
            tokio::select! {
                biased;
                Some(report) = saved.recv() => desk.report(report).await?,
                done = &mut done => return Ok(done),
            }
        }
    }

    /// Leaves the group that failed and says why.
    async fn failed(&mut self, epoch: TrainerEpoch, rank: Rank, error: &TrainError) -> Report {
        let kind = error.kind().to_owned();
        let reason: String = error.to_string().chars().take(MOST_REASON).collect();
        tracing::warn!(epoch = epoch.0, rank = rank.0, kind, reason, "out of the group");
        self.group = None;
        // A thread that is gone has no group either.
        let _ = self.device.call(RankState::leave).await;
        Report::TrainerFailed { epoch, rank, kind, reason }
    }
}

/// What a step works with.
struct Stepper<'a> {
    device: &'a DeviceThread<RankState>,
    store: &'a Store,
    group: Option<&'a Group>,
}

impl Stepper<'_> {
    async fn step(
        &self,
        (saver, published): (&mut Saver, &mut Published),
        step: Step,
    ) -> Result<StepDone, TrainError> {
        let place = match self.group {
            Some(group) if group.place.epoch == step.epoch => group.place.clone(),
            _ => {
                let reason = format!("a step for {}, which this rank is not in", step.epoch);
                return Err(TrainError::Protocol(reason));
            }
        };
        let (started, iteration) = (Instant::now(), step.iteration);
        let checkpoint = step.checkpoint;
        let files = self.fetch_trees(&step, &place).await?;
        let input = StepInput { step, files };
        let stepped = flat(self.device.call(move |state| state.step(input)).await)?;
        let version = stepped.version;
        let done = self.store_step(&place, stepped, iteration, published).await?;
        if checkpoint {
            self.save(saver, &place, version).await?;
        }
        let took_ms = started.elapsed().as_millis() as u64;
        let digest = done.weights.digest.short();
        tracing::info!(iteration, rank = place.rank, digest, took_ms, "step done");
        Ok(done)
    }

    /// Copies this rank's shard and begins to write it.
    async fn save(
        &self,
        saver: &mut Saver,
        place: &Place,
        version: PolicyVersion,
    ) -> Result<(), TrainError> {
        let asked = Instant::now();
        let memory = saver.memory().await?;
        let (waited_ms, asked) = (asked.elapsed().as_millis() as u64, Instant::now());
        let image = flat(self.device.call(move |state| state.shard(memory)).await)?;
        let (bytes, copied_ms) = (image.len(), asked.elapsed().as_millis() as u64);
        tracing::info!(%version, rank = place.rank, bytes, waited_ms, copied_ms, "shard copied");
        saver.begin(place, version, image);
        Ok(())
    }

    /// The artifacts of this rank's trees, verified.
    async fn fetch_trees(
        &self,
        step: &Step,
        place: &Place,
    ) -> Result<Vec<Vec<TraceFiles>>, TrainError> {
        let artifacts = self.store.artifacts();
        let mut files = Vec::new();
        for tree in share(&step.trees, place.rank, place.world) {
            let mut of_tree = Vec::with_capacity(tree.traces.len());
            for trace in &tree.traces {
                of_tree.push(fetch_trace(&artifacts, trace).await?);
            }
            files.push(of_tree);
        }
        Ok(files)
    }

    /// Writes what a step left behind, before it is reported.
    async fn store_step(
        &self,
        place: &Place,
        stepped: Stepped,
        iteration: u32,
        published: &mut Published,
    ) -> Result<StepDone, TrainError> {
        let Stepped { version, digest, metrics, weights } = stepped;
        let (rank, epoch, files) = (Rank(place.rank), place.epoch, weights.unwrap_or_default());
        let key = |branch| keys::weights(version, branch, epoch);
        let llm = self.publish(key(Branch::Llm), Branch::Llm, files.llm, published).await?;
        let dit = self.publish(key(Branch::Dit), Branch::Dit, files.dit, published).await?;
        let weights = Weights { version, llm, dit, digest };
        Ok(StepDone { epoch, rank, iteration, weights, metrics })
    }

    /// Writes a branch's weights, unless they are what was published last: a branch that is frozen, or
    /// whose turn it was not, is not sent again, and who has the file need not fetch it.
    async fn publish(
        &self,
        key: String,
        branch: Branch,
        file: Option<Vec<u8>>,
        published: &mut Published,
    ) -> Result<Option<ArtifactRef>, TrainError> {
        let Some(bytes) = file else { return Ok(None) };
        let name = branch.as_str();
        let size = bytes.len() as u64;
        if let Some(last) = published.get(name).filter(|last| last.bytes == size)
            && last.digest == Digest::of(&bytes)
        {
            tracing::info!(branch = name, key = last.key, "unchanged: published before");
            return Ok(Some(last.clone()));
        }
        let reference = self.put(&key, bytes).await?;
        published.insert(name, reference.clone());
        Ok(Some(reference))
    }

    async fn put(&self, key: &str, bytes: Vec<u8>) -> Result<ArtifactRef, TrainError> {
        self.store.artifacts().put(key, bytes.into()).await.map_err(stored)
    }
}

async fn fetch_trace(artifacts: &Artifacts, trace: &TrainTrace) -> Result<TraceFiles, TrainError> {
    let think = fetch(artifacts, &trace.artifact).await?;
    let render = match &trace.render {
        Some(render) => Some(fetch(artifacts, render).await?),
        None => None,
    };
    Ok(TraceFiles { think, render })
}

async fn fetch(artifacts: &Artifacts, file: &ArtifactRef) -> Result<Vec<u8>, TrainError> {
    artifacts.get(file).await.map(Vec::from).map_err(stored)
}

fn stored(error: duet_store::StoreError) -> TrainError {
    TrainError::Store(error.to_string())
}

/// An error of the thread and one of the work are the same to the caller.
fn flat<T>(
    result: Result<Result<T, TrainError>, duet_torch::device::DeviceError>,
) -> Result<T, TrainError> {
    result?
}
