//! Checkpoints: completeness, the newest by listing, damage, retention.

use crate::common::{Odd, Vice};
use bytes::Bytes;
use duet_core::work::Weights;
use duet_core::{ArtifactRef, Digest, Generation, PolicyVersion};
use duet_store::checkpoint::{FORMAT, Retention};
use duet_store::{Manifest, Store, StoreError, keys};
use proptest::prelude::*;
use std::collections::BTreeSet;

const KEEP_ALL: Retention = Retention { last: u32::MAX, every: 0, grace_ms: 0 };
const LATER: u64 = 1 << 45;

async fn object(store: &Store, key: &str) -> ArtifactRef {
    store.artifacts().put(key, Bytes::from(format!("contents of {key}"))).await.unwrap()
}

/// A checkpoint whose shards lie under its version and whose weights may be shared with others.
async fn manifest(store: &Store, version: u64, weights: u64) -> Manifest {
    let folder = keys::checkpoint(PolicyVersion(version));
    let mut shards = Vec::new();
    for rank in 0..2 {
        shards.push(vec![object(store, &format!("{folder}/rank-{rank}")).await]);
    }
    Manifest {
        format: FORMAT.to_owned(),
        version: PolicyVersion(version),
        world: 2,
        shards,
        weights: Weights {
            version: PolicyVersion(version),
            llm: Some(object(store, &format!("weights/v{weights:08}/llm")).await),
            dit: Some(object(store, &format!("checkpoints/step-{weights:08}/shared")).await),
            digest: Digest::of(&weights.to_le_bytes()),
        },
        scheduler: Some(object(store, &format!("{folder}/scheduler")).await),
        journal_position: version,
        generation: Generation(1),
        run: "test".to_owned(),
        config: Digest::of(b"config"),
        created_unix_ms: 1,
        notes: [("why".to_owned(), "a test".to_owned())].into(),
    }
}

#[tokio::test]
async fn the_newest_complete_one_is_found_and_every_byte_verified() {
    for store in [Store::memory(), Odd::store(Vice::Flaky)] {
        let checkpoints = store.checkpoints();
        assert_eq!(checkpoints.newest().await.unwrap(), None);
        for version in [1, 2, 10] {
            let manifest = manifest(&store, version, version).await;
            let reference = checkpoints.write(&manifest).await.unwrap();
            assert_eq!(checkpoints.read(&reference).await.unwrap(), manifest);
            assert_eq!(checkpoints.newest().await.unwrap(), Some(manifest.clone()));
            assert_eq!(checkpoints.verify(&manifest).await.unwrap(), manifest.bytes());
        }
        // Shards alone are no checkpoint.
        object(&store, "checkpoints/step-00000011/rank-0").await;
        assert_eq!(checkpoints.newest().await.unwrap().unwrap().version, PolicyVersion(10));
        // One that lost a shard is passed over.
        store.delete("checkpoints/step-00000010/rank-1").await.unwrap();
        assert_eq!(checkpoints.newest().await.unwrap().unwrap().version, PolicyVersion(2));
        assert_eq!(checkpoints.list().await.unwrap(), [1, 2, 10].map(PolicyVersion));
    }
}

#[tokio::test]
async fn a_manifest_names_only_what_is_there_and_is_written_once() {
    let store = Store::memory();
    let checkpoints = store.checkpoints();
    let mut first = manifest(&store, 3, 3).await;
    let reference = checkpoints.write(&first).await.unwrap();
    // Written again by the next coordinator: another moment, the same state.
    first.created_unix_ms = 2;
    first.generation = Generation(2);
    assert_eq!(checkpoints.write(&first).await.unwrap(), reference);
    first.weights.digest = Digest::of(b"other weights");
    assert!(matches!(checkpoints.write(&first).await, Err(StoreError::Conflict { .. })));
    let mut absent = manifest(&store, 4, 4).await;
    absent.shards[1][0].key.push('x');
    assert!(matches!(checkpoints.write(&absent).await, Err(StoreError::Missing { .. })));
    assert_eq!(checkpoints.list().await.unwrap(), [PolicyVersion(3)]);
}

