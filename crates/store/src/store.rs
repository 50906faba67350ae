//! A store: a few operations on keys, each with a deadline and a bounded number of tries.

use crate::artifacts::Artifacts;
use crate::checkpoint::Checkpoints;
use crate::error::{Result, StoreError, name};
use crate::large::Large;
use crate::lazy::{Lazy, torn};
use crate::lineage::Lineage;
use bytes::Bytes;
use duet_core::url::without_credentials;
use futures::StreamExt;
use object_store::multipart::MultipartStore;
use object_store::path::Path as Key;
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long and how often a store is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tries of an operation, the first one counted.
    pub tries: u32,
    /// Wait before the second try; doubles with each further one.
    pub backoff: Duration,
    /// Longest such wait.
    pub backoff_max: Duration,
    /// For one try on an object without size.
    pub timeout: Duration,
    /// More for each MiB that is read or written.
    pub per_mib: Duration,
    /// Largest object that is read whole.
    pub max_bytes: u64,
    /// Most objects of a listing.
    pub max_entries: usize,
}

impl Default for Limits {
    /// Five tries of 30 s each plus half a second for each MiB, 0.2 s to 5 s apart; objects of at
    /// most 1 TiB; listings of at most ten million objects.
    fn default() -> Self {
        Limits {
            tries: 5,
            backoff: Duration::from_millis(200),
            backoff_max: Duration::from_secs(5),
            timeout: Duration::from_secs(30),
            per_mib: Duration::from_millis(500),
            max_bytes: 1 << 40,
            max_entries: 10_000_000,
        }
    }
}

/// For one try of [`Store::reach`].
const REACH: Duration = Duration::from_secs(3);

/// An object, as a listing shows it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// Its length.
    pub bytes: u64,
    /// When it was written, in milliseconds since 1970, by the store's clock.
    pub modified_unix_ms: i64,
}

/// A place where objects lie under keys. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    backend: Arc<dyn ObjectStore>,
    place: Arc<str>,
    root: Option<Arc<Path>>,
    limits: Limits,
    /// How large objects are written; `None`: as all others.
    large: Option<Large>,
    /// What is synced later; `None`: nothing is.
    lazy: Option<Arc<Lazy>>,
    /// What to look after when a store behind a network does not answer; `None`: this is none.
    remedy: Option<Arc<str>>,
}

impl Store {
    /// Opens a store by URL: a path or `file://...` (made when it is not there; relative paths are
    /// relative to the current directory), `memory://`, or `s3://`, `gs://`, `az://` where the
    /// program was built with that feature (credentials from the usual environment variables).
    ///
    /// Files are written aside, synced and then linked to their name, so that nothing half-written
    /// is ever visible and what was written survives the loss of power.
    ///
    /// # Errors
    /// The URL is of no known kind, or the folder cannot be made.
    pub fn open(url: &str) -> Result<Store> {
        match url.split_once("://") {
            None => Store::folder(Path::new(url)),
            Some(("file", path)) => Store::folder(Path::new(path)),
            Some(("memory", _)) => Ok(Store::memory()),
            Some((scheme, _)) => crate::remote::open(scheme, url),
        }
    }

    /// A folder of this machine.
    fn folder(path: &Path) -> Result<Store> {
        let url = path.display().to_string();
        let bad = |reason: String| StoreError::Url { url: url.clone(), reason };
        if url.is_empty() {
            return Err(bad("is empty: give a folder or a URL".to_owned()));
        }
        std::fs::create_dir_all(path).map_err(|error| {
            bad(format!("cannot make the folder ({error}); choose one that can be written"))
        })?;
        let backend = object_store::local::LocalFileSystem::new_with_prefix(path)
            .map_err(|error| bad(error.to_string()))?
            .with_fsync(true)
            .with_automatic_cleanup(true);
        let root = std::fs::canonicalize(path).map_err(|error| bad(error.to_string()))?;
        let mut store = Store::with_backend(Arc::new(backend), &url);
        store.lazy =
            Some(Arc::new(Lazy::new(root.clone()).map_err(|error| bad(error.to_string()))?));
        store.root = Some(root.into());
        Ok(store)
    }

