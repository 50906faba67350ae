//! A writer of checkpoints, and retention beside it, under every interleaving that is tried and a
//! crash between any two requests.

use async_trait::async_trait;
use bytes::Bytes;
use duet_core::work::Weights;
use duet_core::{Digest, Generation, PolicyVersion, Rank, TrainerEpoch};
use duet_store::checkpoint::{FORMAT, Retention};
use duet_store::{Limits, Manifest, Store, StoreError, keys};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const LATER: u64 = 1 << 45;

/// A store that lets others go first now and then, dies after so many requests, and watches what is
/// deleted.
#[derive(Debug)]
struct Watched {
    inner: Arc<InMemory>,
    /// Requests until the process behind this is dead.
    left: AtomicI64,
    /// Whether the request at which it dies still takes effect.
    last_works: bool,
    /// State of the generator that decides who goes first.
    dice: AtomicU64,
    /// Deleted although a complete manifest named it.
    crimes: Arc<Mutex<Vec<String>>>,
}

impl Watched {
    fn new(inner: Arc<InMemory>, left: i64, last_works: bool, seed: u64) -> Watched {
        let (left, dice) = (AtomicI64::new(left), AtomicU64::new(seed));
        Watched { inner, left, last_works, dice, crimes: Arc::default() }
    }

    fn store(self) -> Store {
        let limits = Limits { tries: 1, ..Limits::default() };
        Store::with_backend(Arc::new(self), "watched://").with_limits(limits)
    }

    /// Lets others go first; then whether the request takes effect, and whether it is answered.
    async fn turn(&self) -> (bool, bool) {
        let next = |x: u64| x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        let before =
            self.dice.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |x| Some(next(x)));
        for _ in 0..(before.unwrap_or(0) >> 60) % 4 {
            tokio::task::yield_now().await;
        }
        match self.left.fetch_sub(1, Ordering::Relaxed) {
            1.. => (true, true),
            0 => (self.last_works, false),
            _ => (false, false),
        }
    }

    /// Notes it when a complete manifest names `key`.
    async fn witness(&self, key: &Path) {
        let manifests = self.inner.list(Some(&Path::from(keys::CHECKPOINTS)));
        let all: Vec<ObjectMeta> = manifests.try_collect().await.unwrap();
        let there: BTreeSet<String> = all.iter().map(|meta| meta.location.to_string()).collect();
        for meta in
            all.iter().filter(|meta| keys::manifest_version(meta.location.as_ref()).is_some())
        {
            let bytes = self.inner.get(&meta.location).await.unwrap().bytes().await.unwrap();
            let Ok(manifest) = Manifest::from_bytes(&bytes) else { continue };
            let objects = manifest.objects();
            let mut complete = true;
            for object in &objects {
                let path = Path::from(object.key.as_str());
                complete &= there.contains(&object.key) || self.inner.head(&path).await.is_ok();
            }
            if complete && objects.iter().any(|object| object.key == key.as_ref()) {
                self.crimes.lock().unwrap().push(format!("{key} of {}", meta.location));
            }
        }
    }
}

fn dead() -> Error {
    Error::Generic { store: "watched", source: "the process is dead".into() }
}

impl fmt::Display for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "watched")
    }
}

