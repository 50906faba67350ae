//! Stores that misbehave, and helpers of several tests.
#![allow(dead_code)]

use async_trait::async_trait;
use duet_store::{Limits, Store};
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// How a store misbehaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Vice {
    /// None.
    None,
    /// Conditional writes answer 200 and ignore the condition, as Garage does.
    IgnoresConditions,
    /// Conditions are checked, but not in the same moment as the write, as s3s-fs does.
    ChecksLate,
    /// Every other request fails, half of those after having taken effect.
    Flaky,
    /// Nobody answers.
    Down,
    /// The disk is full after so many creations.
    Full,
    /// The same, but the first creation that fails has taken effect.
    FullAfterAll,
}

/// An in-memory store with a vice.
#[derive(Debug)]
pub struct Odd {
    inner: InMemory,
    vice: Vice,
    /// Requests so far that were told to fail or not.
    pub requests: AtomicU64,
    /// Creations that still work, for a full disk.
    pub room: AtomicI64,
}

impl Odd {
    pub fn new(vice: Vice) -> Odd {
        let (requests, room) = (AtomicU64::new(0), AtomicI64::new(i64::MAX));
        Odd { inner: InMemory::new(), vice, requests, room }
    }

    pub fn store(vice: Vice) -> Store {
        Store::with_backend(Arc::new(Odd::new(vice)), "odd://").with_limits(quick())
    }

    /// Whether this request fails, and if so whether it takes effect all the same.
    fn fate(&self) -> (bool, bool) {
        let n = self.requests.fetch_add(1, Ordering::Relaxed);
        let fails = self.vice == Vice::Down || self.vice == Vice::Flaky && n.is_multiple_of(2);
        (fails, self.vice == Vice::Flaky && n.is_multiple_of(4))
    }
}

/// Many tries, short waits.
pub fn quick() -> Limits {
    Limits {
        tries: 6,
        backoff: Duration::from_micros(10),
        backoff_max: Duration::from_micros(100),
        ..Limits::default()
    }
}

fn lost() -> Error {
    Error::Generic { store: "odd", source: "500, try again".into() }
}

impl fmt::Display for Odd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "odd")
    }
}

#[async_trait]
impl ObjectStore for Odd {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        mut options: PutOptions,
    ) -> Result<PutResult> {
        let full = matches!(self.vice, Vice::Full | Vice::FullAfterAll);
        let room = if full { self.room.fetch_sub(1, Ordering::Relaxed) } else { 1 };
        if room <= 0 {
            if room == 0 && self.vice == Vice::FullAfterAll {
                self.inner.put_opts(location, payload, options).await?;
            }
            let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(Error::Generic { store: "odd", source: Box::new(source) });
        }
        match self.vice {
            Vice::IgnoresConditions => options.mode = PutMode::Overwrite,
            Vice::ChecksLate if options.mode == PutMode::Create => {
                if self.inner.get_opts(location, GetOptions::default()).await.is_ok() {
                    let path = location.to_string();
                    return Err(Error::AlreadyExists { path, source: "412".into() });
                }
                tokio::task::yield_now().await;
                options.mode = PutMode::Overwrite;
            }
            _ => {}
        }
        let (fails, works) = self.fate();
        if fails && !works {
            return Err(lost());
        }
        let done = self.inner.put_opts(location, payload, options).await?;
        if fails { Err(lost()) } else { Ok(done) }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        if self.fate().0 {
            return Err(lost());
        }
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
