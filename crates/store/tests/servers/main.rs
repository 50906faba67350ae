//! Checkpoints on real object stores that these tests start, behind a proxy that disturbs them: there
//! is always a complete newest checkpoint. Models' folders are fetched from them as well.
//!
//! The servers come from `scripts/servers.sh`. Where they are not installed, these tests say so and
//! test nothing; with `CI` set they fail. `DUET_TEST_S3=127.0.0.1:7480` adds any running S3 server.

mod engines;
mod proxy;

use bytes::Bytes;
use duet_core::work::Weights;
use duet_core::{ArtifactRef, Digest, Generation, PolicyVersion, Rank, TrainerEpoch};
use duet_store::blocking::BlockingStore;
use duet_store::checkpoint::{FORMAT, Retention};
use duet_store::folder::{self, Fetching, SUMS, Sums};
use duet_store::{Manifest, Store, doctor, keys};
use engines::{Engine, Server};
use proxy::{Fate, Plan};
use std::collections::BTreeSet;

const LATER: u64 = 1 << 45;

/// Bytes of an object of their own.
fn contents(key: &str, length: usize) -> Bytes {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(key.as_bytes()).finalize_xof().fill(&mut bytes);
    bytes.into()
}

async fn put(store: &Store, key: String, length: usize) -> duet_store::Result<ArtifactRef> {
    store.artifacts().put(&key, contents(&key, length)).await
}

/// Writes a checkpoint as trainers and coordinator do: the shards at the same time, rank 0's in parts;
/// then weights and state; the manifest last; then retention.
async fn checkpoint(store: &Store, part: u64, number: u64, epoch: u64) -> duet_store::Result<()> {
    let (version, epoch) = (PolicyVersion(number), TrainerEpoch(epoch));
    let key = |rank| keys::shard(version, Rank(rank), 2, epoch);
    let (first, second) =
        tokio::join!(put(store, key(0), part as usize + 1000), put(store, key(1), 2000));
    let llm = put(store, keys::weights(version, keys::Branch::Llm, epoch), 500).await;
    let digest = Digest::of(&number.to_le_bytes());
    let state = put(store, keys::scheduler_state(version, digest), 300).await?;
    let manifest = Manifest {
        format: FORMAT.to_owned(),
        version,
        world: 2,
        shards: vec![vec![first?], vec![second?]],
        weights: Weights { version, llm: Some(llm?), dit: None, digest },
        scheduler: Some(state),
        journal_position: number,
        generation: Generation(1),
        run: "test".to_owned(),
        config: Digest::of(b"config"),
        created_unix_ms: 1,
        notes: [].into(),
    };
    store.checkpoints().write(&manifest).await?;
    let retention = Retention { last: 2, every: 0, grace_ms: 0 };
    store.checkpoints().prune(retention, &BTreeSet::new(), LATER).await?;
    Ok(())
}