    /// A store that is gone with the process.
    pub fn memory() -> Store {
        Store::with_backend(Arc::new(object_store::memory::InMemory::new()), "memory://")
    }

    /// A store on any backend; `place` is what errors call it.
    pub fn with_backend(backend: Arc<dyn ObjectStore>, place: &str) -> Store {
        Store {
            backend,
            place: without_credentials(place).into(),
            root: None,
            limits: Limits::default(),
            large: None,
            lazy: None,
            remedy: None,
        }
    }

    /// The same store, which is behind a network; `remedy` is what errors tell to do when it does not
    /// answer at the start.
    pub fn behind_network(mut self, remedy: &str) -> Store {
        self.remedy = Some(remedy.into());
        self
    }

    /// The same store, which writes artifacts of more than `part` bytes in parts below `prefix` of a
    /// backend.
    pub fn in_parts(mut self, backend: Arc<dyn MultipartStore>, prefix: Key, part: u64) -> Store {
        self.large = Some(Large::new(backend, prefix, part));
        self
    }

    /// The same store with other limits.
    pub fn with_limits(mut self, limits: Limits) -> Store {
        self.limits = limits;
        self
    }

    /// What errors call this store: its URL without credentials.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Where the files lie, if they do.
    pub fn local_root(&self) -> Option<PathBuf> {
        self.root.as_deref().map(Path::to_owned)
    }

