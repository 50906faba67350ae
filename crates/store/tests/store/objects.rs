//! Stores, artifacts and the probe.

use crate::common::{Odd, Vice, quick};
use bytes::Bytes;
use duet_core::Digest;
use duet_store::doctor::{Capability, probe};
use duet_store::{BlockingStore, Store, StoreError};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn folder() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("a/b").display().to_string()).unwrap();
    (folder, store)
}

#[tokio::test]
async fn du_9_an_artifact_is_written_once_and_verified_at_every_read() {
    let (_folder, local) = folder();
    for store in [Store::memory(), local, Odd::store(Vice::Flaky)] {
        let artifacts = store.artifacts();
        let bytes = Bytes::from_static(b"some bytes");
        let reference = artifacts.put("artifacts/x", bytes.clone()).await.unwrap();
        assert_eq!(reference.digest, Digest::of(&bytes));
        assert_eq!(artifacts.put("artifacts/x", bytes.clone()).await.unwrap(), reference);
        let other = artifacts.put("artifacts/x", Bytes::from_static(b"other byte")).await;
        assert!(matches!(other, Err(StoreError::Conflict { .. })), "{other:?}");
        assert_eq!(artifacts.get(&reference).await.unwrap(), bytes);
        artifacts.delete([&reference]).await.unwrap();
        let gone = artifacts.get(&reference).await.unwrap_err();
        assert!(
            matches!(gone, StoreError::Missing { .. }) && gone.to_string().contains("artifacts/x")
        );
    }
}

#[tokio::test]
async fn du_9_a_changed_file_is_an_error_that_names_it() {
    let (_folder, store) = folder();
    let reference = store.artifacts().put("a/b", Bytes::from_static(b"0123456789")).await.unwrap();
    let path = store.local_root().unwrap().join("a/b");
    for bad in [&b"0123456780"[..], b"012345678", b""] {
        std::fs::write(&path, bad).unwrap();
        let error = store.artifacts().get(&reference).await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
        assert!(error.to_string().contains("a/b"), "{error}");
    }
}

#[tokio::test]
async fn of_racing_writers_exactly_one_creates() {
    let (_folder, local) = folder();
    for store in [Store::memory(), local] {
        for round in 0..20 {
            let writers = (0..8).map(|n| {
                let store = store.clone();
                tokio::spawn(async move {
                    store.create(&format!("race/{round}"), Bytes::from(vec![n; 1000])).await.is_ok()
                })
            });
            let won = futures::future::join_all(writers).await;
            assert_eq!(won.iter().filter(|won| *won.as_ref().unwrap()).count(), 1);
            let bytes = store.get(&format!("race/{round}")).await.unwrap();
            assert!(bytes.iter().all(|byte| *byte == bytes[0]) && bytes.len() == 1000);
        }
    }
}

#[tokio::test]
async fn keys_stay_inside_the_store_and_listings_are_sorted() {
    let (folder, store) = folder();
    for key in ["../out", "/abs", "a//b", "a/../../b", "", "a/./b"] {
        let error = store.create(key, Bytes::new()).await.unwrap_err();
        assert!(matches!(error, StoreError::Key { .. }), "{key}: {error}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    for key in ["l/b", "l/a/z", "l/c", "lx"] {
        store.create(key, Bytes::from_static(b"1")).await.unwrap();
    }
    let keys: Vec<String> = store.list("l").await.unwrap().into_iter().map(|e| e.key).collect();
    assert_eq!(keys, ["l/a/z", "l/b", "l/c"]);
    assert_eq!(store.list("nothing/here").await.unwrap(), []);
}

#[tokio::test]
async fn a_full_disk_is_named_and_leaves_nothing_half_written() {
    let odd = Arc::new(Odd::new(Vice::Full));
    odd.room.store(1, Ordering::Relaxed);
    let store =
        Store::with_backend(odd.clone(), "odd://u:secret@host/x?key=secret").with_limits(quick());
    store.create("a", Bytes::from_static(b"1")).await.unwrap();
    let error = store.create("b", Bytes::from_static(b"2")).await.unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("`b`") && text.contains("no space left") && !text.contains("secret"),
        "{text}"
    );
    assert_eq!(store.list("b").await.unwrap(), []);
    assert_eq!(store.size("b").await.unwrap(), None);
}

