//! A rank's shard of a checkpoint is written beside the steps to come.
//!
//! ```text
//! device thread   step n | copy | step n + 1 ...
//! saver                         | hash and write --> durable --> ShardDone
//! ```
//! Training waits for the copy only. One shard is on its way at most, so a rank needs memory for one
//! copy, which is used again; the next copy waits for the write before it, not without end.

use crate::error::TrainError;
use crate::rank::Place;
use bytes::Bytes;
use duet_core::scheduler::SHARD;
use duet_core::work::{Report, ShardDone};
use duet_core::{PolicyVersion, Rank};
use duet_store::{Store, keys};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Longest time that a shard may take to be written; the store's own deadlines grow with its size, and
/// are what ends a write that gets nowhere.
const LONGEST: Duration = Duration::from_secs(3600);
/// Reports that wait to be delivered: one for each shard on its way, and those of groups before.
const REPORTS: usize = 4;

/// Writes shards, one at a time.
pub struct Saver {
    store: Store,
    told: mpsc::Sender<Report>,
    /// The shard on its way; gives its memory back.
    flight: Option<JoinHandle<Vec<u8>>>,
    /// Memory of the last one.
    spare: Vec<u8>,
}

/// The memory of a shard while the store reads it.
struct Image(Arc<Vec<u8>>);

impl AsRef<[u8]> for Image {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Saver {
    /// A saver, and what its shards have to say: each is reported once, written or not.
    pub fn new(store: Store) -> (Saver, mpsc::Receiver<Report>) {
        let (told, reports) = mpsc::channel(REPORTS);
        (Saver { store, told, flight: None, spare: Vec::new() }, reports)
    }

    /// Memory for the next shard, once the one before is written.
    ///
    /// # Errors
    /// [`TrainError::Store`] when that takes too long.
    pub async fn memory(&mut self) -> Result<Vec<u8>, TrainError> {
        let Some(mut flight) = self.flight.take() else {
            return Ok(std::mem::take(&mut self.spare));
        };
        match tokio::time::timeout(LONGEST, &mut flight).await {
            // A write that panicked has told nothing; the next one has new memory.
            Ok(image) => Ok(image.unwrap_or_default()),
            Err(_) => {
                flight.abort();
                let waited = LONGEST.as_secs();
                let reason = format!("the checkpoint before is not written after {waited} s");
                Err(TrainError::Store(reason))
            }
        }
    }

    /// Begins to write a shard; [`Saver::memory`] was asked before, so none is on its way.
    pub fn begin(&mut self, place: &Place, version: PolicyVersion, image: Vec<u8>) {
        let (epoch, rank) = (place.epoch, Rank(place.rank));
        let key = keys::shard(version, rank, place.world, epoch);
        let (artifacts, told) = (self.store.artifacts(), self.told.clone());
        self.flight = Some(tokio::spawn(async move {
            let (started, image) = (Instant::now(), Arc::new(image));
            let bytes = Bytes::from_owner(Image(image.clone()));
            let report = match artifacts.put(&key, bytes).await {
                Ok(shard) => {
                    let (bytes, took_ms) = (shard.bytes, started.elapsed().as_millis() as u64);
                    tracing::info!(%version, rank = rank.0, bytes, took_ms, "shard written");
                    Report::ShardDone(ShardDone { epoch, rank, version, shards: vec![shard] })
                }
                Err(error) => {
                    let (kind, reason) = (SHARD.to_owned(), error.to_string());
                    tracing::warn!(%version, rank = rank.0, reason, "shard not written");
                    Report::TrainerFailed { epoch, rank, kind, reason }
                }
            };
            // Nobody listens only when the rank is going.
            drop(told.send(report).await);
            Arc::try_unwrap(image).unwrap_or_default()
        }));
    }
}
