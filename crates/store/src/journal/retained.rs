//! Reading everything that a journal still holds, for audits.

use super::JournalError;
use super::open::{numbers, segment_of};
use super::segment::{self, Bad};
use crate::keys;
use crate::store::Store;
use bytes::Bytes;
use duet_core::Generation;
use std::collections::BTreeSet;

/// One append: durable whole or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The segment's number.
    pub number: u64,
    /// Who wrote it.
    pub generation: Generation,
    /// Its records, in order.
    pub records: Vec<Vec<u8>>,
}

/// All that a journal still holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retained {
    /// The state before the first batch; `None` when the batches begin with the run.
    pub base: Option<Bytes>,
    /// Every batch since then.
    pub batches: Vec<Batch>,
}

/// Reads everything that is left of a journal, without opening it: from the run's beginning where
/// segment 1 is still there, else from the oldest snapshot. A torn newest segment, which nobody was
/// told to be durable, is passed over.
///
/// # Errors
/// [`JournalError::Corrupt`] or [`JournalError::Gap`] naming the segment.
pub async fn retained(store: &Store, prefix: &str) -> Result<Retained, JournalError> {
    let all = numbers(store, &keys::segments(prefix)).await?;
    let oldest = numbers(store, &keys::snapshots(prefix)).await?.first().copied();
    let (base, from) = match oldest {
        Some(number) if all.first() != Some(&1) => {
            let key = keys::snapshot(prefix, number);
            let bytes = store.get(&key).await?;
            let state = segment::decode_snapshot(&bytes, number)
                .map_err(|bad| JournalError::Corrupt { key, reason: bad.reason() })?;
            (Some(state), number)
        }
        _ => (None, 0),
    };
    let wanted: Vec<u64> = all.into_iter().filter(|number| *number > from).collect();
    let (mut batches, mut bad, mut void) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (number, expected) in wanted.iter().copied().zip(from + 1..) {
        if number != expected {
            return Err(JournalError::Gap { key: keys::segment(prefix, expected) });
        }
        match segment_of(store, prefix, number).await? {
            Ok(segment) => {
                void.insert(segment.voids);
                let (generation, records) = (Generation(segment.generation), segment.records);
                batches.push(Batch { number, generation, records });
            }
            Err(what) => bad.push((number, what)),
        }
    }
    // Also those that are whole by now: see `open`.
    batches.retain(|batch| !void.contains(&batch.number));
    for (number, what) in bad {
        let newest = wanted.last() == Some(&number) && matches!(what, Bad::Torn(_));
        if !newest && !void.contains(&number) {
            let (key, reason) = (keys::segment(prefix, number), what.reason());
            return Err(JournalError::Corrupt { key, reason });
        }
    }
    Ok(Retained { base, batches })
}
