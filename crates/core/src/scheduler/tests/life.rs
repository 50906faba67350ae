//! Runs from beginning to end.

use super::*;

#[test]
fn a_run_of_honest_workers_completes_and_samples_everything_once() {
    let mut world = World::new(spec());
    world.join(1);
    world.run(1);
    assert_eq!(world.scheduler.finished(), Some(&FinishReason::Completed));
    assert_eq!(world.failures, []);
    assert!(world.sampled.values().all(|n| *n == 1));
    let totals = &world.scheduler.state().totals;
    assert_eq!((totals.admitted, totals.images, totals.failed), (6, 24, 0));
    assert_eq!(world.scheduler.connected(), 0, "everybody was sent home");
}

#[test]
fn du_11_any_prefix_of_the_journal_restores_and_the_run_ends_in_the_same_weights() {
    for lag in [0, 1] {
        let spec = RunSpec { lag, ..spec() };
        let mut whole = World::new(spec.clone());
        whole.join(1);
        whole.run(1);
        let final_digest = whole.scheduler.state().weights(PolicyVersion(3)).unwrap().digest;
        for cut in 0..whole.journal.len() {
            let records = whole.journal[..cut].to_vec();
            let restored =
                Scheduler::restore(spec.clone(), prompts(), Generation(2), None, records.clone());
            let mut again = World::new(spec.clone());
            again.scheduler = restored.unwrap();
            again.drain();
            again.join(2);
            again.run(2);
            let state = again.scheduler.state();
            assert_eq!(again.scheduler.finished(), Some(&FinishReason::Completed), "cut {cut}");
            assert_eq!(state.weights(PolicyVersion(3)).unwrap().digest, final_digest, "cut {cut}");
            let done_before = |unit: &Unit| {
                records
                    .iter()
                    .any(|r| matches!(r, Record::Completed { id, .. } if id.unit == *unit))
            };
            assert!(!again.sampled.keys().any(done_before), "nothing is sampled twice");
        }
    }
}

#[test]
fn du_11_restored_state_equals_live_state() {
    let mut world = World::new(spec());
    world.join(1);
    for _ in 0..25 {
        world.step(1);
    }
    let mut restored = State::new();
    let mut scratch = Scheduler::new(spec(), prompts(), Generation(1)).unwrap();
    for record in &world.journal {
        let rows = match record {
            Record::Admitted { iteration } => scratch.rows(*iteration),
            _ => Vec::new(),
        };
        restored.apply(&spec(), &rows, record).unwrap();
    }
    assert_eq!(&restored, world.scheduler.state());
}

#[test]
fn du_6_a_report_of_an_expired_attempt_changes_nothing() {
    let mut world = World::new(spec());
    world.join(1);
    let (worker, lease) = first_lease(&mut world);
    let late = world.now + 300_001;
    for (name, _) in NAMES {
        world.now = late - 1;
        world.event(Event::Heartbeat { worker: name.into(), session: 1 });
    }
    world.scheduler.handle_timeout(Millis(late));
    world.drain();
    assert!(world.failures.iter().any(|f| f.kind == "lease-expired" && f.text.contains("rollout")));
    world.scheduler.handle_timeout(Millis(late + 500));
    world.drain();
    let before = world.scheduler.state().clone();
    let outcome = Outcome::Done { result: work_of(&lease), took: Millis(1) };
    let report = Report::Lease { id: lease.id, outcome };
    let verdict = world.event(Event::Reported { worker, session: 1, report });
    assert_eq!(verdict, Verdict::Stale);
    assert_eq!(&before, world.scheduler.state());
}

