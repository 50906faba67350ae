//! `duet audit` of a real run, and of the same run after somebody has been at it.

use duet_core::scheduler::Record;
use duet_store::lineage::{PromptRow, Row, Rows};
use duet_store::{Journal, Store, journal, keys};
use duet_tests::{Run, chaos, text};
use serde_json::Value;
use std::path::Path;
use std::process::Output;

/// A store to doctor, opened.
struct Copy {
    _folder: tempfile::TempDir,
    place: String,
    store: Store,
}

impl Copy {
    fn of(original: &Path) -> Copy {
        let folder = tempfile::tempdir().expect("a folder");
        copy(original, folder.path());
        let place = folder.path().display().to_string();
        let store = Store::open(&place).expect("a store");
        Copy { _folder: folder, place, store }
    }

    async fn rows(&self, iteration: u32) -> Rows {
        self.store.lineage().read(iteration).await.expect("rows")
    }

    /// Puts other rows where an iteration's are.
    async fn replace(&self, iteration: u32, rows: &Rows) {
        for table in ["prompts", "traces", "leaves", "rewards", "advantages", "updates"] {
            self.store.delete(&keys::table(table, iteration)).await.expect("deleted");
        }
        self.store.lineage().write_rows(iteration, rows).await.expect("written");
    }

    /// The journal's records that a test asks for.
    async fn find(&self, wanted: impl Fn(&Record) -> bool) -> Vec<u8> {
        let kept = journal::retained(&self.store, keys::JOURNAL).await.expect("a journal");
        let mut records = kept.batches.into_iter().flat_map(|batch| batch.records);
        let found = records.find(|bytes| wanted(&serde_json::from_slice(bytes).expect("a record")));
        found.expect("such a record")
    }

    async fn append(&self, record: Vec<u8>) {
        let mut opened = Journal::open(&self.store, keys::JOURNAL).await.expect("a journal");
        opened.journal.append(&[record]).await.expect("appended");
    }

    /// What the audit finds.
    fn violations(&self) -> Vec<String> {
        let out = audit(&self.place);
        let account: Value = serde_json::from_slice(&out.stdout).expect("JSON");
        let found = account["violations"].as_array().expect("a list");
        assert_eq!(out.status.code(), Some(i32::from(!found.is_empty())), "{}", text(&out));
        found.iter().map(|v| v.as_str().expect("a text").to_owned()).collect()
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder").flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("a copy");
        }
    }
}

fn audit(place: &str) -> Output {
    let mut command = std::process::Command::new(duet_tests::bin("duet"));
    command.args(["audit", "--json", place]).output().expect("duet starts")
}

fn without_tree(rows: &mut Rows, tree: u32) {
    rows.prompts.retain(|row| row.tree != tree);
    rows.traces.retain(|row| row.tree != tree);
    rows.leaves.retain(|row| row.tree != tree);
    rows.rewards.retain(|row| row.tree != tree);
    rows.advantages.retain(|row| row.tree != tree);
}

/// Tree 0 once more, as another tree.
fn twin_of_tree_0(rows: &mut Rows) {
    let index = rows.prompts.len() as u32;
    macro_rules! twin {
        ($($table:ident),*) => {$(
            let mut twins: Vec<_> = rows.$table.iter().filter(|row| row.tree == 0).cloned().collect();
            twins.iter_mut().for_each(|row| row.tree = index);
            rows.$table.extend(twins);
        )*};
    }
    twin!(prompts, traces, leaves, rewards, advantages);
}

type Doctoring = (&'static str, fn(&mut Rows), &'static str);

const DOCTORED: &[Doctoring] = &[
    ("a tree twice", |rows| rows.prompts.push(rows.prompts[1].clone()), "not have each tree once"),
    ("a tree under two names", twin_of_tree_0, "has i1/t2, which the journal has not"),
    ("a missing tree", |rows| without_tree(rows, 1), "lacks i1/t1, which the journal has"),
    ("a trace twice", |rows| rows.traces.push(rows.traces[0].clone()), "trace 0 of tree 0 2 times"),
    (
        "an image twice",
        |rows| rows.leaves.push(rows.leaves[0].clone()),
        "image 0/0 of tree 0 2 times",
    ),
    ("a missing image", |rows| drop(rows.leaves.remove(0)), "lacks image 0/0 of tree 0"),
    (
        "a score twice",
        |rows| rows.rewards.push(rows.rewards[0].clone()),
        "of image 0/0 of tree 0 2 times",
    ),
    (
        "a made-up score",
        |rows| rows.rewards[0].status = "failed".to_owned(),
        "that is failed: Some",
    ),
    ("another worker", |rows| rows.traces[0].worker = "nobody".to_owned(), "by nobody, attempt 1"),
    ("another version", |rows| rows.traces[0].policy_version = 7, "mixes samples"),
    (
        "another fate",
        |rows| rows.prompts[0].fate = "failed".to_owned(),
        "the journal says otherwise",
    ),
    ("two steps", |rows| rows.updates.push(rows.updates[0].clone()), "2 optimiser steps"),
    ("no step", |rows| rows.updates.clear(), "0 optimiser steps"),
];

#[tokio::test]
async fn a_run_adds_up_until_somebody_has_been_at_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), &chaos::SET);
    let out = run.finish(false);
    assert!(out.status.success(), "{}", text(&out));

    let account = chaos::audit(&run);
    let numbers = ["version", "exactly_once", "images", "redone", "in_flight"];
    let counts = numbers.map(|name| account[name].as_u64());
    assert_eq!(counts, [Some(3), Some(6), Some(24), Some(0), Some(0)], "{account:#}");
    assert_eq!(Copy::of(&run.store).violations(), Vec::<String>::new());

    for (what, doctor, words) in DOCTORED {
        let copy = Copy::of(&run.store);
        let mut rows = copy.rows(1).await;
        doctor(&mut rows);
        copy.replace(1, &rows).await;
        expect(&copy, what, words);
    }

    type Wanted = fn(&Record) -> bool;
    let again: [(&str, Wanted, &str); 4] = [
        ("work done twice", |r| matches!(r, Record::Completed { .. }), "was done twice"),
        ("a lease given twice", |r| matches!(r, Record::Leased { .. }), "was given out twice"),
        ("a step made twice", |r| matches!(r, Record::StepCommitted { .. }), "step 0 went from"),
        (
            "an iteration twice",
            |r| matches!(r, Record::Admitted { .. }),
            "iteration 0 was admitted",
        ),
    ];
    for (what, wanted, words) in again {
        let copy = Copy::of(&run.store);
        let record = copy.find(wanted).await;
        copy.append(record).await;
        expect(&copy, what, words);
    }

    let copy = Copy::of(&run.store);
    copy.store.delete(&keys::table(PromptRow::TABLE, 2)).await.expect("deleted");
    expect(&copy, "a missing table", "iteration 2 is committed, but");
    let copy = Copy::of(&run.store);
    let found = copy.store.checkpoints().newest_found().await.expect("checkpoints");
    let shard = &found.expect("a checkpoint").manifest.shards[0][0];
    copy.store.delete(&shard.key).await.expect("deleted");
    expect(&copy, "a missing shard", "is not whole");
}

fn expect(copy: &Copy, what: &str, words: &str) {
    let found = copy.violations();
    assert!(found.iter().any(|text| text.contains(words)), "{what}: {words}: {found:#?}");
}

#[test]
fn a_folder_without_a_run_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = audit(&folder.path().display().to_string());
    assert_eq!(out.status.code(), Some(64), "{}", text(&out));
    assert!(text(&out).contains("holds no run"), "{}", text(&out));
}
