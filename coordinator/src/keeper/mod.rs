//! The keeper: one task that writes what may take long, in order, so that the driver need not wait.
//!
//! An iteration's tables are written, and synced, before a checkpoint that makes the scheduler forget
//! the iteration (until then its state tells them again after a restart), and artifacts are deleted
//! after it: jobs are done strictly one after the other, and a checkpoint is refused while tables of
//! earlier iterations are missing.

mod checkpoint;
pub mod metrics;
mod metrics_file;

pub use checkpoint::CheckpointJob;

use crate::error::CoordinatorError;
use crate::options::Options;
use duet_core::ArtifactRef;
use duet_core::scheduler::{Event, IterationLineage};
use duet_store::checkpoint::Retention;
use duet_store::{Lineage, Store, StoreError, keys};
use metrics_file::MetricsFile;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use tokio::sync::mpsc;

/// Jobs that wait; beyond that the driver waits.
pub const QUEUE: usize = 256;
/// Iterations whose tables could not be written yet and are tried again; beyond that the oldest waits
/// for a restart, which writes it again from the journal.
const BACKLOG: usize = 64;
/// Iterations whose tables are written at the same time.
const AT_ONCE: usize = 8;

/// Something to be kept.
pub enum Job {
    /// An iteration's rows: its tables and its line in `metrics.jsonl`.
    Lineage(Arc<IterationLineage>),
    /// A checkpoint manifest. Answered by [`Kept::Event`].
    Checkpoint(Box<CheckpointJob>),
    /// Artifacts that nothing needs any more.
    Collect(Vec<ArtifactRef>),
}

/// What became of a job.
pub enum Kept {
    /// The scheduler waits for this.
    Event(Event),
    /// Something failed that the scheduler does not wait for.
    Failure {
        /// A class that is counted.
        kind: &'static str,
        /// What happened.
        text: String,
    },
}

/// Does the jobs.
pub struct Keeper {
    store: Store,
    lineage: Lineage,
    metrics: Option<MetricsFile>,
    retention: Retention,
    keep_rollouts: bool,
    run: String,
    config: duet_core::Digest,
    backlog: VecDeque<Arc<IterationLineage>>,
    jobs: mpsc::Receiver<Job>,
    kept: mpsc::UnboundedSender<Kept>,
}

impl Keeper {
    /// A keeper and the driver's ends of its lines.
    ///
    /// # Errors
    /// `metrics.jsonl` cannot be opened.
    pub fn new(
        options: &Options,
    ) -> Result<(Keeper, mpsc::Sender<Job>, mpsc::UnboundedReceiver<Kept>), CoordinatorError> {
        let (to, jobs) = mpsc::channel(QUEUE);
        // At most one answer a job, and the jobs are bounded; the driver must never be waited for.
        let (kept, from) = mpsc::unbounded_channel();
        let metrics =
            options.store.local_root().map(|root| MetricsFile::open(&root)).transpose()?;
        let keeper = Keeper {
            lineage: options.store.lineage(),
            store: options.store.clone(),
            metrics,
            retention: options.retention,
            keep_rollouts: options.keep_rollouts,
            run: options.run.clone(),
            config: options.config,
            backlog: VecDeque::new(),
            jobs,
            kept,
        };
        Ok((keeper, to, from))
    }

    /// Does jobs until there can be no more: the driver has ended and the queue is empty.
    pub async fn run(mut self) {
        let mut next = None;
        loop {
            let job = match next.take() {
                Some(job) => Some(job),
                None => self.jobs.recv().await,
            };
            let Some(job) = job else { break };
            match job {
                Job::Lineage(lineage) => {
                    self.backlog.push_back(lineage);
                    let mut unneeded = Vec::new();
                    next = self.take_more(&mut unneeded);
                    self.write_backlog().await;
                    self.collect_all(unneeded).await;
                }
                Job::Checkpoint(job) => {
                    self.write_backlog().await;
                    let event = self.checkpoint(*job).await;
                    self.tell(Kept::Event(event));
                }
                Job::Collect(artifacts) => self.collect_all(artifacts).await,
            }
        }
        self.write_backlog().await;
        self.sync_metrics();
        if let Err(error) = self.store.settle().await {
            self.fail("lineage", error.to_string());
        }
    }

    /// Takes along the iterations that wait already, and what is to be deleted after them; gives back
    /// the first job that is neither.
    fn take_more(&mut self, unneeded: &mut Vec<ArtifactRef>) -> Option<Job> {
        while self.backlog.len() < AT_ONCE {
            match self.jobs.try_recv() {
                Ok(Job::Lineage(lineage)) => self.backlog.push_back(lineage),
                Ok(Job::Collect(artifacts)) => unneeded.extend(artifacts),
                Ok(other) => return Some(other),
                Err(_) => break,
            }
        }
        None
    }

    fn tell(&self, kept: Kept) {
        // Nobody listens only when the coordinator is going.
        drop(self.kept.send(kept));
    }

    fn fail(&self, kind: &'static str, text: String) {
        self.tell(Kept::Failure { kind, text });
    }

    /// Writes the tables that are not written yet, several iterations at once; they count in order.
    async fn write_backlog(&mut self) {
        while !self.backlog.is_empty() {
            let some = self.backlog.iter().take(AT_ONCE).cloned();
            let some = some.map(|lineage| self.lineage.write(lineage));
            let written: Vec<_> = futures::future::join_all(some).await;
            for done in written {
                // What was written of later ones is found written when they are tried again.
                let Some(lineage) = self.backlog.front() else { return };
                if let Err(error) = done {
                    let text = format!("tables of iteration {}: {error}", lineage.iteration);
                    self.fail("lineage", text);
                    if self.backlog.len() > BACKLOG {
                        self.backlog.pop_front();
                    }
                    return;
                }
                let line = self.metrics.as_mut().map_or(Ok(()), |file| file.append(lineage));
                if let Err(error) = line {
                    self.fail("metrics", error.to_string());
                }
                self.backlog.pop_front();
            }
        }
    }

    /// Makes the lines of metrics durable. What cannot be is told, and hinders nothing: they are in the
    /// tables too.
    fn sync_metrics(&self) {
        if let Some(Err(error)) = self.metrics.as_ref().map(MetricsFile::sync) {
            self.fail("metrics", error.to_string());
        }
    }

    async fn collect_all(&self, artifacts: Vec<ArtifactRef>) {
        if artifacts.is_empty() {
            return;
        }
        if let Err(error) = self.collect(artifacts).await {
            self.fail("collect", error.to_string());
        }
    }

    /// Deletes artifacts, but not what a kept checkpoint names: retention deletes that. A file may be
    /// named by many versions, so what counts is the manifests. Where one of them cannot be read,
    /// nothing is deleted.
    async fn collect(&self, artifacts: Vec<ArtifactRef>) -> Result<(), StoreError> {
        let checkpoints = self.store.checkpoints();
        let mut kept = BTreeSet::new();
        if artifacts.iter().any(|artifact| keys::weights_version(&artifact.key).is_some()) {
            for version in checkpoints.list().await? {
                let objects = checkpoints.at(version).await?.manifest.objects();
                kept.extend(objects.into_iter().map(|object| object.key));
            }
        }
        for artifact in artifacts {
            let rollout = artifact.key.starts_with(keys::ARTIFACTS);
            if kept.contains(&artifact.key) || (rollout && self.keep_rollouts) {
                continue;
            }
            self.store.delete(&artifact.key).await?;
        }
        Ok(())
    }
}
