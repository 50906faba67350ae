//! Retention: which checkpoints are kept, and what may be deleted with the others.

use super::{Checkpoints, Found};
use crate::error::{Result, StoreError};
use crate::keys;
use crate::store::Entry;
use duet_core::PolicyVersion;
use std::collections::BTreeSet;

/// Which checkpoints are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many; at least one is always kept.
    pub last: u32,
    /// Besides, every version divisible by this; zero: none.
    pub every: u64,
    /// Objects of checkpoints that were never completed are deleted when they are older than the
    /// newest checkpoint by version and older than this by the store's clock.
    pub grace_ms: u64,
}

/// What was deleted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Versions that are no checkpoints any more.
    pub versions: Vec<PolicyVersion>,
    /// Objects deleted, manifests counted.
    pub objects: usize,
}

impl Checkpoints {
    /// Deletes what need not be kept. An object that a kept manifest names, or that `protect`
    /// holds, is never deleted, wherever it lies.
    ///
    /// A manifest goes before what it names, so that a crash in between leaves no manifest that
    /// promises what is gone. When a kept manifest cannot be read, nothing at all is deleted.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] naming a manifest that cannot be read.
    pub async fn prune(
        &self,
        retention: Retention,
        protect: &BTreeSet<String>,
        now_unix_ms: u64,
    ) -> Result<Pruned> {
        let entries = self.store.list(keys::CHECKPOINTS).await?;
        let versions: Vec<PolicyVersion> =
            entries.iter().filter_map(|entry| keys::manifest_version(&entry.key)).collect();
        let Some(newest) = versions.last().copied() else { return Ok(Pruned::default()) };
        let (kept, doomed) = split(&versions, retention);

        let mut needed = protect.clone();
        for version in kept {
            let Found { reference, manifest } = self.at(version).await?;
            needed.insert(reference.key);
            needed.extend(manifest.objects().into_iter().map(|object| object.key));
        }
        let mut garbage: Vec<String> = orphans(&entries, &versions, newest, retention, now_unix_ms);
        for version in &doomed {
            let manifest = match self.at(*version).await {
                Ok(found) => Some(found.manifest),
                Err(StoreError::Corrupt { .. }) => None,
                Err(error) => return Err(error),
            };
            let named = manifest.iter().flat_map(|manifest| manifest.objects());
            garbage.extend(named.map(|object| object.key));
            let folder = format!("{}/", keys::checkpoint(*version));
            let inside = entries.iter().filter(|entry| entry.key.starts_with(&folder));
            garbage.extend(inside.map(|entry| entry.key.clone()));
        }
        garbage.sort_unstable();
        garbage.dedup();
        garbage.retain(|key| !needed.contains(key) && keys::manifest_version(key).is_none());

        for version in &doomed {
            self.store.delete(&keys::manifest(*version)).await?;
        }
        for key in &garbage {
            self.store.delete(key).await?;
        }
        Ok(Pruned { objects: garbage.len() + doomed.len(), versions: doomed })
    }
}

/// Versions to keep and versions to delete.
fn split(
    versions: &[PolicyVersion],
    retention: Retention,
) -> (Vec<PolicyVersion>, Vec<PolicyVersion>) {
    let first_kept = versions.len().saturating_sub(retention.last.max(1) as usize);
    let kept = |index: usize, version: &PolicyVersion| {
        index >= first_kept || (retention.every > 0 && version.0.is_multiple_of(retention.every))
    };
    let (kept, doomed): (Vec<_>, Vec<_>) =
        versions.iter().enumerate().partition(|(index, version)| kept(*index, version));
    let plain = |list: Vec<(usize, &PolicyVersion)>| list.into_iter().map(|(_, v)| *v).collect();
    (plain(kept), plain(doomed))
}

/// Objects in folders of checkpoints that have no manifest and will not get one any more.
fn orphans(
    entries: &[Entry],
    versions: &[PolicyVersion],
    newest: PolicyVersion,
    retention: Retention,
    now_unix_ms: u64,
) -> Vec<String> {
    let grown = i64::try_from(now_unix_ms.saturating_sub(retention.grace_ms)).unwrap_or(i64::MAX);
    entries
        .iter()
        .filter(|entry| {
            keys::checkpoint_version(&entry.key)
                .is_some_and(|version| version < newest && !versions.contains(&version))
                && entry.modified_unix_ms < grown
        })
        .map(|entry| entry.key.clone())
        .collect()
}