#[tokio::test]
async fn a_byte_changed_anywhere_is_detected() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().display().to_string()).unwrap();
    let checkpoints = store.checkpoints();
    let written = manifest(&store, 5, 5).await;
    let reference = checkpoints.write(&written).await.unwrap();
    let mut all: Vec<ArtifactRef> = written.objects();
    all.push(reference.clone());
    for object in all {
        let path = folder.path().join(&object.key);
        let good = std::fs::read(&path).unwrap();
        for at in (0..good.len()).step_by(7) {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            let read = checkpoints.read(&reference).await;
            let verified = match read {
                Ok(manifest) => checkpoints.verify(&manifest).await.map(drop),
                Err(error) => Err(error),
            };
            assert!(
                matches!(&verified, Err(StoreError::Corrupt { key, .. }) if *key == object.key),
                "{verified:?}"
            );
            // Without knowing its hash, what the manifest says is still the same or refused.
            if let Ok(found) = checkpoints.at(PolicyVersion(5)).await {
                assert_eq!(found.manifest, written);
            }
        }
        std::fs::write(&path, good).unwrap();
    }
    checkpoints.verify(&written).await.unwrap();
}

#[tokio::test]
async fn leftovers_of_checkpoints_that_were_never_completed_are_collected_with_time() {
    let store = Store::memory();
    let checkpoints = store.checkpoints();
    checkpoints.write(&manifest(&store, 8, 8).await).await.unwrap();
    object(&store, "checkpoints/step-00000004/rank-0").await;
    object(&store, "checkpoints/step-00000009/rank-0").await;
    let none = BTreeSet::new();
    let early =
        checkpoints.prune(Retention { grace_ms: LATER, ..KEEP_ALL }, &none, LATER).await.unwrap();
    assert_eq!(early.objects, 0);
    assert_eq!(checkpoints.prune(KEEP_ALL, &none, LATER).await.unwrap().objects, 1);
    assert_eq!(store.size("checkpoints/step-00000004/rank-0").await.unwrap(), None);
    assert!(store.size("checkpoints/step-00000009/rank-0").await.unwrap().is_some());
    checkpoints.verify(&checkpoints.newest().await.unwrap().unwrap()).await.unwrap();
}

#[tokio::test]
async fn older_checkpoints_stay_while_the_newest_is_not_whole() {
    let store = Store::memory();
    let checkpoints = store.checkpoints();
    for version in [4, 8] {
        checkpoints.write(&manifest(&store, version, version).await).await.unwrap();
    }
    store.delete("weights/v00000008/llm").await.unwrap();
    let (one, none) = (Retention { last: 1, every: 0, grace_ms: 0 }, BTreeSet::new());
    let error = checkpoints.prune(one, &none, LATER).await.unwrap_err();
    assert!(matches!(&error, StoreError::Missing { key, .. } if key == "weights/v00000008/llm"));
    let kept = checkpoints.newest().await.unwrap().unwrap();
    assert_eq!(kept.version, PolicyVersion(4));
    checkpoints.verify(&kept).await.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn retention_never_deletes_what_a_kept_manifest_names(
        checkpoints in proptest::collection::btree_map(1u64..40, 1u64..40, 1..8),
        last in 0u32..5, every in 0u64..6, protect in 1u64..40,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = Store::memory();
            let all = store.checkpoints();
            for (version, weights) in &checkpoints {
                all.write(&manifest(&store, *version, *weights).await).await.unwrap();
            }
            let protected = object(&store, &format!("checkpoints/step-{protect:08}/live")).await;
            let protect = BTreeSet::from([protected.key.clone()]);
            let retention = Retention { last, every, grace_ms: 0 };
            let newest = *checkpoints.last_key_value().unwrap().0;
            let pruned = all.prune(retention, &protect, LATER).await.unwrap();
            let kept = all.list().await.unwrap();
            assert_eq!(kept.len() + pruned.versions.len(), checkpoints.len());
            assert!(kept.len() >= (last.max(1) as usize).min(checkpoints.len()));
            assert_eq!(kept.last(), Some(&PolicyVersion(newest)));
            for version in kept {
                all.verify(&all.at(version).await.unwrap().manifest).await.unwrap();
            }
            store.artifacts().get(&protected).await.unwrap();
            for version in pruned.versions {
                assert!(every == 0 || version.0 % every != 0);
                let left = store.list(&keys::checkpoint(version)).await.unwrap();
                let may = |e: &duet_store::Entry| e.bytes == 0 || e.key.ends_with("shared") || e.key.ends_with("live");
                assert!(left.iter().all(may), "{left:?}");
            }
            assert_eq!(all.prune(retention, &protect, LATER).await.unwrap().objects, 0, "settled");
            let marks = store.list(keys::CHECKPOINTS).await.unwrap();
            assert!(marks.iter().all(|e| e.bytes > 0), "marks go, too: {marks:?}");
        });
    }
}