/// The newest checkpoint of a store, every byte of it verified.
async fn newest(store: &Store) -> u64 {
    let found = store.checkpoints().newest().await.expect("it can be listed");
    let manifest = found.expect("there is always a newest checkpoint");
    store.checkpoints().verify(&manifest).await.expect("it is whole");
    manifest.version.0
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// A process that dies at its n-th request, for every n until it gets through.
async fn dies_anywhere(server: &Server) {
    for requests in 0.. {
        assert!(requests < 400, "it never gets through");
        let works = requests % 2 == 0;
        let prefix = format!("dies-{requests}");
        let (honest, _proxy) = server.store(Plan::Honest, &prefix, 3);
        checkpoint(&honest, server.part(), 1, 1).await.expect("nothing is wrong yet");
        let (dying, proxy) = server.store(Plan::Dies(requests, works), &prefix, 1);
        let written = checkpoint(&dying, server.part(), 2, 1).await;
        let version = newest(&honest).await;
        assert!(version == 2 || written.is_err(), "acknowledged after {requests}, but gone");
        // The next process goes on from there, and nothing is in its way.
        checkpoint(&honest, server.part(), version + 1, 2).await.expect("the next process");
        assert_eq!(newest(&honest).await, version + 1, "{requests}");
        if written.is_ok() {
            assert!(proxy.fates().iter().all(|fate| *fate == Fate::Passed));
            assert!(requests > 12, "{requests} requests for a checkpoint in parts");
            return;
        }
    }
}

/// Errors, lost answers, lost connections and slow ones, at four requests in ten.
async fn bears_faults(server: &Server, seeds: std::ops::Range<u64>) {
    let mut seen = BTreeSet::new();
    for seed in seeds {
        let prefix = format!("faults-{seed}");
        let (honest, _proxy) = server.store(Plan::Honest, &prefix, 3);
        checkpoint(&honest, server.part(), 1, 1).await.expect("nothing is wrong yet");
        let (faulty, proxy) = server.store(Plan::Faulty(seed), &prefix, 12);
        for number in 2..5 {
            let written = checkpoint(&faulty, server.part(), number, 1).await;
            let version = newest(&honest).await;
            assert!(version <= number, "SEED={seed}");
            assert!(version == number || written.is_err(), "SEED={seed}: {number} is gone");
        }
        seen.extend(proxy.fates().into_iter().map(|fate| format!("{fate:?}")));
    }
    assert_eq!(seen.len(), 6, "every kind of fault was played: {seen:?}");
}

/// A model's folder is fetched over bad connections, verified, and fetched once; a file that was changed
/// on the server is named.
fn folder(server: &Server) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let blocking = |store: &Store| BlockingStore::new(store.clone(), runtime.handle().clone());
    let files = [("config.json", 100), ("vae/part-1.safetensors", (16 << 20) + 5)];
    let original = tempfile::tempdir().unwrap();
    for (name, length) in files {
        let path = original.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, contents(name, length)).unwrap();
    }
    let (honest, _proxy) = server.store(Plan::Honest, "model", 3);
    let upload = blocking(&honest);
    for (name, length) in files {
        upload.put(name, contents(name, length)).unwrap();
    }
    let sums = Sums::of(original.path()).unwrap();
    upload.put(SUMS, sums.to_text()).unwrap();

    let cache = tempfile::tempdir().unwrap();
    let (faulty, proxy) = server.store(Plan::Faulty(1), "model", 40);
    let fetch = |store: &Store| {
        let mut bytes = 0;
        let fetched = folder::fetch(&blocking(store), cache.path(), &mut |state| {
            if let Fetching::Bytes { done, .. } = state {
                bytes = done;
            }
        });
        fetched.map(|(path, _)| (path, bytes))
    };
    let (path, bytes) = fetch(&faulty).unwrap();
    assert_eq!(bytes, files.iter().map(|(_, length)| *length as u64).sum::<u64>());
    assert!(proxy.fates().iter().any(|fate| *fate != Fate::Passed), "it was disturbed");
    for (name, length) in files {
        assert_eq!(std::fs::read(path.join(name)).unwrap(), contents(name, length), "{name}");
    }
    assert_eq!(fetch(&honest).unwrap(), (path, 0), "it is in the cache");

    let (name, length) = files[1];
    let elsewhere = server.store(Plan::Honest, "tampered", 3);
    let upload = blocking(&elsewhere.0);
    upload.put(files[0].0, contents(files[0].0, files[0].1)).unwrap();
    upload.put(name, contents("other", length)).unwrap();
    upload.put(SUMS, sums.to_text()).unwrap();
    let empty = tempfile::tempdir().unwrap();
    let error = folder::fetch(&upload, empty.path(), &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("DU-9"), "{error}");
}

fn everything(engine: Engine) {
    let Some(server) = engine.start() else { return };
    folder(&server);
    run(async {
        let (honest, _proxy) = server.store(Plan::Honest, "doctor", 3);
        let found = doctor::probe(&honest).await.expect("it can be asked");
        // moto checks creations without holding anything else off, and of a server that somebody else
        // chose nothing is known: one writer at a time needs less.
        match engine {
            Engine::Azurite => assert!(found.is_fit(), "{found:?}"),
            Engine::Moto | Engine::External => eprintln!("{found:?}"),
        }
        dies_anywhere(&server).await;
        bears_faults(&server, 0..6).await;
    });
}

#[test]
fn moto_always_has_a_complete_newest_checkpoint() {
    everything(Engine::Moto);
}

#[test]
fn azurite_always_has_a_complete_newest_checkpoint() {
    everything(Engine::Azurite);
}

#[test]
fn any_other_server_always_has_a_complete_newest_checkpoint() {
    everything(Engine::External);
}
