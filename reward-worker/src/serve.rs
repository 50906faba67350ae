//! Working for a coordinator: takes score leases, has the device thread score, reports.

use crate::scorer::{Job, Panel, every};
use duet_core::Millis;
use duet_core::work::{
    Assignment, Done, LeafScores, Lease, Outcome, Report, Score, ScoreWork, Unit, Work,
};
use duet_models::artifact::{ArtifactError, RenderArtifact};
use duet_store::Artifacts;
use duet_torch::device::{DeviceError, DeviceThread};
use std::collections::BTreeSet;
use std::future::Future;
use std::time::{Duration, Instant};
use tch::Device;

/// A score lease that could not be carried out at all. A scorer that fails is no such error: its
/// components are reported as failed.
#[derive(Debug, thiserror::Error)]
pub enum ScoreError {
    /// The images cannot be fetched.
    #[error("{0}")]
    Store(String),
    /// The artifact is not what it should be.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// The artifact has another number of images than the lease.
    #[error("{key} holds {found} images, the lease asks for {asked}")]
    Leaves {
        /// The artifact.
        key: String,
        /// Images in it.
        found: usize,
        /// Images of the lease.
        asked: u32,
    },
    /// The device thread did not answer.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A lease that is none for this worker.
    #[error("{0}")]
    Refused(&'static str),
}

impl ScoreError {
    /// The class of failures it is counted under.
    pub fn kind(&self) -> &'static str {
        match self {
            ScoreError::Store(_) | ScoreError::Artifact(_) | ScoreError::Leaves { .. } => {
                "artifact"
            }
            ScoreError::Device(_) => "scorer",
            ScoreError::Refused(_) => "protocol",
        }
    }
}

/// The coordinator, as a worker sees it.
pub trait Desk {
    /// Why there is nothing more to do: it cannot be reached, or this process is told to stop.
    type Error;

    /// The next assignment; waits until there is one.
    fn next(&mut self) -> impl Future<Output = Result<Assignment, Self::Error>>;

    /// Delivers a report.
    fn report(&mut self, report: Report) -> impl Future<Output = Result<(), Self::Error>>;
}

/// What carries score leases out.
pub struct Worker {
    device: DeviceThread<Panel>,
    components: BTreeSet<String>,
    artifacts: Artifacts,
    /// A panel that has not answered by then has timed out.
    limit: Duration,
}

/// Works until the coordinator says to leave; returns its reason.
///
/// # Errors
/// The desk's, between assignments: an assignment in hand is always finished and reported.
pub async fn serve<D: Desk>(desk: &mut D, worker: &Worker) -> Result<String, D::Error> {
    loop {
        let assignment = desk.next().await?;
        match assignment {
            Assignment::Leave { reason } => return Ok(reason),
            Assignment::Lease(lease) => desk.report(worker.lease(lease).await).await?,
            Assignment::Publish(_) | Assignment::Rendezvous(_) | Assignment::Step(_) => {
                tracing::warn!(
                    "an assignment for another role came to a reward worker: passed over"
                );
            }
        }
    }
}

impl Worker {
    /// A worker with these scorers and this artifact store.
    ///
    /// # Errors
    /// The device thread is gone.
    pub async fn new(
        device: DeviceThread<Panel>,
        artifacts: Artifacts,
        limit: Duration,
    ) -> Result<Worker, DeviceError> {
        let components = device.call(|panel| panel.components()).await?;
        Ok(Worker { device, components, artifacts, limit })
    }

    /// Every component that is scored.
    pub fn components(&self) -> &BTreeSet<String> {
        &self.components
    }

    async fn lease(&self, lease: Lease) -> Report {
        let (id, started) = (lease.id, Instant::now());
        let result = match (id.unit, lease.work) {
            (Unit::Score(_), Work::Score(work)) => self.score(work).await,
            _ => Err(ScoreError::Refused("a reward worker only scores")),
        };
        let took = Millis(started.elapsed().as_millis() as u64);
        let unit = id.unit.place();
        let outcome = match result {
            Ok(scores) => {
                log_failures(&scores);
                tracing::info!(unit, attempt = id.attempt.0, took_ms = took.0, "lease done");
                Outcome::Done { result: Done::Score(scores), took }
            }
            Err(error) => {
                let (kind, reason) = (error.kind().to_owned(), error.to_string());
                tracing::warn!(unit, attempt = id.attempt.0, kind, reason, "lease failed");
                Outcome::Failed { kind, reason }
            }
        };
        Report::Lease { id, outcome }
    }

    async fn score(&self, work: ScoreWork) -> Result<Vec<LeafScores>, ScoreError> {
        let asked = work.leaves;
        let bytes = self.artifacts.get(&work.render).await;
        let bytes = Vec::from(bytes.map_err(|error| ScoreError::Store(error.to_string()))?);
        let call = self.device.call(move |panel| {
            let key = work.render.key;
            let images = RenderArtifact::decode(&key, bytes, Device::Cpu)?.images;
            let job = Job { prompt: work.prompt, refined_prompt: work.refined_prompt, images };
            match job.leaves() {
                found if found == asked as usize => Ok(panel.score(&job)),
                found => Err(ScoreError::Leaves { key, found, asked }),
            }
        });
        match tokio::time::timeout(self.limit, call).await {
            Ok(scores) => scores?,
            Err(_) => {
                let limit = Millis(self.limit.as_millis() as u64);
                Ok(every(&self.components, asked as usize, &Score::TimedOut(limit)))
            }
        }
    }
}

/// One line for the first failure of each component.
fn log_failures(scores: &[LeafScores]) {
    let mut told = BTreeSet::new();
    for (component, score) in scores.iter().flatten() {
        if let (Score::Failed(reason), true) = (score, told.insert(component)) {
            tracing::warn!(component, reason, "a score failed");
        }
    }
}
