//! The journal: durable prefixes, fencing, snapshots, damage.

use crate::common::{Odd, Vice, quick};
use duet_core::Generation;
use duet_store::{Journal, JournalError, Opened, Store, journal, keys};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const PREFIX: &str = keys::JOURNAL;

fn records(from: u32, count: u32) -> Vec<Vec<u8>> {
    (from..from + count).map(|n| n.to_le_bytes().to_vec()).collect()
}

fn local() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().display().to_string()).unwrap();
    (folder, store)
}

fn segment(store: &Store, number: u64) -> std::path::PathBuf {
    store.local_root().unwrap().join(format!("journal/segments/{number:012}"))
}

#[tokio::test]
async fn what_was_appended_is_read_back_in_order_and_generations_grow() {
    let (_folder, folder) = local();
    for store in [Store::memory(), folder, Odd::store(Vice::Flaky)] {
        let mut all = Vec::new();
        for generation in 1..=4 {
            let Opened { mut journal, generation: mine, snapshot, records: held, torn } =
                Journal::open(&store, PREFIX).await.unwrap();
            assert_eq!((mine, snapshot, torn), (Generation(generation), None, None));
            assert_eq!(held, all);
            for batch in 1..4 {
                let batch = records(all.len() as u32, batch);
                journal.append(&batch).await.unwrap();
                all.extend(batch);
            }
            journal.append(&[]).await.unwrap();
        }
        assert_eq!(journal::read(&store, PREFIX).await.unwrap(), (None, all));
    }
}

#[tokio::test]
async fn the_one_before_is_fenced_at_its_next_append() {
    let (_folder, folder) = local();
    for store in [Store::memory(), folder] {
        fences_the_one_before(store).await;
    }
}

async fn fences_the_one_before(store: Store) {
    let mut first = Journal::open(&store, PREFIX).await.unwrap().journal;
    first.append(&records(0, 2)).await.unwrap();
    let mut second = Journal::open(&store, PREFIX).await.unwrap();
    assert_eq!(second.records, records(0, 2));
    let error = first.append(&records(2, 1)).await.unwrap_err();
    assert!(matches!(error, JournalError::Fenced { mine: Generation(1), .. }), "{error}");
    assert!(matches!(first.append(&records(2, 1)).await, Err(JournalError::Broken { .. })));
    second.journal.append(&records(2, 1)).await.unwrap();
    assert_eq!(Journal::open(&store, PREFIX).await.unwrap().records, records(0, 3));
}

#[tokio::test]
async fn a_writer_that_slept_while_segments_were_collected_is_fenced_all_the_same() {
    let (_folder, folder) = local();
    for store in [Store::memory(), folder] {
        fences_a_sleeper(store).await;
    }
}

async fn fences_a_sleeper(store: Store) {
    let mut sleeper = Journal::open(&store, PREFIX).await.unwrap().journal;
    sleeper.append(&records(0, 1)).await.unwrap();
    let mut next = Journal::open(&store, PREFIX).await.unwrap().journal;
    for n in 1..6 {
        next.append(&records(n, 1)).await.unwrap();
        next.snapshot(format!("state {n}").as_bytes()).await.unwrap();
    }
    assert!(next.collect().await.unwrap() > 0);
    assert_eq!(store.size(&format!("journal/segments/{:012}", 3)).await.unwrap(), None);
    let error = sleeper.append(&records(99, 1)).await.unwrap_err();
    assert!(matches!(error, JournalError::Fenced { .. }), "{error}");
    next.append(&records(6, 1)).await.unwrap();
    let opened = Journal::open(&store, PREFIX).await.unwrap();
    assert_eq!(opened.snapshot.as_deref(), Some(&b"state 5"[..]));
    assert_eq!(opened.records, records(6, 1));
}

#[tokio::test]
async fn of_many_that_open_at_once_one_at_most_goes_on() {
    let (_folder, folder) = local();
    for store in [Store::memory(), folder] {
        Journal::open(&store, PREFIX).await.unwrap().journal.append(&records(0, 3)).await.unwrap();
        let openers = (0..6).map(|_| {
            let store = store.clone();
            tokio::spawn(async move { Journal::open(&store, PREFIX).await })
        });
        let mut opened = Vec::new();
        for outcome in futures::future::join_all(openers).await {
            match outcome.unwrap() {
                Ok(one) => opened.push(one),
                Err(error) => assert!(matches!(error, JournalError::Fenced { .. }), "{error}"),
            }
        }
        let mut generations: Vec<Generation> = opened.iter().map(|one| one.generation).collect();
        generations.sort();
        generations.dedup();
        assert_eq!(generations.len(), opened.len(), "no generation is given twice");
        let mut written = 0;
        for one in &mut opened {
            assert_eq!(one.records, records(0, 3));
            written += u32::from(one.journal.append(&records(3, 1)).await.is_ok());
        }
        assert!(written <= 1);
        let held = Journal::open(&store, PREFIX).await.unwrap().records;
        assert!(held.len() <= 4 + opened.len() && held[..3] == records(0, 3)[..]);
    }
}

