//! Lineage tables.

use duet_core::scheduler::{IterationLineage, TraceLineage, TreeLineage};
use duet_core::work::{Finish, Gates, LeafScores, Score, Weights, Window};
use duet_core::{Digest, Millis, PolicyVersion, Seed, TreeId, WorkerId};
use duet_store::lineage::{Row, Rows, TraceRow};
use duet_store::{Store, StoreError};
use std::sync::Arc;

fn scores(value: f64) -> LeafScores {
    [
        ("aesthetic".to_owned(), Score::TimedOut(Millis(50))),
        ("consistency".to_owned(), Score::Failed("no image".to_owned())),
        ("semantic".to_owned(), Score::Scored(value)),
    ]
    .into()
}

fn iteration() -> IterationLineage {
    let trace = |j: u32| TraceLineage {
        trace: j,
        think_worker: WorkerId::from("rollout-0"),
        think_attempt: 1,
        render_worker: WorkerId::from("rollout-1"),
        render_attempt: 2,
        score_worker: WorkerId::from("reward-0"),
        score_attempt: 3,
        text: "two and two … Revised Prompt: a four".to_owned(),
        refined_prompt: "a four".to_owned(),
        well_formed: true,
        tokens: 9,
        finish: Finish::Stop,
        trace_artifact: format!("artifacts/{j}/think"),
        render_artifact: format!("artifacts/{j}/render"),
        reward: Some(0.1 + f64::from(j)),
        advantage: (j == 0).then_some(-1.0),
        scores: vec![scores(0.25), scores(f64::from(j))],
        leaf_rewards: vec![None, Some(0.5)],
        leaf_advantages: vec![None, Some(1.5)],
    };
    IterationLineage {
        iteration: 42,
        sampled_with: PolicyVersion(41),
        gates: Gates { llm: 0.5, dit: 0.5 },
        window: Window { start: 3, len: 2 },
        weights: Weights {
            version: PolicyVersion(43),
            llm: None,
            dit: None,
            digest: Digest::of(b"weights"),
        },
        metrics: [("loss/llm".to_owned(), 0.125)].into(),
        trees: vec![TreeLineage {
            id: TreeId { iteration: 42, index: 7 },
            row: 123,
            prompt: "two plus two".to_owned(),
            fate: "trained".to_owned(),
            reason: String::new(),
            seed: Seed::root(5),
            traces: vec![trace(0), trace(1)],
        }],
    }
}

#[tokio::test]
async fn an_iteration_survives_and_may_be_written_again() {
    let store = Store::memory();
    let lineage = store.lineage();
    let iteration = Arc::new(iteration());
    assert_eq!(lineage.iterations().await.unwrap(), [] as [u32; 0]);
    lineage.write(iteration.clone()).await.unwrap();
    lineage.write(iteration.clone()).await.unwrap();
    let rows = lineage.read(42).await.unwrap();
    assert_eq!(rows, Rows::from(&*iteration));
    assert_eq!(lineage.iterations().await.unwrap(), [42]);
    let mut other = IterationLineage::clone(&iteration);
    other.trees[0].traces[1].tokens += 1;
    assert!(matches!(lineage.write(other.into()).await, Err(StoreError::Conflict { .. })));
}

#[tokio::test]
async fn what_a_loss_of_power_left_of_a_table_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap()).unwrap();
    let (lineage, iteration) = (store.lineage(), Arc::new(iteration()));
    lineage.write(iteration.clone()).await.unwrap();
    let path = folder.path().join(duet_store::keys::table(TraceRow::TABLE, 42));
    let whole = std::fs::read(&path).unwrap();
    let mut holes = whole.clone();
    holes[512..1024].fill(0);
    for torn in [&[][..], &whole[..whole.len() / 2], &holes] {
        std::fs::write(&path, torn).unwrap();
        lineage.write(iteration.clone()).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
    }
    // Not so what another run wrote, which no loss of power leaves.
    let mut other = IterationLineage::clone(&iteration);
    other.trees[0].traces[1].tokens += 1;
    assert!(matches!(lineage.write(other.into()).await, Err(StoreError::Conflict { .. })));
    store.settle().await.unwrap();
    store.settle().await.unwrap();
    assert_eq!(lineage.read(42).await.unwrap(), Rows::from(&*iteration));
}

#[test]
fn du_8_a_missing_score_has_no_number() {
    let rows = Rows::from(&iteration());
    let counts = [
        rows.prompts.len(),
        rows.traces.len(),
        rows.leaves.len(),
        rows.rewards.len(),
        rows.advantages.len(),
        rows.updates.len(),
    ];
    assert_eq!(counts, [1, 2, 4, 12, 6, 1]);
    for row in &rows.rewards {
        assert_eq!(row.value.is_some(), row.status == "scored", "{row:?}");
        assert_eq!(row.reason.is_empty(), row.status == "scored", "{row:?}");
    }
    let llm: Vec<_> = rows.advantages.iter().filter(|row| row.branch == "llm").collect();
    assert!(llm.iter().all(|row| row.leaf.is_none()) && llm[1].advantage.is_none());
    assert_eq!(rows.traces[0].seed.len(), 64);
}

#[tokio::test]
async fn empty_tables_and_broken_files_are_told_apart() {
    let store = Store::memory();
    let lineage = store.lineage();
    lineage.write_rows(3, &Rows::default()).await.unwrap();
    assert_eq!(lineage.read_table::<TraceRow>(3).await.unwrap(), []);
    let key = duet_store::keys::table(TraceRow::TABLE, 4);
    store.create(&key, "not parquet".into()).await.unwrap();
    let error = lineage.read_table::<TraceRow>(4).await.unwrap_err();
    assert!(
        matches!(&error, StoreError::Table { .. }) && error.to_string().contains(&key),
        "{error}"
    );
}