#[test]
fn a_poisoned_tree_is_given_up_with_its_reason_and_the_run_goes_on() {
    let mut world = World::new(RunSpec { quarantine_after: 0, ..spec() });
    world.join(1);
    let poisoned = TreeId { iteration: 0, index: 1 };
    let mut rounds = 0;
    while world.scheduler.finished().is_none() {
        rounds += 1;
        assert!(rounds < 500);
        let bad = world.inbox.iter().position(
            |(_, a)| matches!(a, Assignment::Lease(l) if l.id.unit == Unit::Think(poisoned)),
        );
        if let Some(at) = bad {
            let Some((worker, Assignment::Lease(lease))) = world.inbox.remove(at) else { continue };
            let outcome = Outcome::Failed { kind: "model".to_owned(), reason: "nan".to_owned() };
            let report = Report::Lease { id: lease.id, outcome };
            world.event(Event::Reported { worker: worker.clone(), session: 1, report });
            world.event(Event::Polled { worker, session: 1 });
        } else if !world.step(1) {
            world.now += 1_000;
            for (name, _) in NAMES {
                world.event(Event::Heartbeat { worker: name.into(), session: 1 });
            }
            world.scheduler.handle_timeout(Millis(world.now));
            world.drain();
        }
    }
    assert_eq!(world.scheduler.finished(), Some(&FinishReason::Completed));
    let totals = &world.scheduler.state().totals;
    assert_eq!((totals.failed, totals.failures["model"]), (1, 3));
}

#[test]
fn a_lost_trainer_aborts_the_group_and_the_next_one_replays_to_the_same_weights() {
    let mut world = World::new(RunSpec { checkpoint_every: 100, ..spec() });
    world.join(1);
    while world.scheduler.state().version < PolicyVersion(2) {
        assert!(world.step(1));
    }
    let epoch = world.scheduler.state().epoch;
    let event = Event::Registered { worker: "trainer-1".into(), role: Role::Trainer, session: 9 };
    world.event(event);
    world.inbox.retain(|(worker, _)| !worker.0.starts_with("trainer"));
    world.event(Event::Polled { worker: "trainer-0".into(), session: 1 });
    world.event(Event::Polled { worker: "trainer-1".into(), session: 9 });
    assert!(world.scheduler.state().epoch > epoch);
    while let Some((worker, assignment)) = world.inbox.pop_front() {
        let session = if worker.0 == "trainer-1" { 9 } else { 1 };
        world.inbox.push_front((worker, assignment));
        world.step(session);
    }
    assert_eq!(world.scheduler.finished(), Some(&FinishReason::Completed));
    assert!(world.failures.iter().all(|f| f.kind != "divergence"), "{:?}", world.failures);
}

#[test]
fn stopping_writes_a_checkpoint_of_the_committed_version_and_sends_everybody_home() {
    let mut world = World::new(RunSpec { checkpoint_every: 100, ..spec() });
    world.join(1);
    while world.scheduler.state().version < PolicyVersion(1) {
        assert!(world.step(1));
    }
    world.event(Event::Control(Command::Stop));
    world.run(1);
    assert_eq!(world.scheduler.finished(), Some(&FinishReason::Stopped));
    let (version, _) = world.scheduler.state().checkpoint.clone().unwrap();
    assert_eq!(version, world.scheduler.state().version);
}

#[test]
fn a_phase_computes_only_what_it_trains() {
    let schedule = Schedule::Staged { switch_at: 1 };
    let mut world = World::new(RunSpec { schedule, ..spec() });
    world.join(1);
    let mut seen = Vec::new();
    while let Some((worker, assignment)) = world.inbox.pop_front() {
        match &assignment {
            Assignment::Lease(Lease { work: Work::Render(work), id, .. }) => {
                seen.push((id.unit.tree().iteration, work.window.len));
            }
            Assignment::Lease(Lease { work: Work::Think(work), id, .. }) => {
                let expected = if id.unit.tree().iteration == 0 { 2 } else { 1 };
                assert_eq!(work.traces, expected);
            }
            _ => {}
        }
        world.inbox.push_front((worker, assignment));
        world.step(1);
    }
    assert!(seen.iter().all(|(i, len)| *len == if *i == 0 { 0 } else { 2 }), "{seen:?}");
}

#[test]
fn a_data_set_is_visited_once_an_epoch() {
    let mut scheduler = Scheduler::new(spec(), prompts(), Generation(1)).unwrap();
    let mut rows: Vec<usize> = (0..5).flat_map(|i| scheduler.rows(i)).collect();
    assert_eq!(rows.len(), 10);
    let mut first: Vec<usize> = rows.drain(..5).collect();
    first.sort_unstable();
    rows.sort_unstable();
    assert_eq!(first, [0, 1, 2, 3, 4]);
    assert_eq!(rows, [0, 1, 2, 3, 4]);
}