#[tokio::test]
async fn snapshots_bound_what_is_read_and_an_unreadable_one_gives_way_to_the_one_before() {
    let (_folder, store) = local();
    let mut journal = Journal::open(&store, PREFIX).await.unwrap().journal;
    for n in 0..6 {
        journal.append(&records(n, 1)).await.unwrap();
        if n % 2 == 1 {
            journal.snapshot(format!("after {n}").as_bytes()).await.unwrap();
        }
    }
    assert!(journal.collect().await.unwrap() >= 4);
    let newest = store.list("journal/snapshots").await.unwrap().pop().unwrap().key;
    let opened = Journal::open(&store, PREFIX).await.unwrap();
    assert_eq!((opened.snapshot.as_deref(), opened.records.len()), (Some(&b"after 5"[..]), 0));
    std::fs::write(store.local_root().unwrap().join(newest), b"rubbish").unwrap();
    let opened = Journal::open(&store, PREFIX).await.unwrap();
    assert_eq!(
        (opened.snapshot.as_deref(), opened.records),
        (Some(&b"after 3"[..]), records(4, 2))
    );
}

#[tokio::test]
async fn a_torn_newest_segment_is_void_on_a_local_disk() {
    let (_folder, store) = local();
    let mut journal = Journal::open(&store, PREFIX).await.unwrap().journal;
    journal.append(&records(0, 2)).await.unwrap();
    journal.append(&records(2, 2)).await.unwrap();
    let whole = journal::segment_bytes(1, journal.position(), &records(2, 2)).to_vec();
    let mut zeroed = whole.clone();
    zeroed[whole.len() - 12..].fill(0);
    for torn in [&whole[..whole.len() - 1], &whole[..70], &whole[..10], &[], &[0; 80], &zeroed] {
        let copy = tempfile::tempdir().unwrap();
        for entry in store.list("journal").await.unwrap() {
            let to = copy.path().join(&entry.key);
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::copy(store.local_root().unwrap().join(&entry.key), to).unwrap();
        }
        let store = Store::open(&copy.path().display().to_string()).unwrap();
        // The first two lie in one file; the second may also be the first of its own.
        let first = segment(&store, journal.position() - 1);
        let mut both = std::fs::read(&first).unwrap();
        // What follows them, zeros included, goes: the disk was asked for it and did not keep it.
        both.truncate(journal::segment_bytes(1, journal.position() - 1, &records(0, 2)).len());
        match torn {
            [] => std::fs::write(segment(&store, journal.position()), torn).unwrap(),
            _ => both.extend_from_slice(torn),
        }
        std::fs::write(first, both).unwrap();
        let mut opened = Journal::open(&store, PREFIX).await.unwrap();
        assert_eq!(opened.records, records(0, 2));
        // Zeros after a segment are nothing but room.
        let is_room = torn == [0; 80];
        let named = opened.torn.as_deref().is_some_and(|key| key.starts_with("journal/segments/"));
        assert_eq!((opened.torn.is_some(), named), (!is_room, !is_room));
        opened.journal.append(&records(7, 1)).await.unwrap();
        let again = Journal::open(&store, PREFIX).await.unwrap();
        assert_eq!((again.records, again.torn), ([records(0, 2), records(7, 1)].concat(), None));
    }
}

