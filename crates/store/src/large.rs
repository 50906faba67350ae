//! Large objects of stores behind a network, in parts: each with tries of its own, so that a lost
//! connection costs a part and not the object.
//!
//! Such an upload takes effect as a whole when it is completed, but networks' stores have no
//! condition for that. Creation is therefore checked before, and the callers' keys do the rest: large
//! objects are named by version and trainer epoch, which one group of processes has.

use crate::error::{Result, StoreError};
use crate::store::Store;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{MultipartId, PutPayload};
use std::fmt;
use std::sync::Arc;

/// Parts that are sent at the same time.
const AT_ONCE: usize = 4;
/// Most parts of an object: S3's limit is 10,000.
const MOST_PARTS: u64 = 9_000;

/// How a store takes large objects.
#[derive(Clone)]
pub(crate) struct Large {
    backend: Arc<dyn MultipartStore>,
    prefix: Path,
    /// Objects of more bytes go in parts, of this size or larger.
    part: u64,
}

impl fmt::Debug for Large {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "parts of {} bytes", self.part)
    }
}

impl Large {
    /// Parts of at least `part` bytes (S3: 5 MiB or more) below `prefix`.
    pub(crate) fn new(backend: Arc<dyn MultipartStore>, prefix: Path, part: u64) -> Large {
        Large { backend, prefix, part: part.max(1) }
    }

    /// Whether so many bytes go in parts.
    pub(crate) fn takes(&self, bytes: u64) -> bool {
        bytes > self.part
    }

    /// Creates an object that must not exist.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub(crate) async fn create(&self, store: &Store, key: &str, bytes: Bytes) -> Result<()> {
        let total = bytes.len() as u64;
        if store.size(key).await?.is_some() {
            return Err(StoreError::Exists {
                place: store.place().to_owned(),
                key: key.to_owned(),
            });
        }
        let path = Path::from_iter(self.prefix.parts().chain(Path::from(key).parts()));
        let id = store.retry("begin", key, 0, || self.backend.create_multipart(&path)).await?;
        let sent = self.send(store, key, &path, (&id, bytes.clone())).await;
        let done = match sent {
            Ok(parts) => {
                let complete = || self.backend.complete_multipart(&path, &id, parts.clone());
                store.retry("complete", key, total, complete).await.map(drop)
            }
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => Ok(()),
            // The answer to a completion was lost, and the next try found no upload any more.
            Err(_) if store.holds(key, &bytes).await.unwrap_or(false) => Ok(()),
            Err(error) => {
                // Parts that are left cost room until the store's own clean-up; no more than that.
                if let Err(left) = self.backend.abort_multipart(&path, &id).await {
                    tracing::warn!(key, %left, "parts of an upload that failed are left behind");
                }
                Err(error)
            }
        }
    }

    async fn send(
        &self,
        store: &Store,
        key: &str,
        path: &Path,
        (id, bytes): (&MultipartId, Bytes),
    ) -> Result<Vec<PartId>> {
        let total = bytes.len() as u64;
        let size = self.part.max(total.div_ceil(MOST_PARTS));
        let cuts = (0..total.div_ceil(size)).map(|n| (n * size)..((n + 1) * size).min(total));
        let parts = cuts.enumerate().map(|(n, cut)| {
            // Positions in a buffer of this process.
            let part = bytes.slice(cut.start as usize..cut.end as usize);
            async move {
                let length = part.len() as u64;
                let put =
                    || self.backend.put_part(path, id, n, PutPayload::from_bytes(part.clone()));
                store.retry("write a part of", key, length, put).await
            }
        });
        futures::stream::iter(parts).buffered(AT_ONCE).try_collect().await
    }
}