#[async_trait]
impl ObjectStore for Watched {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let (works, answered) = self.turn().await;
        if works {
            let done = self.inner.put_opts(location, payload, options).await;
            return if answered { done } else { Err(dead()) };
        }
        Err(dead())
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        match self.turn().await {
            (_, true) => self.inner.get_opts(location, options).await,
            _ => Err(dead()),
        }
    }

    fn delete_stream(
        &self,
        mut locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        // The store's own deletion borrows nothing, so the turn is taken with a twin of this.
        let (works, answered) = match self.left.fetch_sub(1, Ordering::Relaxed) {
            1.. => (true, true),
            0 => (self.last_works, false),
            _ => (false, false),
        };
        let twin = Watched::new(self.inner.clone(), i64::MAX, true, 1);
        let (inner, crimes) = (self.inner.clone(), self.crimes.clone());
        Box::pin(async_stream(async move {
            let mut done = Vec::new();
            while let Some(location) = locations.next().await {
                let location = location?;
                if works {
                    twin.witness(&location).await;
                    crimes.lock().unwrap().append(&mut twin.crimes.lock().unwrap());
                    inner.delete(&location).await?;
                }
                done.push(if answered { Ok(location) } else { Err(dead()) });
            }
            Ok(done)
        }))
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        if self.left.fetch_sub(1, Ordering::Relaxed) > 0 {
            return self.inner.list(prefix);
        }
        Box::pin(futures::stream::iter([Err(dead())]))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// The items of a list that is made at once.
fn async_stream(
    made: impl Future<Output = Result<Vec<Result<Path>>>> + Send + 'static,
) -> impl futures::Stream<Item = Result<Path>> + Send {
    futures::stream::once(made)
        .flat_map(|made| futures::stream::iter(made.unwrap_or_else(|error| vec![Err(error)])))
}

async fn object(store: &Store, key: &str) -> duet_store::Result<duet_core::ArtifactRef> {
    store.artifacts().put(key, Bytes::from(format!("contents of {key}"))).await
}

/// Writes a checkpoint as trainers and coordinator do: shards, weights, state, manifest.
async fn checkpoint(store: &Store, version: u64, epoch: u64) -> duet_store::Result<PolicyVersion> {
    let (version, epoch) = (PolicyVersion(version), TrainerEpoch(epoch));
    let mut shards = Vec::new();
    for rank in 0..2 {
        shards.push(vec![object(store, &keys::shard(version, Rank(rank), 2, epoch)).await?]);
    }
    let llm = object(store, &keys::weights(version, keys::Branch::Llm, epoch)).await?;
    let digest = Digest::of(&version.0.to_le_bytes());
    let scheduler = object(store, &keys::scheduler_state(version, digest)).await?;
    let manifest = Manifest {
        format: FORMAT.to_owned(),
        version,
        world: 2,
        shards,
        weights: Weights { version, llm: Some(llm), dit: None, digest },
        scheduler: Some(scheduler),
        journal_position: version.0,
        generation: Generation(1),
        run: "test".to_owned(),
        config: Digest::of(b"config"),
        created_unix_ms: 1,
        notes: [].into(),
    };
    store.checkpoints().write(&manifest).await.map(|_| version)
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// A process that writes checkpoints from `first` on and prunes after each, as the coordinator does,
/// until it dies. Returns the versions that were acknowledged.
async fn life(store: &Store, first: u64, epoch: u64, keep: u32) -> Vec<PolicyVersion> {
    let retention = Retention { last: keep, every: 0, grace_ms: 0 };
    let mut acknowledged = Vec::new();
    for version in first..first + 4 {
        match checkpoint(store, version, epoch).await {
            Ok(version) => acknowledged.push(version),
            Err(_) => return acknowledged,
        }
        if store.checkpoints().prune(retention, &BTreeSet::new(), LATER).await.is_err() {
            return acknowledged;
        }
    }
    acknowledged
}

#[test]
fn after_a_crash_between_any_two_requests_the_newest_checkpoint_is_whole() {
    run(async {
        let mut ended = false;
        for requests in 0.. {
            for last_works in [false, true] {
                let disk = Arc::new(InMemory::new());
                let truth = Store::with_backend(disk.clone(), "disk");
                let dying = Watched::new(disk.clone(), requests, last_works, requests as u64);
                let crimes = dying.crimes.clone();
                let acknowledged = life(&dying.store(), 1, 1, 2).await;
                assert!(crimes.lock().unwrap().is_empty(), "{requests}: {crimes:?}");
                let newest = truth.checkpoints().newest().await.unwrap();
                let version = newest.as_ref().map(|manifest| manifest.version);
                assert!(version >= acknowledged.last().copied(), "{requests}: {version:?}");
                if let Some(manifest) = &newest {
                    truth.checkpoints().verify(manifest).await.unwrap();
                }
                // The next process goes on from there, and nothing is in its way.
                let from = version.map_or(0, |version| version.0) + 1;
                let next = Watched::new(disk, i64::MAX, true, 7).store();
                assert_eq!(life(&next, from, 2, 2).await.len(), 4, "{requests}");
                let newest = truth.checkpoints().newest().await.unwrap().unwrap();
                assert_eq!(newest.version, PolicyVersion(from + 3));
                truth.checkpoints().verify(&newest).await.unwrap();
                // So many requests that it was not stopped any more.
                ended |= acknowledged.len() == 4 && !last_works;
            }
            if ended {
                assert!(requests > 40, "{requests} requests for four checkpoints");
                break;
            }
        }
    });
}

#[test]
fn retention_beside_a_writer_never_deletes_what_a_complete_manifest_names() {
    let mut completed_late = 0;
    for seed in 0..600u64 {
        let (crimes, outcome, whole) = run(async {
            let disk = Arc::new(InMemory::new());
            let truth = Store::with_backend(disk.clone(), "disk");
            for version in [2, 3, 8, 9] {
                checkpoint(&truth, version, 1).await.unwrap();
            }
            let writer = Watched::new(disk.clone(), i64::MAX, true, seed);
            let sweeper = Watched::new(disk.clone(), i64::MAX, true, seed ^ 0x5eed);
            let crimes = (writer.crimes.clone(), sweeper.crimes.clone());
            let (writer, sweeper) = (writer.store(), sweeper.store());
            // A version that was overtaken, one that retention wants to delete, and a new one.
            let late = async {
                let overtaken = checkpoint(&writer, 5, 2).await;
                let again = checkpoint(&writer, 3, 1).await;
                (overtaken, again, checkpoint(&writer, 10, 2).await)
            };
            let retention = Retention { last: 2, every: 0, grace_ms: 0 };
            let sweep = async {
                for _ in 0..3 {
                    let (checkpoints, none) = (sweeper.checkpoints(), BTreeSet::new());
                    match checkpoints.prune(retention, &none, LATER).await {
                        // Somebody else's deletion between listing and reading: the next one does it.
                        Ok(_) | Err(StoreError::Missing { .. } | StoreError::Corrupt { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            };
            let (outcome, ()) = tokio::join!(late, sweep);
            let mut whole = true;
            let newest = truth.checkpoints().newest().await.unwrap().unwrap();
            whole &= newest.version == PolicyVersion(10);
            whole &= truth.checkpoints().verify(&newest).await.is_ok();
            let seen: Vec<String> =
                [crimes.0, crimes.1].iter().flat_map(|c| c.lock().unwrap().clone()).collect();
            (seen, outcome, whole)
        });
        assert!(crimes.is_empty(), "SEED={seed}: {crimes:?}");
        assert!(outcome.2.is_ok() && whole, "SEED={seed}: {outcome:?}");
        completed_late += u32::from(outcome.0.is_ok());
    }
    // Both orders were tried.
    assert!((1..600).contains(&completed_late), "{completed_late}");
}
