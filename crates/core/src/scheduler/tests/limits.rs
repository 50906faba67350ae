//! What is bounded, and what survives JSON.

use super::*;
use proptest::prelude::*;

/// AReaL `tests/test_staleness_manager.py`: how much may be in flight is a function of version and
/// lag alone. Here it is exact: L + 1 iterations, each sampled with version i - L.
#[test]
fn du_3_at_most_l_plus_1_iterations_are_open_and_each_has_its_version() {
    for lag in 0..4 {
        let spec = RunSpec { lag, iterations: 6, ..spec() };
        let mut world = World::new(spec.clone());
        world.join(1);
        while let Some((worker, assignment)) = world.inbox.pop_front() {
            let state = world.scheduler.state();
            let open = u64::from(state.admitted) - state.version.0;
            let left = u64::from(spec.iterations) - state.version.0;
            assert_eq!(open, u64::from(lag + 1).min(left), "lag {lag} at {}", state.version);
            if let Assignment::Lease(lease) = &assignment {
                let due = u64::from(lease.id.unit.tree().iteration.saturating_sub(lag));
                match &lease.work {
                    Work::Think(work) => assert_eq!(work.weights.version.0, due),
                    Work::Render(work) => assert_eq!(work.weights.version.0, due),
                    Work::Score(_) => {}
                }
            }
            world.inbox.push_front((worker, assignment));
            world.step(1);
        }
        assert_eq!(world.scheduler.finished(), Some(&FinishReason::Completed), "lag {lag}");
    }
}

/// verl-omni `test_v1_replay_buffer_on_cpu.py`: what fails is taken out exactly. Here nothing is put
/// in its place: the batch is smaller by the tree that failed, and holds nothing of it.
#[test]
fn a_failed_tree_leaves_the_batch_smaller_and_nothing_else_changes() {
    let spec = RunSpec { prompts_per_iteration: 4, iterations: 1, max_attempts: 1, ..spec() };
    let batch = |poisoned: Option<TreeId>| {
        let mut world = World::new(spec.clone());
        world.join(1);
        while let Some((worker, assignment)) = world.inbox.pop_front() {
            if let Assignment::Step(step) = &assignment {
                return step.trees.clone();
            }
            match &assignment {
                Assignment::Lease(lease) if poisoned == Some(lease.id.unit.tree()) => {
                    let (kind, reason) = ("model".to_owned(), "no".to_owned());
                    let outcome = Outcome::Failed { kind, reason };
                    let report = Report::Lease { id: lease.id, outcome };
                    let event = Event::Reported { worker: worker.clone(), session: 1, report };
                    world.event(event);
                    world.event(Event::Polled { worker, session: 1 });
                }
                _ => {
                    world.inbox.push_front((worker, assignment));
                    world.step(1);
                }
            }
        }
        Vec::new()
    };
    let whole = batch(None);
    let gone = TreeId { iteration: 0, index: 2 };
    let rest: Vec<TrainTree> = whole.iter().filter(|tree| tree.id != gone).cloned().collect();
    assert_eq!((whole.len(), batch(Some(gone))), (4, rest));
}

#[test]
fn du_11_state_and_records_survive_json_bit_for_bit() {
    let mut world = World::new(spec());
    world.join(1);
    for _ in 0..40 {
        world.step(1);
    }
    let state = world.scheduler.state();
    let text = serde_json::to_string(state).unwrap();
    assert_eq!(&serde_json::from_str::<State>(&text).unwrap(), state);
    for record in &world.journal {
        let text = serde_json::to_string(record).unwrap();
        assert_eq!(&serde_json::from_str::<Record>(&text).unwrap(), record);
    }
}

#[test]
fn a_record_that_breaks_an_invariant_is_refused_by_its_id() {
    let mut world = World::new(spec());
    world.join(1);
    while !world.journal.iter().any(|record| matches!(record, Record::Completed { .. })) {
        world.step(1);
    }
    let state = world.scheduler.state();
    let refused = |record: &Record| {
        let before = state.clone();
        let mut after = state.clone();
        let misfit = after.apply(&spec(), &[], record).unwrap_err().to_string();
        assert_eq!(after, before, "a record is applied whole or not at all");
        misfit
    };
    let completed =
        { world.journal.iter() }.find(|record| matches!(record, Record::Completed { .. })).unwrap();
    assert!(refused(completed).contains("DU-1"));
    let leased =
        world.journal.iter().rfind(|record| matches!(record, Record::Leased { .. })).unwrap();
    assert!(refused(leased).contains("DU-"));
    let digest = Digest([0; 32]);
    let weights = Weights { version: PolicyVersion(5), llm: None, dit: None, digest };
    let metrics = BTreeMap::new();
    let jump = Record::StepCommitted { iteration: 4, weights: weights.clone(), metrics };
    assert!(refused(&jump).contains("DU-4"));
    let weights = Weights { version: PolicyVersion(1), ..weights };
    let early = Record::StepCommitted { iteration: 0, weights, metrics: BTreeMap::new() };
    assert!(refused(&early).contains("DU-2"));
}

proptest! {
    /// Whoever works first: the same trees, the same batches, the same weights.
    #[test]
    fn the_order_in_which_workers_answer_does_not_matter(order in any::<u64>()) {
        let run = |order: u64| {
            let mut world = World::new(RunSpec { lag: 1, ..spec() });
            world.join(1);
            let mut dice = order;
            while !world.inbox.is_empty() {
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let turn = (dice >> 33) as usize % world.inbox.len();
                // Trainers must answer in turn: a rank's steps come one after the other.
                world.inbox.rotate_left(turn);
                world.step(1);
            }
            world.scheduler.state().weights(PolicyVersion(3)).map(|weights| weights.digest)
        };
        prop_assert_eq!(run(order), run(0));
    }
}