#[tokio::test]
async fn what_was_declared_void_stays_void_when_its_writer_ends_it_later() {
    let (_folder, store) = local();
    let mut first = Journal::open(&store, PREFIX).await.unwrap().journal;
    first.append(&records(0, 2)).await.unwrap();
    let late = first.position() + 1;
    let whole = journal::segment_bytes(first.generation().0, late, &records(50, 2));
    // Its writer is in the middle of it when another coordinator takes over.
    std::fs::write(segment(&store, late), &whole[..whole.len() / 2]).unwrap();
    let mut second = Journal::open(&store, PREFIX).await.unwrap();
    assert_eq!((second.records, second.torn.is_some()), (records(0, 2), true));
    std::fs::write(segment(&store, late), &whole).unwrap();
    second.journal.append(&records(2, 1)).await.unwrap();
    assert_eq!(journal::read(&store, PREFIX).await.unwrap().1, records(0, 3));
    let retained = journal::retained(&store, PREFIX).await.unwrap();
    assert_eq!(
        retained.batches.iter().flat_map(|b| b.records.clone()).collect::<Vec<_>>(),
        records(0, 3)
    );
    assert_eq!(Journal::open(&store, PREFIX).await.unwrap().records, records(0, 3));
}

#[tokio::test]
async fn what_a_replaced_writer_adds_to_its_file_ends_where_the_next_one_begins() {
    let (_folder, store) = local();
    let mut first = Journal::open(&store, PREFIX).await.unwrap().journal;
    first.append(&records(0, 2)).await.unwrap();
    let at = first.position();
    let mut second = Journal::open(&store, PREFIX).await.unwrap().journal;
    assert_eq!(second.position(), at + 1);
    // Same number as the successor's opening segment, in the file of the one before.
    let error = first.append(&records(70, 1)).await.unwrap_err();
    assert!(matches!(error, JournalError::Fenced { .. }), "{error}");
    let held = std::fs::read(segment(&store, at)).unwrap();
    // In memory-backed stores and elsewhere it could not even be written.
    let numbers = journal::segments_in(&held, at).into_iter().map(|(number, _)| number);
    let numbers: Vec<u64> = numbers.collect();
    assert!(numbers == [at, at + 1] || numbers == [at], "{numbers:?}");
    second.append(&records(2, 2)).await.unwrap();
    assert_eq!(journal::read(&store, PREFIX).await.unwrap().1, records(0, 4));
    let retained = journal::retained(&store, PREFIX).await.unwrap();
    let numbers: Vec<u64> = retained.batches.iter().map(|batch| batch.number).collect();
    assert_eq!(numbers, (1..=second.position()).collect::<Vec<_>>());
    assert_eq!(Journal::open(&store, PREFIX).await.unwrap().records, records(0, 4));
}

#[tokio::test]
async fn damage_elsewhere_is_an_error_that_names_the_segment() {
    let damage = async |number: u64, bytes: Option<&[u8]>| {
        let (_folder, store) = local();
        drop(Journal::open(&store, PREFIX).await.unwrap());
        // One segment an object, as object stores have them.
        for n in 2..=5 {
            let whole = journal::segment_bytes(1, n, &records(n as u32, 1));
            std::fs::write(segment(&store, n), whole).unwrap();
        }
        match bytes {
            Some(bytes) => std::fs::write(segment(&store, number), bytes).unwrap(),
            None => std::fs::remove_file(segment(&store, number)).unwrap(),
        }
        Journal::open(&store, PREFIX).await.unwrap_err()
    };
    let torn = damage(3, Some(b"duetseg1")).await;
    assert!(
        matches!(&torn, JournalError::Corrupt { key, .. } if key.ends_with("000000000003")),
        "{torn}"
    );
    let foreign = damage(5, Some(b"something else")).await;
    assert!(
        matches!(&foreign, JournalError::Corrupt { key, .. } if key.ends_with("000000000005")),
        "{foreign}"
    );
    let gap = damage(2, None).await;
    assert!(matches!(&gap, JournalError::Gap { key } if key.ends_with("000000000002")), "{gap}");

    // Several in one file.
    for byte in [0, 20, 70] {
        let (_folder, store) = local();
        drop(Journal::open(&store, PREFIX).await.unwrap());
        let row = |from: u64, to: u64| {
            (from..=to).flat_map(|n| journal::segment_bytes(1, n, &records(n as u32, 1))).collect()
        };
        let mut bytes: Vec<u8> = row(2, 5);
        let third = row(2, 3).len();
        bytes[third + byte] ^= 1;
        std::fs::write(segment(&store, 2), bytes).unwrap();
        let error = Journal::open(&store, PREFIX).await.unwrap_err();
        assert!(
            matches!(&error, JournalError::Corrupt { key, .. } if key.ends_with("000000000002")),
            "{error}"
        );
        assert!(error.to_string().contains("segment 4"), "{error}");
    }
}

