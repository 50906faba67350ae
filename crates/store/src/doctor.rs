//! Whether a store keeps the promises that a run stands on.
//!
//! Real stores differ: some answer 200 to a conditional write and ignore the condition, some check
//! it without atomicity. So the promises are tried, not believed.

use crate::error::StoreError;
use crate::store::Store;
use bytes::Bytes;
use futures::future::join_all;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

/// Writers that race for one key.
const WRITERS: usize = 8;
/// Races.
const ROUNDS: usize = 12;

/// Something a store can be trusted with, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Capability {
    /// What is written is read back the same.
    ReadBack,
    /// A second creation of a key is refused and changes nothing.
    CreateOnce,
    /// Of several writers that create a key at the same time, exactly one is told that it did.
    AtomicCreate,
    /// What was written is in the next listing, and what was deleted is not.
    ListAfterWrite,
    /// Part of an object can be read.
    RangeRead,
    /// Objects can be deleted.
    Delete,
}

impl Capability {
    /// Its name: `create-once`, ...
    pub fn as_str(self) -> &'static str {
        match self {
            Capability::ReadBack => "read-back",
            Capability::CreateOnce => "create-once",
            Capability::AtomicCreate => "atomic-create",
            Capability::ListAfterWrite => "list-after-write",
            Capability::RangeRead => "range-read",
            Capability::Delete => "delete",
        }
    }

    /// What cannot be done on a store without it.
    pub fn needed_for(self) -> &'static str {
        match self {
            Capability::ReadBack => "anything",
            Capability::CreateOnce => {
                "telling a second coordinator from the first; artifacts that never change"
            }
            Capability::AtomicCreate => "two coordinators at the same time: only one may win",
            Capability::ListAfterWrite => "finding the newest checkpoint and journal segment",
            Capability::RangeRead => "reading part of a large file",
            Capability::Delete => "retention: old checkpoints would pile up",
        }
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was tried.
    pub capability: Capability,
    /// Whether the store has it.
    pub holds: bool,
    /// What was seen.
    pub detail: String,
}

/// All findings about a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    /// The store.
    pub place: String,
    /// In the order of [`Capability`].
    pub findings: Vec<Finding>,
}

impl Diagnosis {
    /// Whether a run may use the store.
    pub fn is_fit(&self) -> bool {
        self.findings.iter().all(|finding| finding.holds)
    }

    /// What is missing.
    pub fn missing(&self) -> impl Iterator<Item = Capability> {
        self.findings.iter().filter(|finding| !finding.holds).map(|finding| finding.capability)
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.place)?;
        for Finding { capability, holds, detail } in &self.findings {
            let mark = if *holds { "ok  " } else { "FAIL" };
            writeln!(f, "  {mark} {:17} {detail}", capability.as_str())?;
            if !holds {
                writeln!(f, "       needed for {}", capability.needed_for())?;
            }
        }
        let verdict = if self.is_fit() { "fit for a run" } else { "not fit for a run" };
        write!(f, "  {verdict}")
    }
}

/// Tries a store out, under a prefix of its own that is removed afterwards.
///
/// # Errors
/// The store cannot be reached or written at all.
pub async fn probe(store: &Store) -> Result<Diagnosis, StoreError> {
    store.reach().await?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let prefix = format!("doctor/{}-{now}", std::process::id());
    let first = Bytes::from_static(b"the first of two contents");
    let key = format!("{prefix}/once");
    store.create(&key, first.clone()).await?;

    let mut findings = vec![read_back(store, &key, &first).await?];
    findings.push(create_once(store, &key, &first).await?);
    findings.push(atomic_create(store, &prefix).await?);
    findings.push(list_after_write(store, &prefix).await?);
    findings.push(range_read(store, &key).await);
    findings.push(delete(store, &prefix).await?);
    Ok(Diagnosis { place: store.place().to_owned(), findings })
}

fn finding(capability: Capability, holds: bool, detail: impl Into<String>) -> Finding {
    Finding { capability, holds, detail: detail.into() }
}

