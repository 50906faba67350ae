//! Artifacts: bytes under a key and a content hash, written once.

use crate::error::{Result, StoreError};
use crate::store::Store;
use bytes::Bytes;
use duet_core::{ArtifactRef, Digest};

/// The artifacts of a store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Artifacts {
    store: Store,
}

impl Artifacts {
    pub(crate) fn new(store: Store) -> Artifacts {
        Artifacts { store }
    }

    /// The store these lie in.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What a reference to these bytes at this key looks like.
    pub fn reference(key: &str, bytes: &[u8]) -> ArtifactRef {
        ArtifactRef { key: key.to_owned(), digest: Digest::of(bytes), bytes: bytes.len() as u64 }
    }

    /// Writes an artifact, once. To write the same bytes again is no error and changes nothing.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when other bytes lie under the key (DU-9); and what can happen to
    /// any operation.
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<ArtifactRef> {
        // Hashed while it is written: neither waits for the other.
        let writing = self.store.create_large(key, bytes.clone());
        let (created, digest) = futures::future::join(writing, digest(&bytes)).await;
        let reference = ArtifactRef { key: key.to_owned(), digest, bytes: bytes.len() as u64 };
        match created {
            Ok(()) => Ok(reference),
            Err(StoreError::Exists { .. }) if self.store.holds(key, &bytes).await? => Ok(reference),
            Err(StoreError::Exists { .. }) => Err(self.store.conflict(key)),
            Err(error) => Err(error),
        }
    }

    /// An artifact's bytes, every one of them verified.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when length or hash differ (DU-9); [`StoreError::Missing`]; and what
    /// can happen to any operation.
    pub async fn get(&self, reference: &ArtifactRef) -> Result<Bytes> {
        self.check_size(reference).await?;
        let bytes = self.store.get(&reference.key).await?;
        let digest = digest(&bytes).await;
        if digest != reference.digest {
            let reason = format!("its hash is {digest}, it must be {}", reference.digest);
            return Err(self.store.corrupt(&reference.key, reason));
        }
        Ok(bytes)
    }

    /// Whether an artifact is there with the right length; reads nothing of it.
    ///
    /// # Errors
    /// [`StoreError::Missing`]; [`StoreError::Corrupt`] when the length differs.
    pub async fn check_size(&self, reference: &ArtifactRef) -> Result<()> {
        let key = &reference.key;
        let bytes = self.store.size(key).await?.ok_or_else(|| self.store.missing(key))?;
        if bytes != reference.bytes {
            let reason = format!("it has {bytes} bytes, it must have {}", reference.bytes);
            return Err(self.store.corrupt(key, reason));
        }
        Ok(())
    }

    /// Deletes these. What is not there is as good as deleted.
    ///
    /// # Errors
    /// What can happen to any operation.
    pub async fn delete<'a>(
        &self,
        references: impl IntoIterator<Item = &'a ArtifactRef>,
    ) -> Result<()> {
        for reference in references {
            self.store.delete(&reference.key).await?;
        }
        Ok(())
    }
}

/// The hash of some bytes. Many are hashed aside, where nobody waits for the thread.
async fn digest(bytes: &Bytes) -> Digest {
    const MANY: usize = 1 << 20;
    if bytes.len() < MANY {
        return Digest::of(bytes);
    }
    let many = bytes.clone();
    let aside = tokio::task::spawn_blocking(move || Digest::of(&many)).await;
    aside.unwrap_or_else(|_| Digest::of(bytes))
}