    /// Asks a store behind a network for any answer at all, with little patience: for starts, where a
    /// missing credential or a wrong address is likelier than an outage. What runs has the patience
    /// of its [`Limits`].
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] within seven seconds; [`StoreError::Denied`].
    pub async fn reach(&self) -> Result<()> {
        let Some(remedy) = &self.remedy else { return Ok(()) };
        let brief = Limits { tries: 2, timeout: REACH, backoff: REACH / 10, ..self.limits };
        let asked = self.clone().with_limits(brief).size(crate::keys::RUN).await;
        match asked {
            Err(error @ (StoreError::Timeout { .. } | StoreError::Backend { .. })) => {
                Err(StoreError::Unreachable {
                    place: self.place.to_string(),
                    reason: error.reason(),
                    remedy: remedy.to_string(),
                })
            }
            asked => asked.map(drop),
        }
    }

    /// Artifacts of this store.
    pub fn artifacts(&self) -> Artifacts {
        Artifacts::new(self.clone())
    }

    /// Checkpoints of this store.
    pub fn checkpoints(&self) -> Checkpoints {
        Checkpoints::new(self.clone())
    }

    /// Lineage tables of this store.
    pub fn lineage(&self) -> Lineage {
        Lineage::new(self.clone())
    }

    /// Creates an object that must not exist.
    ///
    /// A try whose answer was lost may have succeeded; then the next one finds the object. If it
    /// holds exactly these bytes, that counts as created, so callers that must tell their own
    /// object from another's put something unique into it.
    ///
    /// # Errors
    /// [`StoreError::Exists`] when other bytes lie there; and what can happen to any operation.
    pub async fn create(&self, key: &str, bytes: Bytes) -> Result<()> {
        let path = self.key(key)?;
        let options = PutOptions::from(PutMode::Create);
        let mut tries = 0;
        let done = self
            .retry("create", key, bytes.len() as u64, || {
                tries += 1;
                let payload = PutPayload::from_bytes(bytes.clone());
                self.backend.put_opts(&path, payload, options.clone())
            })
            .await;
        match done {
            Err(StoreError::Exists { .. }) if tries > 1 && self.holds(key, &bytes).await? => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Ok(()),
        }
    }

    /// As [`Store::create`], in parts where the store wants that for so many bytes. Then two writers
    /// of the same key at the same moment are not told from each other, so this is for keys that
    /// only one writer has.
    pub(crate) async fn create_large(&self, key: &str, bytes: Bytes) -> Result<()> {
        match self.large.as_ref().filter(|large| large.takes(bytes.len() as u64)) {
            Some(large) => {
                self.key(key)?;
                large.create(self, key, bytes).await
            }
            None => self.create(key, bytes).await,
        }
    }

    /// As [`Store::create`], but on a local disk it is synced only by [`Store::settle`]: for what can be
    /// written again until then. What a loss of power left of the same bytes is replaced, and the same bytes
    /// are as good as created.
    pub(crate) async fn create_lazily(&self, key: &str, bytes: Bytes) -> Result<()> {
        let Some(lazy) = &self.lazy else { return self.create(key, bytes).await };
        let path = self.key(key)?;
        lazy.owe(key);
        let put = |mode: PutMode| {
            let (options, path, bytes) = (PutOptions::from(mode), &path, &bytes);
            self.retry("create", key, bytes.len() as u64, move || {
                let payload = PutPayload::from_bytes(bytes.clone());
                lazy.backend().put_opts(path, payload, options.clone())
            })
        };
        match put(PutMode::Create).await {
            Err(StoreError::Exists { .. }) => {}
            done => return done.map(drop),
        }
        let found = self.get(key).await?;
        if found == bytes {
            return Ok(());
        }
        if torn(&found, &bytes) {
            tracing::warn!(key, "half-written when the power was lost: written again");
            return put(PutMode::Overwrite).await.map(drop);
        }
        Err(StoreError::Exists { place: self.place.to_string(), key: key.to_owned() })
    }

    /// Creates objects lazily on a thread of a local store, in order up to the first that cannot be:
    /// whether all of them are there. Where not, and on other stores, they are to be created one by one.
    pub(crate) async fn create_all_lazily(&self, objects: Vec<(String, Bytes)>) -> bool {
        let Some(lazy) = &self.lazy else { return false };
        let created = tokio::time::timeout(self.limits.timeout, lazy.create_all(objects));
        created.await.unwrap_or(false)
    }

    /// Returns when all that was created lazily, by this process or one before, survives a loss of
    /// power.
    ///
    /// # Errors
    /// [`StoreError::Unsynced`], from then on always; [`StoreError::Timeout`].
    pub async fn settle(&self) -> Result<()> {
        let Some(lazy) = self.lazy.clone() else { return Ok(()) };
        let after = self.limits.timeout + self.limits.backoff * lazy.count() as u32;
        let place = self.place.clone();
        let aside = tokio::task::spawn_blocking(move || lazy.settle(&place));
        match tokio::time::timeout(after, aside).await {
            Ok(Ok(done)) => done,
            Ok(Err(panic)) => std::panic::resume_unwind(panic.into_panic()),
            Err(_) => Err(StoreError::Timeout {
                place: self.place.to_string(),
                key: "files written lately".to_owned(),
                operation: "sync",
                after,
            }),
        }
    }

    /// Whether the object at `key` holds exactly these bytes.
    pub(crate) async fn holds(&self, key: &str, bytes: &Bytes) -> Result<bool> {
        Ok(self.size(key).await? == Some(bytes.len() as u64) && self.get(key).await? == *bytes)
    }

    /// An object's bytes. Not verified: that is what [`Artifacts::get`] is for.
    ///
    /// # Errors
    /// [`StoreError::Missing`]; [`StoreError::TooLarge`]; and what can happen to any operation.
    pub async fn get(&self, key: &str) -> Result<Bytes> {
        self.get_at_most(key, self.limits.max_bytes).await
    }

    /// An object's bytes, when there are at most `limit`.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub async fn get_at_most(&self, key: &str, limit: u64) -> Result<Bytes> {
        let path = self.key(key)?;
        let limit = limit.min(self.limits.max_bytes);
        let bytes = self.size(key).await?.ok_or_else(|| self.missing(key))?;
        if bytes > limit {
            let (place, key) = (self.place.to_string(), key.to_owned());
            return Err(StoreError::TooLarge { place, key, bytes, limit });
        }
        self.retry("get", key, bytes, || async {
            self.backend.get_opts(&path, GetOptions::default()).await?.bytes().await
        })
        .await
    }

    /// Some of an object's bytes.
    ///
    /// # Errors
    /// As [`Store::get`]; [`StoreError::Backend`] when the object is shorter.
    pub async fn get_range(&self, key: &str, range: std::ops::Range<u64>) -> Result<Bytes> {
        let path = self.key(key)?;
        let bytes = range.end.saturating_sub(range.start);
        self.retry("get", key, bytes, || self.backend.get_range(&path, range.clone())).await
    }

    /// An object's length; `None` when there is none.
    ///
    /// # Errors
    /// What can happen to any operation.
    pub async fn size(&self, key: &str) -> Result<Option<u64>> {
        let path = self.key(key)?;
        match self.retry("look up", key, 0, || self.backend.head(&path)).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(StoreError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The objects whose keys begin with `prefix` and a slash, in key order.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] when there are too many; and what can happen to any operation.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Entry>> {
        let path = self.key(prefix)?;
        let found = self
            .retry("list", prefix, 64 << 20, || async {
                let limit = self.limits.max_entries + 1;
                let mut stream = self.backend.list(Some(&path)).take(limit);
                let mut entries = Vec::new();
                while let Some(meta) = stream.next().await {
                    match meta {
                        Ok(meta) => entries.push(Entry {
                            key: meta.location.to_string(),
                            bytes: meta.size,
                            modified_unix_ms: meta.last_modified.timestamp_millis(),
                        }),
                        // Gone between the reading of the folder and of the file.
                        Err(object_store::Error::NotFound { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(entries)
            })
            .await;
        let mut entries = match found {
            Err(StoreError::Missing { .. }) => Vec::new(),
            found => found?,
        };
        if entries.len() > self.limits.max_entries {
            return Err(StoreError::TooLarge {
                place: self.place.to_string(),
                key: format!("{prefix}/"),
                bytes: entries.len() as u64,
                limit: self.limits.max_entries as u64,
            });
        }
        entries.sort();
        Ok(entries)
    }

    /// Deletes an object; one that is not there is as good as deleted.
    ///
    /// # Errors
    /// What can happen to any operation.
    pub async fn delete(&self, key: &str) -> Result<()> {
        let path = self.key(key)?;
        match self.retry("delete", key, 0, || self.backend.delete(&path)).await {
            Ok(()) | Err(StoreError::Missing { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Runs one operation with the limits.
    pub(crate) async fn retry<T, F>(
        &self,
        operation: &'static str,
        key: &str,
        bytes: u64,
        mut call: impl FnMut() -> F,
    ) -> Result<T>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let mib = u32::try_from(bytes >> 20).unwrap_or(u32::MAX);
        let deadline = self.limits.timeout + self.limits.per_mib.saturating_mul(mib);
        let mut wait = self.limits.backoff;
        let mut failed = 0;
        loop {
            let error = match tokio::time::timeout(deadline, call()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(source)) => match name(&self.place, key, operation, &source) {
                    Some(error) => return Err(error),
                    None => StoreError::Backend {
                        place: self.place.to_string(),
                        key: key.to_owned(),
                        operation,
                        source,
                    },
                },
                Err(_) => StoreError::Timeout {
                    place: self.place.to_string(),
                    key: key.to_owned(),
                    operation,
                    after: deadline,
                },
            };
            failed += 1;
            if failed >= self.limits.tries {
                return Err(error);
            }
            tracing::warn!(operation, key, failed, %error, "store did not answer as hoped: again");
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(self.limits.backoff_max);
        }
    }

    fn key(&self, key: &str) -> Result<Key> {
        let bad = |reason: String| StoreError::Key {
            place: self.place.to_string(),
            key: key.chars().take(200).collect(),
            reason,
        };
        if key.is_empty() {
            return Err(bad("it is empty".to_owned()));
        }
        match Key::parse(key) {
            Ok(path) if path.as_ref() == key => Ok(path),
            Ok(path) => Err(bad(format!("write it as `{path}`"))),
            Err(error) => Err(bad(error.to_string())),
        }
    }

    pub(crate) fn missing(&self, key: &str) -> StoreError {
        StoreError::Missing { place: self.place.to_string(), key: key.to_owned() }
    }

    pub(crate) fn corrupt(&self, key: &str, reason: impl Into<String>) -> StoreError {
        StoreError::Corrupt {
            place: self.place.to_string(),
            key: key.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn conflict(&self, key: &str) -> StoreError {
        StoreError::Conflict { place: self.place.to_string(), key: key.to_owned() }
    }
}