async fn read_back(store: &Store, key: &str, first: &Bytes) -> Result<Finding, StoreError> {
    let same = store.get(key).await? == *first;
    let detail = if same { "the same bytes" } else { "other bytes than were written" };
    Ok(finding(Capability::ReadBack, same, detail))
}

async fn create_once(store: &Store, key: &str, first: &Bytes) -> Result<Finding, StoreError> {
    let second = store.create(key, Bytes::from_static(b"the second of two contents")).await;
    let (refused, said) = match second {
        Err(StoreError::Exists { .. }) => (true, "the second creation was refused"),
        Ok(()) => (false, "the second creation was accepted"),
        Err(error) => return Err(error),
    };
    let kept = store.get(key).await? == *first;
    let then = if kept { "the first contents stayed" } else { "the contents were replaced" };
    Ok(finding(Capability::CreateOnce, refused && kept, format!("{said}; {then}")))
}

async fn atomic_create(store: &Store, prefix: &str) -> Result<Finding, StoreError> {
    let mut worst = 1;
    let mut wrong = 0;
    for round in 0..ROUNDS {
        let key = format!("{prefix}/race-{round}");
        let writers = (0..WRITERS).map(|writer| {
            let (store, key) = (store.clone(), key.clone());
            tokio::spawn(async move {
                store.create(&key, Bytes::from(format!("writer {writer}"))).await.map(|()| writer)
            })
        });
        let mut winners = Vec::new();
        for outcome in join_all(writers).await {
            match outcome {
                Ok(Ok(writer)) => winners.push(writer),
                Ok(Err(StoreError::Exists { .. })) => {}
                Ok(Err(error)) => return Err(error),
                // The runtime is being shut down.
                Err(_) => {}
            }
        }
        let holds = store.get(&key).await?;
        let right = winners.len() == 1 && holds == format!("writer {}", winners[0]);
        wrong += usize::from(!right);
        worst = if winners.len() == 1 { worst } else { winners.len() };
    }
    let detail = match wrong {
        0 => format!("one winner in each of {ROUNDS} races of {WRITERS}"),
        _ => format!("{wrong} of {ROUNDS} races of {WRITERS} went wrong, one with {worst} winners"),
    };
    Ok(finding(Capability::AtomicCreate, wrong == 0, detail))
}

async fn list_after_write(store: &Store, prefix: &str) -> Result<Finding, StoreError> {
    let folder = format!("{prefix}/list");
    let mut stale = 0;
    for n in 0..ROUNDS {
        let key = format!("{folder}/{n:04}");
        store.create(&key, Bytes::from_static(b"x")).await?;
        let listed = store.list(&folder).await?;
        stale += usize::from(listed.len() != n + 1 || listed.last().is_none_or(|e| e.key != key));
    }
    let detail = match stale {
        0 => format!("{ROUNDS} of {ROUNDS} listings were up to date"),
        _ => format!("{stale} of {ROUNDS} listings were out of date"),
    };
    Ok(finding(Capability::ListAfterWrite, stale == 0, detail))
}

async fn range_read(store: &Store, key: &str) -> Finding {
    // Whatever lies there by now: a store that fails to create once may have changed it.
    let whole = match store.get(key).await {
        Ok(bytes) => bytes,
        Err(error) => return finding(Capability::RangeRead, false, error.to_string()),
    };
    match store.get_range(key, 4..9).await {
        Ok(bytes) if Some(&bytes[..]) == whole.get(4..9) => {
            finding(Capability::RangeRead, true, "the right part")
        }
        Ok(bytes) => {
            finding(Capability::RangeRead, false, format!("{} bytes instead of 5", bytes.len()))
        }
        Err(error) => finding(Capability::RangeRead, false, error.to_string()),
    }
}

async fn delete(store: &Store, prefix: &str) -> Result<Finding, StoreError> {
    for entry in store.list(prefix).await? {
        if let Err(error) = store.delete(&entry.key).await {
            return Ok(finding(Capability::Delete, false, error.to_string()));
        }
    }
    let left = store.list(prefix).await?.len();
    Ok(finding(Capability::Delete, left == 0, format!("{left} objects left of those deleted")))
}
