//! Opening and reading a journal.

use super::disk::Disk;
use super::segment::{self, Bad, Segment};
use super::{Journal, JournalError, MAX_SEGMENT, claim};
use crate::error::StoreError;
use crate::keys;
use crate::store::Store;
use bytes::Bytes;
use duet_core::Generation;
use futures::{StreamExt, TryStreamExt};

/// Collisions while opening before it is given up.
const TRIES: usize = 16;
/// Segments that are read at the same time.
const READERS: usize = 16;

/// A journal that was opened, and what it held.
#[derive(Debug)]
pub struct Opened {
    /// To append to.
    pub journal: Journal,
    /// This incarnation's generation: grows at every open.
    pub generation: Generation,
    /// The newest snapshot.
    pub snapshot: Option<Bytes>,
    /// All records after it, in order.
    pub records: Vec<Vec<u8>>,
    /// The torn segment that was declared void, if there was one.
    pub torn: Option<String>,
}

/// What a journal holds.
struct History {
    snapshot: Option<Bytes>,
    records: Vec<Vec<u8>>,
    /// The newest segment's number; zero when there is none.
    position: u64,
    /// The newest segment is torn: its number, and how it shows.
    torn: Option<(u64, String)>,
}

pub(super) async fn open(store: &Store, prefix: &str) -> Result<Opened, JournalError> {
    let generation = claim_generation(store, prefix).await?;
    let mut fenced = None;
    for _ in 0..TRIES {
        let history = history(store, prefix).await?;
        let mut torn = None;
        if let Some((number, reason)) = &history.torn {
            let key = keys::segment(prefix, *number);
            if store.local_root().is_none() {
                return Err(JournalError::Corrupt { key, reason: reason.clone() });
            }
            tracing::warn!(key, reason, "the newest journal segment is torn: declared void");
            torn = Some(key);
        }
        // Whoever wrote what was just read has claimed its generation before: so nothing of this
        // generation ever follows something of a later one.
        let next = keys::generation(prefix, generation + 1);
        if store.size(&next).await?.is_some() {
            return Err(JournalError::Fenced { key: next, mine: Generation(generation) });
        }
        let voids = history.torn.as_ref().map_or(0, |(number, _)| *number);
        let mut journal = Journal::new(store, prefix, generation, history.position);
        match journal.write(Vec::new(), voids).await {
            Ok(()) => {
                // The opening segment is made like any object: whole or not at all, because what it
                // declares void must stay void.
                journal.disk = Disk::of(store, &keys::segments(prefix));
                let generation = journal.generation();
                let History { snapshot, records, .. } = history;
                return Ok(Opened { journal, generation, snapshot, records, torn });
            }
            // The one before wrote one more segment meanwhile: read it.
            Err(error @ JournalError::Fenced { .. }) => fenced = Some(error),
            Err(error) => return Err(error),
        }
    }
    let mine = Generation(generation);
    Err(fenced.unwrap_or(JournalError::Fenced { key: keys::segments(prefix), mine }))
}

/// Reads a journal without opening it: the newest snapshot and the records after it. A torn newest
/// segment, which nobody was told to be durable, is passed over.
///
/// # Errors
/// [`JournalError::Corrupt`] or [`JournalError::Gap`] naming the segment.
pub async fn read(
    store: &Store,
    prefix: &str,
) -> Result<(Option<Bytes>, Vec<Vec<u8>>), JournalError> {
    let history = history(store, prefix).await?;
    Ok((history.snapshot, history.records))
}

/// Claims the next generation: whoever creates its marker has it.
async fn claim_generation(store: &Store, prefix: &str) -> Result<u64, JournalError> {
    let mut last = 0;
    for _ in 0..TRIES {
        let newest = numbers(store, &keys::generations(prefix)).await?.last().copied().unwrap_or(0);
        last = newest.max(last) + 1;
        match store.create(&keys::generation(prefix, last), claim()).await {
            Ok(()) => return Ok(last),
            Err(StoreError::Exists { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(JournalError::Fenced { key: keys::generations(prefix), mine: Generation(last) })
}

/// The numbers of the objects in a folder, ascending.
pub(super) async fn numbers(store: &Store, folder: &str) -> Result<Vec<u64>, StoreError> {
    let entries = store.list(folder).await?;
    let mut numbers: Vec<u64> =
        entries.iter().filter_map(|entry| keys::number(&entry.key)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

async fn history(store: &Store, prefix: &str) -> Result<History, JournalError> {
    let (snapshot, from) = newest_snapshot(store, prefix).await?;
    let mut wanted = numbers(store, &keys::segments(prefix)).await?;
    wanted.retain(|number| *number > from);
    for (number, expected) in wanted.iter().zip(from + 1..) {
        if *number != expected {
            return Err(JournalError::Gap { key: keys::segment(prefix, expected) });
        }
    }
    let segments: Vec<Result<Segment, Bad>> = futures::stream::iter(wanted.iter().copied())
        .map(|number| segment_of(store, prefix, number))
        .buffered(READERS)
        .try_collect()
        .await?;
    let void: std::collections::BTreeSet<u64> =
        segments.iter().flatten().map(|segment| segment.voids).filter(|n| *n > 0).collect();
    let mut history = History { snapshot, records: Vec::new(), position: from, torn: None };
    let mut generation = 0;
    for (number, segment) in wanted.iter().copied().zip(segments) {
        history.position = number;
        match segment {
            // Also when it is whole by now: its writer was still at it when it was declared void, and
            // was fenced.
            _ if void.contains(&number) => {}
            Ok(segment) if segment.generation >= generation => {
                generation = segment.generation;
                history.records.extend(segment.records);
            }
            Ok(segment) => {
                let reason =
                    format!("it is of generation {}, after {generation}", segment.generation);
                return Err(JournalError::Corrupt { key: keys::segment(prefix, number), reason });
            }
            Err(Bad::Torn(reason)) if wanted.last() == Some(&number) => {
                history.torn = Some((number, reason));
            }
            Err(bad) => {
                let (key, reason) = (keys::segment(prefix, number), bad.reason());
                return Err(JournalError::Corrupt { key, reason });
            }
        }
    }
    Ok(history)
}

pub(super) async fn segment_of(
    store: &Store,
    prefix: &str,
    number: u64,
) -> Result<Result<Segment, Bad>, JournalError> {
    let key = keys::segment(prefix, number);
    let bytes = store.get_at_most(&key, MAX_SEGMENT as u64).await?;
    Ok(segment::decode(&bytes, number))
}

/// The newest snapshot that can be read, and its number; an unreadable one is passed over as long as
/// an older one stands in for it.
async fn newest_snapshot(
    store: &Store,
    prefix: &str,
) -> Result<(Option<Bytes>, u64), JournalError> {
    let numbers = numbers(store, &keys::snapshots(prefix)).await?;
    let mut worst = None;
    for number in numbers.iter().rev().copied() {
        let key = keys::snapshot(prefix, number);
        let bytes = store.get(&key).await?;
        match segment::decode_snapshot(&bytes, number) {
            Ok(payload) => return Ok((Some(payload), number)),
            Err(bad) => {
                let reason = bad.reason();
                tracing::warn!(key, reason, "a journal snapshot is corrupt: passed over");
                worst.get_or_insert(JournalError::Corrupt { key, reason });
            }
        }
    }
    // Without any snapshot the journal begins with segment 1; if that was collected, the snapshots
    // were all there was.
    match worst {
        Some(error) if store.size(&keys::segment(prefix, 1)).await?.is_none() => Err(error),
        _ => Ok((None, 0)),
    }
}