#[test]
fn a_place_that_cannot_be_a_store_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    for (url, expected) in [
        (file.join("x").display().to_string(), "cannot make the folder"),
        ("ftp://host/x".to_owned(), "of no known kind"),
        ("".to_owned(), "is empty"),
    ] {
        let error = Store::open(&url).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[cfg(not(feature = "s3"))]
#[test]
fn a_kind_that_was_not_built_in_is_named_without_its_credentials() {
    let error = Store::open("s3://user:secret@bucket/run").unwrap_err().to_string();
    assert!(error.contains("--features duet-store/s3") && !error.contains("secret"), "{error}");
}

#[test]
fn plain_threads_can_wait() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let store = BlockingStore::new(Store::memory(), runtime.handle().clone());
    let reference = store.put("x", vec![1, 2, 3]).unwrap();
    assert_eq!(store.get(&reference).unwrap(), vec![1, 2, 3]);
}

#[tokio::test]
async fn the_probe_passes_sound_stores_and_leaves_nothing_behind() {
    let (_folder, local) = folder();
    for store in [Store::memory(), local] {
        let diagnosis = probe(&store).await.unwrap();
        assert!(diagnosis.is_fit(), "{diagnosis}");
        assert_eq!(store.list("doctor").await.unwrap(), []);
    }
}

#[tokio::test]
async fn the_probe_names_what_a_store_cannot_be_trusted_with() {
    let missing = async |vice| {
        let diagnosis = probe(&Odd::store(vice)).await.unwrap();
        assert!(!diagnosis.is_fit() && diagnosis.to_string().contains("not fit for a run"));
        diagnosis.missing().collect::<Vec<_>>()
    };
    let ignorant = missing(Vice::IgnoresConditions).await;
    assert_eq!(ignorant, [Capability::CreateOnce, Capability::AtomicCreate]);
    assert_eq!(missing(Vice::ChecksLate).await, [Capability::AtomicCreate]);
}

proptest! {
    #[test]
    fn du_9_a_byte_changed_anywhere_is_detected(
        bytes in proptest::collection::vec(any::<u8>(), 1..2000), at in any::<prop::sample::Index>(), flip in 1u8..,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = Store::memory();
            let mut bad = bytes.clone();
            bad[at.index(bytes.len())] ^= flip;
            store.create("x", bad.into()).await.unwrap();
            let reference = duet_store::Artifacts::reference("x", &bytes);
            assert!(matches!(store.artifacts().get(&reference).await, Err(StoreError::Corrupt { .. })));
        });
    }
}

#[tokio::test]
async fn a_store_that_does_not_answer_at_the_start_is_told_soon_and_with_the_remedy() {
    let odd = Arc::new(Odd::new(Vice::Down));
    let store = Store::with_backend(odd.clone(), "s3://bucket/run").with_limits(quick());
    // What is not behind a network needs no asking.
    store.reach().await.unwrap();
    assert_eq!(odd.requests.load(Ordering::Relaxed), 0);
    let store = store.behind_network("are the credentials set?");
    let error = probe(&store).await.unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
    let said = error.to_string();
    assert!(
        said.contains("s3://bucket/run") && said.contains("are the credentials set?"),
        "{said}"
    );
    assert_eq!(odd.requests.load(Ordering::Relaxed), 2, "it was asked more often than a start may");
    // Whoever runs already has the patience it had.
    store.get("x").await.unwrap_err();
    assert_eq!(odd.requests.load(Ordering::Relaxed), 2 + u64::from(quick().tries));
    Odd::store(Vice::Flaky).behind_network("").reach().await.unwrap();
}
