//! The journal: what must be durable before anything is done about it.
//!
//! A batch of records is one *segment*: an object with a number, created once. So a batch is durable
//! whole or not at all, and two writers collide on the next number. (On a disk of this machine an object
//! holds several segments that follow each other; it is named by the first.)
//!
//! ```text
//! open    claim generations/G (create once; G = newest + 1)
//!         read the newest sound snapshot and all segments after it
//!         create an opening segment at the next number; on a collision read on and try again
//! append  create segment n + 1              collision with other bytes -> Fenced
//!         look for generations/G + 1        it is there                -> Fenced
//! ```
//! The look after each append is what makes collecting old segments safe: a writer that slept while
//! its successor wrote, took a snapshot and collected could otherwise create its next number in the
//! gap and believe it durable. Generations are never collected.
//!
//! On a disk of this machine a segment is added to the file of the one before; it may then be found
//! half-written, or be added where the successor has already begun its own object. Whoever reads has
//! claimed its generation before, so that the writer's look tells it that nothing of it counts; readers
//! end a file where the next one begins.
//!
//! A failed append leaves it open whether the segment exists, so the journal refuses to go on; a new
//! one must be opened, which reads what there is.

mod disk;
mod open;
mod retained;
mod segment;

pub use open::{Opened, read};
pub use retained::{Batch, Retained, retained};
pub use segment::snapshot_state;
pub use segment::{
    MAX_RECORD, MAX_RECORDS, MAX_SEGMENT, segment_bytes, segment_records, segments_in,
};

use crate::error::StoreError;
use crate::keys;
use crate::store::Store;
use bytes::Bytes;
use disk::{Disk, Written};
use duet_core::Generation;
use segment::Segment;

/// What can go wrong with a journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The store failed.
    #[error("journal: {0}")]
    Store(#[from] StoreError),
    /// Somebody else writes this journal now.
    #[error(
        "journal `{key}` was taken over by another coordinator (this one was {mine}): it must stop; \
         end the other one first if this one shall go on"
    )]
    Fenced {
        /// What the other one created.
        key: String,
        /// The generation of the one that must stop.
        mine: Generation,
    },
    /// A segment or snapshot cannot be read.
    #[error(
        "journal segment `{key}` is corrupt: {reason}; restore it, or start from a checkpoint under a new run name"
    )]
    Corrupt {
        /// Its key.
        key: String,
        /// How that shows.
        reason: String,
    },
    /// Segments are missing in the middle.
    #[error(
        "journal segment `{key}` is missing though later ones exist; restore it, or start from a checkpoint under a new run name"
    )]
    Gap {
        /// The first missing one.
        key: String,
    },
    /// A batch that cannot be written.
    #[error(
        "journal: a batch of {records} records, {bytes} bytes, the largest {largest}, is too large: at most {MAX_RECORDS} records and {MAX_SEGMENT} bytes, {MAX_RECORD} a record"
    )]
    TooLarge {
        /// How many records.
        records: usize,
        /// How many bytes.
        bytes: usize,
        /// The largest record.
        largest: usize,
    },
    /// An append failed before; whether it is durable is unknown.
    #[error("journal `{prefix}` failed before and must be opened anew")]
    Broken {
        /// Its prefix.
        prefix: String,
    },
}

/// A journal that is open for writing.
#[derive(Debug)]
pub struct Journal {
    store: Store,
    prefix: String,
    generation: Generation,
    /// The newest segment.
    position: u64,
    broken: bool,
    salt: [u8; 16],
    /// How segments are made where only this machine can look.
    disk: Option<Disk>,
}

impl Journal {
    /// Opens the journal for writing, with the next generation; fences whoever wrote it before.
    ///
    /// A newest segment that a crash of this machine cut off is declared void: it was never
    /// acknowledged. On other stores, and anywhere else in the journal, it is an error.
    ///
    /// # Errors
    /// [`JournalError::Corrupt`] or [`JournalError::Gap`] naming the segment;
    /// [`JournalError::Fenced`] when others open it at the same time, again and again.
    pub async fn open(store: &Store, prefix: &str) -> Result<Opened, JournalError> {
        open::open(store, prefix).await
    }

    /// This incarnation's generation.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The number of the newest segment.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Makes records durable, all or none, and returns the new position. An empty batch does
    /// nothing.
    ///
    /// On a disk of this machine this blocks its thread until the disk has them: a sync takes less than
    /// handing it to another thread and back. No deadline of a task can end that, so whoever must not
    /// wait for a disk that hangs has to look from another thread.
    ///
    /// # Errors
    /// [`JournalError::Fenced`]: stop at once, and do nothing of what these records allow.
    /// [`JournalError::Store`]: the same, but a new journal may be opened.
    pub async fn append(&mut self, records: &[Vec<u8>]) -> Result<u64, JournalError> {
        if records.is_empty() {
            return Ok(self.position);
        }
        let largest = records.iter().map(Vec::len).max().unwrap_or(0);
        let bytes = records.iter().map(|record| record.len() + 8).sum::<usize>() + segment::HEADER;
        let records_count = records.len();
        if largest > MAX_RECORD || bytes > MAX_SEGMENT || records_count > MAX_RECORDS {
            return Err(JournalError::TooLarge { records: records_count, bytes, largest });
        }
        self.write(records.to_vec(), 0).await?;
        Ok(self.position)
    }

