//! Checkpoint manifests: everything they name first, they last.

use super::Keeper;
use crate::clock;
use crate::codec;
use crate::error::CoordinatorError;
use bytes::Bytes;
use duet_core::scheduler::{Event, State};
use duet_core::work::Weights;
use duet_core::{ArtifactRef, Digest, Generation, PolicyVersion};
use duet_store::{Manifest, keys};
use std::collections::{BTreeMap, BTreeSet};

/// A checkpoint to be made: the ranks have written their shards.
pub struct CheckpointJob {
    /// The version it holds.
    pub version: PolicyVersion,
    /// The ranks' shards.
    pub shards: Vec<Vec<ArtifactRef>>,
    /// The policy.
    pub weights: Weights,
    /// The scheduler's durable state.
    pub state: Box<State>,
    /// The newest journal segment.
    pub journal_position: u64,
    /// This coordinator's incarnation.
    pub generation: Generation,
    /// Keys of weights that may still be handed out.
    pub needed: BTreeSet<String>,
}

impl Keeper {
    /// Makes a checkpoint, then deletes those that need not be kept.
    pub(super) async fn checkpoint(&self, job: CheckpointJob) -> Event {
        let (version, needed) = (job.version, job.needed.clone());
        if let Some(lineage) = self.backlog.front() {
            let reason = format!("tables of iteration {} cannot be written", lineage.iteration);
            return Event::CheckpointFailed { version, reason };
        }
        let manifest = match self.write(job).await {
            Ok(manifest) => manifest,
            Err(error) => {
                return Event::CheckpointFailed { version, reason: error.to_string() };
            }
        };
        tracing::info!(%version, key = manifest.key, "checkpoint written");
        let now = clock::unix_now().0;
        if let Err(error) = self.store.checkpoints().prune(self.retention, &needed, now).await {
            self.fail("retention", format!("old checkpoints cannot be deleted: {error}"));
        }
        Event::CheckpointWritten { version, manifest }
    }

    async fn write(&self, job: CheckpointJob) -> Result<ArtifactRef, CoordinatorError> {
        // From here on the scheduler need not be able to tell these iterations again.
        self.sync_metrics();
        self.store.settle().await?;
        let state = codec::encode_state(&job.state)?;
        let key = keys::scheduler_state(job.version, Digest::of(&state));
        let scheduler = self.store.artifacts().put(&key, Bytes::from(state)).await?;
        let world = u32::try_from(job.shards.len()).unwrap_or(u32::MAX);
        let manifest = Manifest {
            format: duet_store::checkpoint::FORMAT.to_owned(),
            version: job.version,
            world,
            shards: job.shards,
            weights: job.weights,
            scheduler: Some(scheduler),
            journal_position: job.journal_position,
            generation: job.generation,
            run: self.run.clone(),
            config: self.config,
            created_unix_ms: clock::unix_now().0,
            notes: BTreeMap::new(),
        };
        Ok(self.store.checkpoints().write(&manifest).await?)
    }
}
