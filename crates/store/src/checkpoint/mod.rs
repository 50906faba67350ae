//! Checkpoints: shards first, the manifest last and once. A checkpoint without a manifest does not
//! exist; the newest complete one is found by listing.

mod manifest;
mod prune;

pub use manifest::{FORMAT, MAX_MANIFEST_BYTES, Manifest};
pub use prune::{Plan, Pruned, Retention};

use crate::artifacts::Artifacts;
use crate::error::{Result, StoreError};
use crate::keys;
use crate::store::{Entry, Store};
use duet_core::{ArtifactRef, Digest, PolicyVersion};
use futures::{StreamExt, TryStreamExt};

/// Objects that are looked up or verified at the same time.
const READERS: usize = 4;

/// The checkpoints of a store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    store: Store,
}

/// A manifest and where it lies.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Its key and hash; what trainers are told to restore from.
    pub reference: ArtifactRef,
    /// What it says.
    pub manifest: Manifest,
}

impl Checkpoints {
    pub(crate) fn new(store: Store) -> Checkpoints {
        Checkpoints { store }
    }

    /// Creates the manifest, which makes the checkpoint exist. Everything that it names must be
    /// there already.
    ///
    /// A manifest of the same version, world and weights that is there before (a coordinator died
    /// between creating it and noting so) is taken as it is.
    ///
    /// # Errors
    /// [`StoreError::Missing`] or [`StoreError::Corrupt`] when an object that it names is not there
    /// or of another length; [`StoreError::Conflict`] when another checkpoint has its version.
    pub async fn write(&self, manifest: &Manifest) -> Result<ArtifactRef> {
        self.check_present(manifest).await?;
        let key = keys::manifest(manifest.version);
        let bytes = manifest.to_bytes().map_err(|reason| self.store.corrupt(&key, reason))?;
        match self.store.create(&key, bytes.clone()).await {
            Ok(()) => Ok(Artifacts::reference(&key, &bytes)),
            Err(StoreError::Exists { .. }) => {
                if self.store.size(&key).await? == Some(0) {
                    // Retention was faster: see `prune`.
                    let reason = "retention gave this version up before it was complete";
                    return Err(self.store.corrupt(&key, reason));
                }
                let found = self.load(&key).await?;
                self.check_present(&found.manifest).await?;
                if found.manifest.same_state(manifest) {
                    Ok(found.reference)
                } else {
                    Err(self.store.conflict(&key))
                }
            }
            Err(error) => Err(error),
        }
    }

    /// The manifest under a reference, verified.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when it is not the one that the reference names, or no manifest.
    pub async fn read(&self, reference: &ArtifactRef) -> Result<Manifest> {
        let bytes = self.store.artifacts().get(reference).await?;
        Manifest::from_bytes(&bytes).map_err(|reason| self.store.corrupt(&reference.key, reason))
    }

    /// Versions that have a manifest, ascending.
    ///
    /// # Errors
    /// What can happen to any operation.
    pub async fn list(&self) -> Result<Vec<PolicyVersion>> {
        let entries = self.store.list(keys::CHECKPOINTS).await?;
        Ok(versions(&entries))
    }

    /// The checkpoint of a version.
    ///
    /// # Errors
    /// [`StoreError::Missing`]; [`StoreError::Corrupt`] when its manifest cannot be read.
    pub async fn at(&self, version: PolicyVersion) -> Result<Found> {
        self.load(&keys::manifest(version)).await
    }

    /// The newest checkpoint that is complete: its manifest can be read and every object that it
    /// names is there with the right length. Incomplete ones are logged and passed over.
    ///
    /// # Errors
    /// What can happen to any operation.
    pub async fn newest_found(&self) -> Result<Option<Found>> {
        for version in self.list().await?.into_iter().rev() {
            let found = match self.at(version).await {
                Ok(found) => self.check_present(&found.manifest).await.map(|()| found),
                Err(error) => Err(error),
            };
            match found {
                Ok(found) => return Ok(Some(found)),
                Err(error @ (StoreError::Missing { .. } | StoreError::Corrupt { .. })) => {
                    tracing::warn!(%version, %error, "a checkpoint is not complete: passed over");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Reads every byte that a manifest names and compares hashes. Returns how many bytes.
    ///
    /// # Errors
    /// [`StoreError::Missing`] or [`StoreError::Corrupt`] naming the first object that is not right.
    pub async fn verify(&self, manifest: &Manifest) -> Result<u64> {
        let artifacts = self.store.artifacts();
        let sizes: Vec<u64> = futures::stream::iter(manifest.objects())
            .map(|object| {
                let artifacts = artifacts.clone();
                async move { artifacts.get(&object).await.map(|bytes| bytes.len() as u64) }
            })
            .buffered(READERS)
            .try_collect()
            .await?;
        Ok(sizes.into_iter().sum())
    }

    /// As [`Checkpoints::newest_found`], without the reference.
    ///
    /// # Errors
    /// The same.
    pub async fn newest(&self) -> Result<Option<Manifest>> {
        Ok(self.newest_found().await?.map(|found| found.manifest))
    }

    /// Whether everything that a manifest names is there, with the right length; reads nothing of it.
    ///
    /// # Errors
    /// [`StoreError::Missing`] or [`StoreError::Corrupt`] naming the first object that is not right.
    pub async fn check_present(&self, manifest: &Manifest) -> Result<()> {
        let artifacts = self.store.artifacts();
        for object in manifest.objects() {
            artifacts.check_size(&object).await?;
        }
        Ok(())
    }

    /// Reads a manifest without knowing its hash; the hash inside it stands in for that.
    async fn load(&self, key: &str) -> Result<Found> {
        let bytes = self.store.get_at_most(key, MAX_MANIFEST_BYTES).await?;
        let manifest =
            Manifest::from_bytes(&bytes).map_err(|reason| self.store.corrupt(key, reason))?;
        if keys::manifest(manifest.version) != key {
            let reason = format!("it is the manifest of {}", manifest.version);
            return Err(self.store.corrupt(key, reason));
        }
        let digest = Digest::of(&bytes);
        let reference = ArtifactRef { key: key.to_owned(), digest, bytes: bytes.len() as u64 };
        Ok(Found { reference, manifest })
    }
}

/// Versions that have a manifest. An empty file in its place is a mark of retention.
fn versions(entries: &[Entry]) -> Vec<PolicyVersion> {
    let manifests = entries.iter().filter(|entry| entry.bytes > 0);
    manifests.filter_map(|entry| keys::manifest_version(&entry.key)).collect()
}
