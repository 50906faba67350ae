//! Coordinators that die, and coordinators that meet.

use crate::common::process::{configure, start};
use crate::common::workers::Crew;
use crate::common::{Running, options, until, within};
use duet_config::Config;
use duet_coordinator::{CoordinatorError, Service};
use duet_proto::v1::RunState;
use duet_store::{JournalError, Store};
use std::collections::BTreeMap;

#[tokio::test]
async fn a_killed_coordinator_comes_back_and_no_tree_is_grown_twice() {
    let folder = tempfile::tempdir().unwrap();
    let path = configure(folder.path(), 6);
    let config = Config::load(&path, &BTreeMap::new(), &[]).unwrap();
    let store = Store::open(&config.store_url()).unwrap();
    let (mut first, url) = start(&path, &[]).await;
    let crew = Crew::hire(&url, &store, config.digest());
    until(&url, "the third step", |s| s.version >= 3).await;
    first.kill().await.unwrap();

    let port = url.trim_start_matches("http://");
    let (mut second, same) = start(&path, &["--resume", "--listen", port]).await;
    assert_eq!(same, url);
    let last = until(&url, "completion", |s| s.state() == RunState::Completed).await;
    assert_eq!((last.version, last.generation), (6, 2));
    let ledger = crew.home().await;
    assert!(within("the end", second.wait()).await.unwrap().success());

    // What was out at the kill may be asked for again when its report found nobody; nothing else.
    let counts = ledger.counts();
    assert_eq!(counts.len(), 12 + 24 + 24 + 6);
    let again: Vec<_> = counts.iter().filter(|(_, count)| **count > 1).collect();
    assert!(again.len() <= 3, "at most what three workers held: {again:?}");
    assert_eq!(store.lineage().iterations().await.unwrap(), [0, 1, 2, 3, 4, 5]);
    let metrics = std::fs::read_to_string(folder.path().join("store/metrics.jsonl")).unwrap();
    let iterations: Vec<u64> = metrics
        .lines()
        .map(|line| {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            row["iteration"].as_u64().unwrap()
        })
        .collect();
    assert_eq!(iterations, [0, 1, 2, 3, 4, 5], "each iteration once");
}

#[tokio::test]
async fn a_second_coordinator_ends_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let first = options(folder.path(), 50);
    let (store, config) = (first.store.clone(), first.config);
    let first = Running::start(first).await;
    let crew = Crew::hire(&first.url, &store, config);
    until(&first.url, "the first step", |s| s.version >= 1).await;
    let mut second = options(folder.path(), 50);
    second.resume = true;
    let second = Service::build(second).await.unwrap();
    let ended = first.ended().await;
    let Err(CoordinatorError::Journal(error)) = ended else {
        panic!("the first coordinator went on: {ended:?}");
    };
    assert!(matches!(*error, JournalError::Fenced { mine, .. } if mine.0 == 1), "{error}");
    crew.shutdown.cancel();
    drop(second);
}
