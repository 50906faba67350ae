//! Reading everything that a journal still holds, for audits.

use super::JournalError;
use super::open::{numbers, segments};
use super::segment;
use crate::keys;
use crate::store::Store;
use bytes::Bytes;
use duet_core::Generation;

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
    let kept = segments(store, prefix, from).await?.segments.into_iter();
    let batches = kept.map(|segment| Batch {
        number: segment.number,
        generation: Generation(segment.generation),
        records: segment.records,
    });
    let batches = batches.collect();
    Ok(Retained { base, batches })
}