#[tokio::test]
async fn batches_that_are_too_large_are_refused_and_others_are_cut() {
    let mut journal = Journal::open(&Store::memory(), PREFIX).await.unwrap().journal;
    let error = journal.append(&[vec![0; journal::MAX_RECORD + 1]]).await.unwrap_err();
    assert!(matches!(error, JournalError::TooLarge { records: 1, .. }), "{error}");
    journal.append(&records(0, 1)).await.unwrap();
    let many = vec![Vec::new(); journal::MAX_RECORDS + 5];
    let sizes: Vec<usize> = journal::batches(&many).map(<[_]>::len).collect();
    assert_eq!(sizes, [journal::MAX_RECORDS, 5]);
    assert_eq!(journal::batches(&[]).count(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Coordinators come and go; the store gives up at any moment, before or after it did what it was
    /// asked. Whatever was acknowledged is there, in order, without a gap; what was not may be.
    #[test]
    fn any_crashes_leave_a_prefix_of_what_was_written(
        lives in proptest::collection::vec((0i64..12, proptest::collection::vec(1u32..4, 0..6), any::<bool>()), 1..6),
        vice in prop_oneof![Just(Vice::Full), Just(Vice::FullAfterAll)],
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let odd = Arc::new(Odd::new(vice));
            let store = Store::with_backend(odd.clone(), "odd://").with_limits(quick());
            // The history as the coordinators see it: snapshots carry the length so far.
            let mut acknowledged = 0u32;
            let mut attempted = 0u32;
            for (room, batches, snapshot) in lives {
                odd.room.store(room, Ordering::Relaxed);
                let Ok(opened) = Journal::open(&store, PREFIX).await else { continue };
                let base = opened.snapshot.map_or(0, |s| u32::from_le_bytes((&s[..]).try_into().unwrap()));
                let held = base + opened.records.len() as u32;
                assert!(held >= acknowledged && held <= attempted.max(acknowledged), "{held} of {acknowledged}..{attempted}");
                assert_eq!(opened.records, records(base, held - base), "a gap or another order");
                let mut journal = opened.journal;
                (acknowledged, attempted) = (held, held);
                for count in batches {
                    attempted = acknowledged + count;
                    if journal.append(&records(acknowledged, count)).await.is_err() {
                        break;
                    }
                    acknowledged = attempted;
                    if snapshot {
                        let _ = journal.snapshot(&acknowledged.to_le_bytes()).await;
                        let _ = journal.collect().await;
                    }
                }
            }
            odd.room.store(i64::MAX, Ordering::Relaxed);
            let opened = Journal::open(&store, PREFIX).await.unwrap();
            let base = opened.snapshot.map_or(0, |s| u32::from_le_bytes((&s[..]).try_into().unwrap()));
            assert!(base + opened.records.len() as u32 >= acknowledged);
        });
    }
}

#[tokio::test]
async fn audits_read_all_that_is_retained_past_snapshots_and_torn_ends() {
    let (_folder, store) = local();
    let mut first = Journal::open(&store, PREFIX).await.unwrap().journal;
    first.append(&records(0, 2)).await.unwrap();
    first.snapshot(b"state").await.unwrap();
    first.append(&records(2, 1)).await.unwrap();
    let mut second = Journal::open(&store, PREFIX).await.unwrap().journal;
    second.append(&records(3, 1)).await.unwrap();
    let last = second.position();
    let torn = std::fs::read(segment(&store, last)).unwrap();
    std::fs::write(segment(&store, last + 1), &torn[..10]).unwrap();

    let kept = journal::retained(&store, PREFIX).await.unwrap();
    assert_eq!(kept.base, None);
    let written = kept.batches.iter().filter(|batch| !batch.records.is_empty());
    let generations: Vec<u64> = written.map(|batch| batch.generation.0).collect();
    assert_eq!(generations, [1, 1, 2]);
    let all: Vec<Vec<u8>> = kept.batches.into_iter().flat_map(|batch| batch.records).collect();
    assert_eq!(all, records(0, 4));

    // Without the beginning, from the oldest snapshot on.
    std::fs::remove_file(segment(&store, 1)).unwrap();
    let kept = journal::retained(&store, PREFIX).await.unwrap();
    assert_eq!(kept.base.as_deref(), Some(&b"state"[..]));
    let all: Vec<Vec<u8>> = kept.batches.into_iter().flat_map(|batch| batch.records).collect();
    assert_eq!(all, records(2, 2));

    std::fs::remove_file(segment(&store, last - 1)).unwrap();
    let error = journal::retained(&store, PREFIX).await.unwrap_err();
    assert!(matches!(error, JournalError::Gap { .. }), "{error}");
}