    /// Keeps the state after the newest segment, so that the segments up to it need not be read any
    /// more.
    ///
    /// # Errors
    /// The store fails. Nothing is lost, and the journal goes on.
    pub async fn snapshot(&mut self, state: &[u8]) -> Result<(), JournalError> {
        self.usable()?;
        let key = keys::snapshot(&self.prefix, self.position);
        let bytes = segment::encode_snapshot(self.generation.0, self.position, state);
        self.store.artifacts().put(&key, bytes).await?;
        // What is before the snapshot can be collected without what comes after it.
        self.disk.iter_mut().for_each(Disk::close);
        Ok(())
    }

    /// Deletes segments that no snapshot but the two newest needs, and older snapshots. Returns how
    /// many objects.
    ///
    /// # Errors
    /// The store fails. What is left is collected another time.
    pub async fn collect(&mut self) -> Result<usize, JournalError> {
        self.usable()?;
        let snapshots = open::numbers(&self.store, &keys::snapshots(&self.prefix)).await?;
        let Some(keep_from) = snapshots.iter().rev().nth(1).copied() else { return Ok(0) };
        let objects = open::numbers(&self.store, &keys::segments(&self.prefix)).await?;
        // An object ends where the next one begins; the newest one stays.
        let ends = objects.iter().zip(objects.iter().skip(1));
        let mut doomed: Vec<String> = ends
            .filter(|(_, next)| **next <= keep_from + 1)
            .map(|(first, _)| keys::segment(&self.prefix, *first))
            .collect();
        // Snapshots last: while a segment is left, so is a snapshot that does without it.
        doomed.extend(
            snapshots
                .into_iter()
                .filter(|number| *number < keep_from)
                .map(|number| keys::snapshot(&self.prefix, number)),
        );
        for key in &doomed {
            self.store.delete(key).await?;
        }
        Ok(doomed.len())
    }

    fn usable(&self) -> Result<(), JournalError> {
        if self.broken {
            return Err(JournalError::Broken { prefix: self.prefix.clone() });
        }
        Ok(())
    }

    /// Creates the next segment.
    async fn write(&mut self, records: Vec<Vec<u8>>, voids: u64) -> Result<(), JournalError> {
        self.usable()?;
        self.broken = true;
        let number = self.position + 1;
        let key = keys::segment(&self.prefix, number);
        let segment = Segment {
            generation: self.generation.0,
            number,
            voids,
            nonce: self.nonce(number),
            records,
        };
        let (bytes, mine) = (segment::encode(&segment), self.generation);
        let next = keys::generation(&self.prefix, self.generation.0 + 1);
        match self.create(&key, bytes, &next).await? {
            Written::Durable => {}
            Written::Exists => return Err(JournalError::Fenced { key, mine }),
            Written::Claimed => return Err(JournalError::Fenced { key: next, mine }),
        }
        self.position = number;
        self.broken = false;
        Ok(())
    }

    /// Creates a segment and looks for the claim that ends this writer.
    async fn create(&mut self, key: &str, bytes: Bytes, next: &str) -> Result<Written, StoreError> {
        if let Some(disk) = &mut self.disk {
            return disk.write(key, &bytes, next);
        }
        match self.store.create(key, bytes).await {
            Ok(()) => {}
            Err(StoreError::Exists { .. }) => return Ok(Written::Exists),
            Err(error) => return Err(error),
        }
        let claimed = self.store.size(next).await?.is_some();
        Ok(if claimed { Written::Claimed } else { Written::Durable })
    }

    /// Differs between writers, and so lets a writer tell its own segment from another's.
    fn nonce(&self, number: u64) -> [u8; 16] {
        let mut nonce = self.salt;
        for (byte, with) in nonce.iter_mut().zip(number.to_le_bytes()) {
            *byte ^= with;
        }
        nonce
    }

    fn new(store: &Store, prefix: &str, generation: u64, position: u64) -> Journal {
        Journal {
            store: store.clone(),
            prefix: prefix.to_owned(),
            generation: Generation(generation),
            position,
            broken: false,
            salt: salt(),
            disk: None,
        }
    }
}

/// Cuts records into batches that [`Journal::append`] takes, in order. A record that is too large by
/// itself stays in a batch of its own, which is refused.
pub fn batches(records: &[Vec<u8>]) -> impl Iterator<Item = &[Vec<u8>]> {
    let mut rest = records;
    std::iter::from_fn(move || {
        let mut bytes = segment::HEADER;
        let fits = |record: &&Vec<u8>| {
            bytes += record.len() + 8;
            bytes <= MAX_SEGMENT
        };
        let fitting = rest.iter().take(MAX_RECORDS).take_while(fits).count();
        let (batch, after) = rest.split_at(fitting.max(1).min(rest.len()));
        rest = after;
        (!batch.is_empty()).then_some(batch)
    })
}

/// Sixteen bytes that no other writer has: process, moment and a count within the process.
fn salt() -> [u8; 16] {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&std::process::id().to_le_bytes());
    hasher.update(&COUNT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    hasher.update(&now.unwrap_or_default().as_nanos().to_le_bytes());
    let host = std::fs::read("/proc/sys/kernel/random/uuid").unwrap_or_default();
    hasher.update(&host);
    let mut salt = [0; 16];
    salt.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    salt
}

/// The marker that claims a generation.
fn claim() -> Bytes {
    Bytes::copy_from_slice(&salt())
}
