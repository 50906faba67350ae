//! Working for a coordinator: forms groups, restores, steps, writes artifacts, reports.
//!
//! ```text
//! next assignment --Rendezvous--> rank 0: serve a store, report where
//!                                 all: join, restore the checkpoint or the base model --> TrainerReady
//!                 --Step--------> fetch this rank's trees, step with the others,
//!                                 write weights (rank 0) and checkpoint shard --> StepDone
//!                 --Leave-------> end
//! any failure ------------------> TrainerFailed; then wait for the next rendezvous
//! group called off elsewhere ---> its collectives are aborted: a failure as any other
//! ```
//! Torch works on the device thread only; here is nothing but waiting.

use crate::engine::batch::{StepInput, TraceFiles, share};
use crate::error::TrainError;
use crate::rank::{Place, RankState, Stepped};
use duet_core::work::{Assignment, Rendezvous, Report, Step, StepDone, TrainTrace, Weights};
use duet_core::{ArtifactRef, PolicyVersion, Rank, TrainerEpoch};
use duet_store::keys::{self, Branch};
use duet_store::{Artifacts, Store};
use duet_torch::collective::AbortHandle;
use duet_torch::device::DeviceThread;
use std::future::Future;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Most characters of a reason that is reported.
const MOST_REASON: usize = 2000;

/// The coordinator, as a worker sees it.
pub trait Desk {
    /// Why there is nothing more to do: it cannot be reached, or this process is told to stop.
    type Error;

    /// The next assignment; waits until there is one.
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
}

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
        match desk.next().await? {
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
                let report = match trainer.step(step).await {
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
        Trainer { device, store, host, deadline, aborted, group: None }
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
        let shards = match &work.restore {
            Some(manifest) => self.fetch_shards(manifest).await?,
            None => Vec::new(),
        };
        let (version, digest) = flat(self.device.call(move |state| state.restore(shards)).await)?;
        tracing::info!(%version, digest = digest.short(), "restored");
        Ok(Report::TrainerReady { epoch: work.epoch, rank: work.rank, version, digest })
    }

    /// Every shard of a checkpoint, verified.
    async fn fetch_shards(
        &self,
        manifest: &ArtifactRef,
    ) -> Result<Vec<(String, Vec<u8>)>, TrainError> {
        let manifest = self.store.checkpoints().read(manifest).await.map_err(stored)?;
        let artifacts = self.store.artifacts();
        let mut shards = Vec::new();
        for shard in manifest.shards.iter().flatten() {
            shards.push((shard.key.clone(), fetch(&artifacts, shard).await?));
        }
        if shards.is_empty() {
            let reason = format!("{} names no trainer shards", keys::manifest(manifest.version));
            return Err(TrainError::Checkpoint(reason));
        }
        Ok(shards)
    }

    async fn step(&mut self, step: Step) -> Result<StepDone, TrainError> {
        let place = match &self.group {
            Some(group) if group.place.epoch == step.epoch => group.place.clone(),
            _ => {
                let reason = format!("a step for {}, which this rank is not in", step.epoch);
                return Err(TrainError::Protocol(reason));
            }
        };
        let (started, epoch, iteration) = (Instant::now(), step.epoch, step.iteration);
        let files = self.fetch_trees(&step, &place).await?;
        let input = StepInput { step, files };
        let stepped = flat(self.device.call(move |state| state.step(input)).await)?;
        let done = self.store_step(&place, stepped, iteration, epoch).await?;
        let took_ms = started.elapsed().as_millis() as u64;
        let digest = done.weights.digest.short();
        tracing::info!(iteration, rank = place.rank, digest, took_ms, "step done");
        Ok(done)
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
        epoch: TrainerEpoch,
    ) -> Result<StepDone, TrainError> {
        let Stepped { version, digest, metrics, weights, shard } = stepped;
        let (rank, files) = (Rank(place.rank), weights.unwrap_or_default());
        let llm = self.put_weights(version, Branch::Llm, epoch, files.llm).await?;
        let dit = self.put_weights(version, Branch::Dit, epoch, files.dit).await?;
        let mut shards = Vec::new();
        if let Some(bytes) = shard {
            let key = keys::shard(version, rank, place.world, epoch);
            shards.push(self.put(&key, bytes).await?);
        }
        let weights = Weights { version, llm, dit, digest };
        Ok(StepDone { epoch, rank, iteration, weights, shards, metrics })
    }

    async fn put_weights(
        &self,
        version: PolicyVersion,
        branch: Branch,
        epoch: TrainerEpoch,
        file: Option<Vec<u8>>,
    ) -> Result<Option<ArtifactRef>, TrainError> {
        match file {
            Some(bytes) => Ok(Some(self.put(&keys::weights(version, branch, epoch), bytes).await?)),
            None => Ok(None),
        }
    }

    async fn put(&self, key: &str, bytes: Vec<u8>) -> Result<ArtifactRef, TrainError> {
        self.store.artifacts().put(key, bytes.into()).await.map_err(stored)
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
