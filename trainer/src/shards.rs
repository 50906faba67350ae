//! A checkpoint's shards, opened for reading: every byte is verified before any is used.

use crate::error::TrainError;
use duet_core::{ArtifactRef, Digest};
use duet_store::{Manifest, Store, keys};
use duet_torch::tensorfile::{TensorFile, TensorSource};
use futures::future::try_join_all;
use std::path::PathBuf;

/// Opens all shards at the same time. Those in a folder of this machine are mapped, not copied.
///
/// # Errors
/// [`TrainError::Store`] when one is not there or not what the manifest says;
/// [`TrainError::Checkpoint`] when there are none.
pub async fn open(store: &Store, manifest: &Manifest) -> Result<Vec<TensorFile>, TrainError> {
    let files =
        try_join_all(manifest.shards.iter().flatten().map(|shard| one(store, shard))).await?;
    if files.is_empty() {
        let reason = format!("{} names no trainer shards", keys::manifest(manifest.version));
        return Err(TrainError::Checkpoint(reason));
    }
    Ok(files)
}

async fn one(store: &Store, shard: &ArtifactRef) -> Result<TensorFile, TrainError> {
    let Some(root) = store.local_root() else {
        let bytes = store.artifacts().get(shard).await.map_err(stored)?;
        return Ok(TensorFile::from_bytes(shard.key.clone(), bytes.into())?);
    };
    // Also refuses a key that leads out of the folder.
    store.artifacts().check_size(shard).await.map_err(stored)?;
    let (path, shard) = (root.join(&shard.key), shard.clone());
    let opened = tokio::task::spawn_blocking(move || mapped(path, &shard)).await;
    opened.map_err(|error| TrainError::Store(format!("a shard could not be read: {error}")))?
}

/// A file of this machine; written once under its name and never changed, so what was hashed is what
/// is read.
fn mapped(path: PathBuf, shard: &ArtifactRef) -> Result<TensorFile, TrainError> {
    let file = TensorFile::open(path)?;
    let found = Digest::of(file.bytes());
    if found != shard.digest {
        let reason = format!("{}: its hash is {found}, it must be {}", file.label(), shard.digest);
        return Err(TrainError::Store(reason));
    }
    Ok(file)
}

fn stored(error: duet_store::StoreError) -> TrainError {
    TrainError::Store(error.to_string())
}
