//! Retention: which checkpoints are kept, and what may be deleted with the others.

use super::{Checkpoints, Found};
use crate::error::{Result, StoreError};
use crate::keys;
use crate::store::Entry;
use bytes::Bytes;
use duet_core::PolicyVersion;
use std::collections::{BTreeMap, BTreeSet};

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

/// What retention would delete, found without deleting anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Checkpoints that are not kept, ascending.
    pub versions: Vec<PolicyVersion>,
    /// Objects that belong to no checkpoint any more, by the version whose folder or manifest they
    /// are of; manifests not counted.
    pub objects: BTreeMap<PolicyVersion, BTreeSet<String>>,
    /// Bytes of all these objects, as far as the listing shows.
    pub bytes: u64,
    /// Marks of earlier retention that have served their time.
    marks: Vec<PolicyVersion>,
}

impl Checkpoints {
    /// What [`Checkpoints::prune`] would delete now.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] naming a manifest that cannot be read; the same or
    /// [`StoreError::Missing`] naming what the newest checkpoint lacks, when older ones were to go.
    pub async fn plan(
        &self,
        retention: Retention,
        protect: &BTreeSet<String>,
        now_unix_ms: u64,
    ) -> Result<Plan> {
        let entries = self.store.list(keys::CHECKPOINTS).await?;
        let versions = super::versions(&entries);
        let Some(newest) = versions.last().copied() else { return Ok(Plan::default()) };
        let (kept, doomed) = split(&versions, retention);

        let mut needed = protect.clone();
        for version in kept {
            let Found { reference, manifest } = self.at(version).await?;
            if version == newest && !doomed.is_empty() {
                // An older one may be all that is left to go on from.
                self.check_present(&manifest).await?;
            }
            needed.insert(reference.key);
            needed.extend(manifest.objects().into_iter().map(|object| object.key));
        }
        let old = old(retention, now_unix_ms);
        let mut objects = orphans(&entries, &versions, newest, old);
        let mut sizes: BTreeMap<String, u64> =
            entries.iter().map(|entry| (entry.key.clone(), entry.bytes)).collect();
        for version in &doomed {
            let manifest = match self.at(*version).await {
                Ok(found) => Some(found.manifest),
                Err(StoreError::Corrupt { .. }) => None,
                Err(error) => return Err(error),
            };
            let garbage = objects.entry(*version).or_default();
            for object in manifest.iter().flat_map(|manifest| manifest.objects()) {
                sizes.insert(object.key.clone(), object.bytes);
                garbage.insert(object.key);
            }
            let folder = format!("{}/", keys::checkpoint(*version));
            let inside = entries.iter().filter(|entry| entry.key.starts_with(&folder));
            garbage.extend(inside.map(|entry| entry.key.clone()));
        }
        for garbage in objects.values_mut() {
            garbage.retain(|key| !needed.contains(key) && keys::manifest_version(key).is_none());
        }
        objects.retain(|version, garbage| doomed.contains(version) || !garbage.is_empty());
        let bytes = objects.values().flatten().filter_map(|key| sizes.get(key)).sum();
        let marks = entries.iter().filter(|entry| entry.bytes == 0 && entry.modified_unix_ms < old);
        let marks = marks.filter_map(|entry| keys::manifest_version(&entry.key));
        let marks = marks.filter(|version| !objects.contains_key(version)).collect();
        Ok(Plan { versions: doomed, objects, bytes, marks })
    }

    /// Deletes what need not be kept. An object that a kept manifest names, or that `protect`
    /// holds, is never deleted, wherever it lies. When a kept manifest cannot be read, or the newest
    /// checkpoint is not whole by its lengths, nothing at all is deleted.
    ///
    /// A version is given up before its objects go: its manifest is deleted, so that a crash in
    /// between leaves no manifest that promises what is gone, and an empty file is created in its
    /// place. Who still wants to complete that version collides with the mark; and where the mark
    /// collides with a manifest that was just completed, the version's objects stay. So nothing is
    /// deleted that a manifest names, whoever writes meanwhile. Marks go with a later pruning, when
    /// they are older than the grace.
    ///
    /// # Errors
    /// As [`Checkpoints::plan`].
    pub async fn prune(
        &self,
        retention: Retention,
        protect: &BTreeSet<String>,
        now_unix_ms: u64,
    ) -> Result<Pruned> {
        let plan = self.plan(retention, protect, now_unix_ms).await?;
        let mut pruned = Pruned::default();
        for version in &plan.versions {
            self.store.delete(&keys::manifest(*version)).await?;
            pruned.versions.push(*version);
            pruned.objects += 1;
        }
        for (version, garbage) in &plan.objects {
            if !self.mark(*version).await? {
                continue;
            }
            for key in garbage {
                self.store.delete(key).await?;
                pruned.objects += 1;
            }
        }
        for version in plan.marks {
            self.store.delete(&keys::manifest(version)).await?;
        }
        Ok(pruned)
    }

    /// Sees to it that a version is not completed any more; false: it is complete.
    async fn mark(&self, version: PolicyVersion) -> Result<bool> {
        let key = keys::manifest(version);
        match self.store.create(&key, Bytes::new()).await {
            Ok(()) => Ok(true),
            // A mark from a pruning that did not come to its end is as good.
            Err(StoreError::Exists { .. }) => Ok(self.store.size(&key).await? == Some(0)),
            Err(error) => Err(error),
        }
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

/// What was written before this, by the store's clock, is old.
fn old(retention: Retention, now_unix_ms: u64) -> i64 {
    i64::try_from(now_unix_ms.saturating_sub(retention.grace_ms)).unwrap_or(i64::MAX)
}

/// Old objects in folders of checkpoints that have no manifest, though newer ones have.
fn orphans(
    entries: &[Entry],
    versions: &[PolicyVersion],
    newest: PolicyVersion,
    old: i64,
) -> BTreeMap<PolicyVersion, BTreeSet<String>> {
    let mut orphans: BTreeMap<PolicyVersion, BTreeSet<String>> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| entry.modified_unix_ms < old) {
        let version = keys::checkpoint_version(&entry.key);
        let version = version.filter(|version| *version < newest && !versions.contains(version));
        if let Some(version) = version {
            orphans.entry(version).or_default().insert(entry.key.clone());
        }
    }
    orphans
}
