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
use std::collections::BTreeSet;

/// Collisions while opening before it is given up.
const TRIES: usize = 16;
/// Objects that are read at the same time.
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
    /// The object with the torn segment that was declared void, if there was one.
    pub torn: Option<String>,
}

/// What a journal holds.
struct History {
    snapshot: Option<Bytes>,
    records: Vec<Vec<u8>>,
    /// The newest segment's number; zero when there is none.
    position: u64,
    /// The newest segment, if it is torn.
    torn: Option<Torn>,
}

pub(super) async fn open(store: &Store, prefix: &str) -> Result<Opened, JournalError> {
    let generation = claim_generation(store, prefix).await?;
    let mut fenced = None;
    for _ in 0..TRIES {
        let history = history(store, prefix).await?;
        let mut torn = None;
        if let Some(Torn { key, reason, .. }) = &history.torn {
            let (key, reason) = (key.clone(), reason.clone());
            if store.local_root().is_none() {
                return Err(JournalError::Corrupt { key, reason });
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
        let voids = history.torn.as_ref().map_or(0, |torn| torn.number);
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
    let Segments { segments, position, torn } = segments(store, prefix, from).await?;
    let (mut records, mut generation) = (Vec::new(), 0);
    for segment in segments {
        if segment.generation < generation {
            let reason = format!("it is of generation {}, after {generation}", segment.generation);
            return Err(JournalError::Corrupt {
                key: keys::segment(prefix, segment.number),
                reason,
            });
        }
        generation = segment.generation;
        records.extend(segment.records);
    }
    Ok(History { snapshot, records, position, torn })
}

/// The segments after a number.
pub(super) struct Segments {
    /// Those that count, in order.
    pub(super) segments: Vec<Segment>,
    /// The newest one's number, whether it counts or not.
    pub(super) position: u64,
    /// The newest segment, if it is torn.
    pub(super) torn: Option<Torn>,
}

/// A segment that its writer did not end.
pub(super) struct Torn {
    number: u64,
    /// The object that holds it.
    key: String,
    /// How it shows.
    reason: String,
}

/// Reads the segments after number `from`.
pub(super) async fn segments(
    store: &Store,
    prefix: &str,
    from: u64,
) -> Result<Segments, JournalError> {
    // An object is named by the first of its segments: the one before may hold the next one, too.
    let mut objects = numbers(store, &keys::segments(prefix)).await?;
    let begin = objects.partition_point(|first| *first <= from + 1).saturating_sub(1);
    objects.drain(..begin);
    let read: Vec<(Vec<Segment>, Option<Bad>)> = futures::stream::iter(objects.iter().copied())
        .map(|first| segments_of(store, prefix, first))
        .buffered(READERS)
        .try_collect()
        .await?;
    let voids = |segment: &Segment| (segment.voids > 0).then_some(segment.voids);
    let void: BTreeSet<u64> =
        read.iter().flat_map(|(segments, _)| segments).filter_map(voids).collect();
    let mut all = Segments { segments: Vec::new(), position: from, torn: None };
    for (at, ((segments, bad), first)) in read.into_iter().zip(objects.iter().copied()).enumerate()
    {
        if first > all.position + 1 {
            return Err(JournalError::Gap { key: keys::segment(prefix, all.position + 1) });
        }
        // Where a later object begins, an earlier one has ended: what it holds beyond that was written
        // by somebody who had been replaced and was told so.
        let end = objects.get(at + 1).copied();
        let counts = |number: u64| end.is_none_or(|end| number < end);
        let after = first + segments.len() as u64;
        let within = |reason: String| match after {
            after if after == first => reason,
            after => format!("segment {after}, which it holds too: {reason}"),
        };
        for segment in segments {
            if segment.number <= all.position || !counts(segment.number) {
                continue;
            }
            all.position = segment.number;
            // Void also when it is whole by now: its writer was still at it when it was declared so.
            if !void.contains(&segment.number) {
                all.segments.push(segment);
            }
        }
        match bad {
            None => {}
            Some(_) if after <= all.position || !counts(after) => {}
            Some(_) if void.contains(&after) => all.position = after,
            Some(Bad::Torn(reason)) if end.is_none() => {
                all.position = after;
                all.torn = Some(Torn {
                    number: after,
                    key: keys::segment(prefix, first),
                    reason: within(reason),
                });
            }
            Some(bad) => {
                return Err(JournalError::Corrupt {
                    key: keys::segment(prefix, first),
                    reason: within(bad.reason()),
                });
            }
        }
    }
    Ok(all)
}

async fn segments_of(
    store: &Store,
    prefix: &str,
    first: u64,
) -> Result<(Vec<Segment>, Option<Bad>), JournalError> {
    let bytes = store.get_at_most(&keys::segment(prefix, first), MAX_SEGMENT as u64).await?;
    Ok(segment::decode_all(&bytes, first))
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
