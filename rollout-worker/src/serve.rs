//! Working for a coordinator: takes assignments, has the device thread carry them out, writes
//! artifacts, reports.
//!
//! ```text
//! next assignment --Lease--> fetch inputs, device thread, write artifacts --> report
//!                 --Publish--> fetch files, hold them --> acknowledge
//!                 --Leave--> end
//! ```
//! One assignment at a time: the device has one thread. Heartbeats go on meanwhile, elsewhere.

use crate::engine::{Engine, StoredThought};
use crate::error::WorkError;
use crate::policies::WeightFiles;
use duet_core::work::{
    Assignment, Done, Lease, LeaseId, Outcome, RenderWork, Report, ThinkWork, Trace, Unit, Weights,
    Work,
};
use duet_core::{ArtifactRef, Millis};
use duet_store::{Artifacts, keys};
use duet_torch::device::DeviceThread;
use std::future::Future;
use std::time::Instant;

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
pub struct Worker {
    device: DeviceThread<Engine>,
    artifacts: Artifacts,
}

/// Works until the coordinator says to leave; returns its reason.
///
/// # Errors
/// The desk's, between assignments: an assignment in hand is always finished and reported.
pub async fn serve<D: Desk>(desk: &mut D, worker: &Worker) -> Result<String, D::Error> {
    loop {
        let assignment = desk.next().await?;
        let report = match assignment {
            Assignment::Leave { reason } => return Ok(reason),
            Assignment::Lease(lease) => worker.lease(lease).await,
            Assignment::Publish(weights) => worker.publish(weights).await,
            Assignment::Rendezvous(_) | Assignment::Step(_) => {
                tracing::warn!("an assignment for a trainer came to a rollout worker: passed over");
                continue;
            }
        };
        desk.report(report).await?;
    }
}

impl Worker {
    /// A worker with this engine and this artifact store.
    pub fn new(device: DeviceThread<Engine>, artifacts: Artifacts) -> Worker {
        Worker { device, artifacts }
    }

    /// Carries a lease out; a failure becomes part of the report.
    async fn lease(&self, lease: Lease) -> Report {
        let (id, started) = (lease.id, Instant::now());
        let result = match lease.work {
            Work::Think(work) => self.think(id, work).await,
            Work::Render(work) => self.render(id, work).await,
            Work::Score(_) => Err(WorkError::Refused("a rollout worker scores nothing".to_owned())),
        };
        let took = Millis(started.elapsed().as_millis() as u64);
        let (unit, stage) = (id.unit.place(), id.unit.stage());
        let outcome = match result {
            Ok(result) => {
                tracing::info!(unit, stage, attempt = id.attempt.0, took_ms = took.0, "lease done");
                Outcome::Done { result, took }
            }
            Err(error) => {
                let (kind, reason) = (error.kind().to_owned(), error.to_string());
                tracing::warn!(unit, stage, attempt = id.attempt.0, kind, reason, "lease failed");
                Outcome::Failed { kind, reason }
            }
        };
        Report::Lease { id, outcome }
    }

    async fn publish(&self, weights: Weights) -> Report {
        let version = weights.version;
        match self.hold(&weights).await {
            Ok(()) => {
                tracing::info!(%version, digest = weights.digest.short(), "policy held");
                Report::PublishAck { version }
            }
            Err(error) => {
                let reason = error.to_string();
                tracing::warn!(%version, reason, "policy refused");
                Report::PublishFailed { version, reason }
            }
        }
    }

    /// Fetches a policy's files, unless it is held already.
    async fn hold(&self, weights: &Weights) -> Result<(), WorkError> {
        let asked = weights.clone();
        if self.device.call(move |engine| engine.holds(&asked)).await? {
            return Ok(());
        }
        let files = WeightFiles {
            llm: self.fetch_new(weights.llm.as_ref()).await?,
            dit: self.fetch_new(weights.dit.as_ref()).await?,
        };
        let weights = weights.clone();
        self.device.call(move |engine| engine.hold(&weights, files)).await?
    }

    /// A weights file, unless a held version has it already.
    async fn fetch_new(&self, file: Option<&ArtifactRef>) -> Result<Option<Vec<u8>>, WorkError> {
        let Some(file) = file else { return Ok(None) };
        let asked = file.clone();
        if self.device.call(move |engine| engine.has(&asked)).await? {
            return Ok(None);
        }
        Ok(Some(self.fetch(file).await?))
    }

    async fn fetch(&self, file: &ArtifactRef) -> Result<Vec<u8>, WorkError> {
        let bytes = self.artifacts.get(file).await;
        bytes.map(Vec::from).map_err(|error| WorkError::Store(error.to_string()))
    }

    async fn put(&self, key: String, bytes: Vec<u8>) -> Result<ArtifactRef, WorkError> {
        let put = self.artifacts.put(&key, bytes.into()).await;
        put.map_err(|error| WorkError::Store(error.to_string()))
    }

    async fn think(&self, id: LeaseId, work: ThinkWork) -> Result<Done, WorkError> {
        self.hold(&work.weights).await?;
        let thoughts = self
            .device
            .call(move |engine| {
                let traces = work.traces as usize;
                engine.think_lease(&work.weights, &work.prompt.text, traces, &work.seed)
            })
            .await??;
        let mut traces = Vec::with_capacity(thoughts.len());
        for (j, thought) in (0u32..).zip(thoughts) {
            let key = keys::think(id.unit.tree().subtree(j), id.attempt);
            traces.push(self.store_thought(key, thought).await?);
        }
        Ok(Done::Think(traces))
    }

    async fn store_thought(&self, key: String, thought: StoredThought) -> Result<Trace, WorkError> {
        Ok(Trace {
            artifact: self.put(key, thought.artifact).await?,
            text: thought.text,
            refined_prompt: thought.refined_prompt,
            well_formed: thought.well_formed,
            tokens: thought.tokens,
            finish: thought.finish,
        })
    }

    async fn render(&self, id: LeaseId, work: RenderWork) -> Result<Done, WorkError> {
        let Unit::Render(subtree) = id.unit else {
            return Err(WorkError::Refused("a render lease that names no sub-tree".to_owned()));
        };
        self.hold(&work.weights).await?;
        let trace = self.fetch(&work.trace).await?;
        let bytes = self
            .device
            .call(move |engine| {
                let (label, leaves) = (work.trace.key.as_str(), work.leaves as usize);
                engine.render_lease(&work.weights, (label, trace), leaves, work.window, &work.seed)
            })
            .await??;
        let artifact = self.put(keys::render(subtree, id.attempt), bytes).await?;
        Ok(Done::Render(artifact))
    }
}
