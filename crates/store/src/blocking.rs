//! The store for threads that are not part of a runtime (the device thread of a trainer).

use crate::checkpoint::Manifest;
use crate::error::Result;
use crate::store::Store;
use bytes::Bytes;
use duet_core::ArtifactRef;
use std::future::Future;
use tokio::runtime::Handle;

/// A store and the runtime that does its waiting. Never call it from a task of a runtime: it blocks
/// its thread, and tokio stops the program that does so in a task.
#[derive(Clone, Debug)]
pub struct BlockingStore {
    store: Store,
    runtime: Handle,
}

impl BlockingStore {
    /// A store for plain threads.
    pub fn new(store: Store, runtime: Handle) -> BlockingStore {
        BlockingStore { store, runtime }
    }

    /// The store itself.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Waits for anything.
    pub fn wait<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// As [`crate::Artifacts::put`].
    ///
    /// # Errors
    /// The same.
    pub fn put(&self, key: &str, bytes: impl Into<Bytes>) -> Result<ArtifactRef> {
        self.wait(self.store.artifacts().put(key, bytes.into()))
    }

    /// As [`crate::Artifacts::get`].
    ///
    /// # Errors
    /// The same.
    pub fn get(&self, reference: &ArtifactRef) -> Result<Bytes> {
        self.wait(self.store.artifacts().get(reference))
    }

    /// As [`crate::Checkpoints::read`].
    ///
    /// # Errors
    /// The same.
    pub fn manifest(&self, reference: &ArtifactRef) -> Result<Manifest> {
        self.wait(self.store.checkpoints().read(reference))
    }
}
