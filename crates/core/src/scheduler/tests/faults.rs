//! Workers that are lost, late, broken or lying.

use super::*;
use crate::Attempt;

fn registered(world: &mut World, name: &str, role: Role, session: u64) {
    world.event(Event::Registered { worker: name.into(), role, session });
    world.event(Event::Polled { worker: name.into(), session });
}

fn fail(world: &mut World, worker: &WorkerId, id: LeaseId) -> Verdict {
    let outcome = Outcome::Failed { kind: "model".to_owned(), reason: "no".to_owned() };
    let report = Report::Lease { id, outcome };
    world.event(Event::Reported { worker: worker.clone(), session: 1, report })
}

fn later(world: &mut World, span: u64) {
    world.now += span;
    for (name, _) in NAMES {
        world.event(Event::Heartbeat { worker: name.into(), session: 1 });
    }
    world.scheduler.handle_timeout(Millis(world.now));
    world.drain();
}

/// DU-6, and AReaL's and torchft's rule that whoever comes back late is told so.
#[test]
fn a_new_process_under_an_old_name_loses_the_leases_at_once() {
    let mut world = World::new(spec());
    registered(&mut world, "rollout-0", Role::Rollout, 1);
    let (_, lease) = first_lease(&mut world);
    registered(&mut world, "rollout-0", Role::Rollout, 2);
    let (_, again) = first_lease(&mut world);
    assert_eq!(again.id, LeaseId { unit: lease.id.unit, attempt: Attempt(2) });
    let outcome = Outcome::Done { result: work_of(&lease), took: Millis(1) };
    let report = Report::Lease { id: lease.id, outcome };
    let old = Event::Reported { worker: "rollout-0".into(), session: 1, report: report.clone() };
    assert_eq!(world.event(old), Verdict::Unknown);
    let new = Event::Reported { worker: "rollout-0".into(), session: 2, report };
    assert_eq!(world.event(new), Verdict::Stale);
}

/// A closed connection is a reason to wait for a sign of life less long, and no more than that.
#[test]
fn a_worker_whose_connection_closed_is_lost_unless_it_comes_back() {
    let mut world = World::new(spec());
    registered(&mut world, "rollout-0", Role::Rollout, 1);
    let (_, lease) = first_lease(&mut world);
    let worker = WorkerId::from("rollout-0");
    let closed = |session| Event::Disconnected { worker: worker.clone(), session };
    let grace = spec().timing.reconnect.0;

    assert_eq!(world.event(closed(9)), Verdict::Unknown, "of an older process");
    assert_eq!(world.event(closed(1)), Verdict::Accepted);
    world.now += grace - 1;
    world.scheduler.handle_timeout(Millis(world.now));
    world.event(Event::Heartbeat { worker: worker.clone(), session: 1 });
    world.now += grace;
    world.scheduler.handle_timeout(Millis(world.now));
    assert_eq!(world.scheduler.connected(), 1, "it came back in time");

    world.event(closed(1));
    let due = world.scheduler.poll_timeout().unwrap();
    assert_eq!(due, Millis(world.now + grace));
    world.now += grace;
    world.scheduler.handle_timeout(due);
    world.drain();
    assert_eq!(world.scheduler.connected(), 0);
    registered(&mut world, "rollout-1", Role::Rollout, 1);
    world.now += spec().timing.backoff.0;
    world.scheduler.handle_timeout(Millis(world.now));
    world.drain();
    let mut units = Vec::new();
    for _ in 0..spec().prompts_per_iteration {
        let (worker, next) = first_lease(&mut world);
        units.push(next.id.unit);
        fail(&mut world, &worker, next.id);
        world.event(Event::Polled { worker, session: 1 });
    }
    assert!(units.contains(&lease.id.unit), "its lease went to another worker: {units:?}");
}

/// Nobody waits long for a process that is most likely dead while another one idles; but when several
/// connections close at once, the network is to blame.
#[test]
fn a_worker_that_is_cut_alone_is_waited_for_less_long_while_another_idles() {
    let mut world = World::new(RunSpec { prompts_per_iteration: 2, iterations: 1, ..spec() });
    for name in ["rollout-0", "rollout-1", "rollout-2"] {
        registered(&mut world, name, Role::Rollout, 1);
    }
    let (first, lost) = first_lease(&mut world);
    let (second, _) = first_lease(&mut world);
    let closed = |worker: &WorkerId| Event::Disconnected { worker: worker.clone(), session: 1 };
    world.event(closed(&first));
    let soon = world.scheduler.poll_timeout().unwrap();
    assert!(soon < Millis(world.now + spec().timing.reconnect.0 / 10), "{soon:?}");
    world.event(closed(&second));
    world.now = soon.0;
    world.scheduler.handle_timeout(soon);
    world.drain();
    assert_eq!(world.scheduler.connected(), 2, "the second one may be the network's fault");
    let (heir, taken) = first_lease(&mut world);
    assert_eq!((heir.0.as_str(), taken.id.unit), ("rollout-2", lost.id.unit));
    world.now += spec().timing.reconnect.0;
    world.scheduler.handle_timeout(Millis(world.now));
    world.drain();
    assert_eq!(world.scheduler.connected(), 1);
}

/// Who asks for work after a connection closed is as good as who had asked before.
#[test]
fn an_heir_that_asks_later_shortens_the_wait_as_well() {
    let mut world = World::new(RunSpec { prompts_per_iteration: 1, iterations: 1, ..spec() });
    registered(&mut world, "rollout-0", Role::Rollout, 1);
    let (first, lost) = first_lease(&mut world);
    let closed = |worker: &WorkerId| Event::Disconnected { worker: worker.clone(), session: 1 };
    world.event(closed(&first));
    let whole = Millis(world.now + spec().timing.reconnect.0);
    assert_eq!(world.scheduler.poll_timeout(), Some(whole), "nobody could take its work over");
    world.now += 100;
    registered(&mut world, "reward-0", Role::Reward, 1);
    assert_eq!(world.scheduler.poll_timeout(), Some(whole), "of another role");
    registered(&mut world, "rollout-1", Role::Rollout, 1);
    let soon = world.scheduler.poll_timeout().unwrap();
    assert!(soon < Millis(world.now + spec().timing.reconnect.0 / 10), "{soon:?}");
    world.now = soon.0;
    world.scheduler.handle_timeout(soon);
    world.drain();
    let (heir, taken) = first_lease(&mut world);
    assert_eq!((heir.0.as_str(), taken.id.unit), ("rollout-1", lost.id.unit));
}

#[test]
fn losses_are_not_failures_but_bounded_all_the_same() {
    let mut world = World::new(RunSpec { iterations: 1, prompts_per_iteration: 1, ..spec() });
    let limit = 8 * spec().max_attempts;
    let tree = |world: &World| world.scheduler.state().trees.get(&TreeId::default()).cloned();
    let mut session = 0;
    while tree(&world).is_none_or(|tree| tree.fate.is_none()) {
        session += 1;
        assert!(session < 100);
        registered(&mut world, "rollout-0", Role::Rollout, session);
        world.now += 60_000;
        world.scheduler.handle_timeout(Millis(world.now));
        world.drain();
    }
    let tries = tree(&world).unwrap().think_tries;
    assert_eq!((tries.given, tries.failed), (limit, 0));
    let fate = world.scheduler.state().trees[&TreeId::default()].fate.clone();
    assert!(matches!(fate, Some(Fate::Failed(reason)) if reason.contains("24 attempts")));
}

#[test]
fn a_late_lease_goes_to_a_worker_who_idles() {
    let mut world = World::new(RunSpec { prompts_per_iteration: 5, iterations: 1, ..spec() });
    registered(&mut world, "rollout-0", Role::Rollout, 1);
    while !world.inbox.is_empty() && world.journal.len() < 25 {
        world.step(1);
    }
    let (slow, lease) = first_lease(&mut world);
    registered(&mut world, "rollout-1", Role::Rollout, 1);
    while let Some((worker, assignment)) = world.inbox.pop_front() {
        world.inbox.push_front((worker, assignment));
        world.step(1);
    }
    later(&mut world, 2_000);
    let (other, again) = first_lease(&mut world);
    assert_eq!((again.id.unit, again.id.attempt), (lease.id.unit, Attempt(2)));
    assert_ne!(other, slow);
    let outcome = Outcome::Done { result: work_of(&lease), took: Millis(9) };
    let report = Report::Lease { id: lease.id, outcome };
    let verdict = world.event(Event::Reported { worker: slow, session: 1, report });
    assert_eq!(verdict, Verdict::Stale);
    assert!(world.failures.iter().any(|failure| failure.kind == "straggler"));
}

#[test]
fn a_broken_worker_is_quarantined_for_a_while_and_a_poisoned_tree_quarantines_nobody() {
    let spec = RunSpec { prompts_per_iteration: 5, quarantine_after: 3, ..spec() };
    let mut world = World::new(RunSpec { max_attempts: 9, ..spec.clone() });
    registered(&mut world, "rollout-0", Role::Rollout, 1);
    let (worker, first) = first_lease(&mut world);
    fail(&mut world, &worker, first.id);
    world.event(Event::Polled { worker: worker.clone(), session: 1 });
    for _ in 0..2 {
        let (worker, lease) = first_lease(&mut world);
        assert_ne!(lease.id.unit, first.id.unit, "backoff: others come first");
        fail(&mut world, &worker, lease.id);
        world.event(Event::Polled { worker, session: 1 });
    }
    assert!(world.inbox.is_empty(), "three different trees: no more work");
    assert!(world.failures.iter().any(|failure| failure.kind == "quarantined"));
    let until = spec.timing.backoff_max.0;
    for _ in 0..until / 10_000 {
        later(&mut world, 10_000);
    }
    assert!(!world.inbox.is_empty(), "and then another chance");

    let mut world =
        World::new(RunSpec { prompts_per_iteration: 1, max_attempts: 9, ..spec.clone() });
    registered(&mut world, "rollout-0", Role::Rollout, 1);
    for _ in 0..6 {
        let (worker, lease) = first_lease(&mut world);
        fail(&mut world, &worker, lease.id);
        world.event(Event::Polled { worker, session: 1 });
        later(&mut world, 10_000);
        later(&mut world, 10_000);
    }
    assert!(world.failures.iter().all(|failure| failure.kind == "model"));
}

#[test]
fn a_worker_that_lives_through_a_restart_of_the_coordinator_goes_on() {
    for same_process in [true, false] {
        let mut world = World::new(spec());
        registered(&mut world, "rollout-0", Role::Rollout, 1);
        let (worker, lease) = first_lease(&mut world);
        let records = world.journal.clone();
        world.scheduler =
            Scheduler::restore(spec(), prompts(), Generation(2), None, records).unwrap();
        world.drain();
        registered(&mut world, "rollout-1", Role::Rollout, 1);
        let (_, other) = first_lease(&mut world);
        assert_ne!(other.id.unit, lease.id.unit, "nobody else gets it for a heartbeat's time");
        let session = if same_process { 1 } else { 7 };
        world.event(Event::Registered { worker: worker.clone(), role: Role::Rollout, session });
        let outcome = Outcome::Done { result: work_of(&lease), took: Millis(1) };
        let report = Report::Lease { id: lease.id, outcome };
        let verdict = world.event(Event::Reported { worker, session, report });
        assert_eq!(verdict == Verdict::Accepted, same_process, "{verdict:?}");
    }
}

#[test]
fn a_drained_worker_is_told_again_when_it_did_not_hear() {
    let mut world = World::new(spec());
    registered(&mut world, "reward-0", Role::Reward, 1);
    world.event(Event::Control(Command::Drain("reward-0".into())));
    for _ in 0..3 {
        let told = world.inbox.pop_front();
        assert!(matches!(told, Some((_, Assignment::Leave { .. }))), "{told:?}");
        world.event(Event::Polled { worker: "reward-0".into(), session: 1 });
    }
    let nobody = world.event(Event::Control(Command::Drain("reward-9".into())));
    assert!(matches!(nobody, Verdict::Refused(why) if why.contains("reward-9")));
}

#[test]
fn du_8_a_score_that_is_not_finite_is_a_bad_report() {
    let mut world = World::new(spec());
    world.join(1);
    let (worker, lease) = loop {
        let (worker, lease) = first_lease(&mut world);
        if matches!(lease.work, Work::Score(_)) {
            break (worker, lease);
        }
        world.inbox.push_front((worker, Assignment::Lease(lease)));
        world.step(1);
    };
    let leaf: LeafScores = [("semantic".to_owned(), Score::Scored(f64::NAN))].into();
    let outcome = Outcome::Done { result: Done::Score(vec![leaf; 2]), took: Millis(1) };
    let report = Report::Lease { id: lease.id, outcome };
    world.event(Event::Reported { worker, session: 1, report });
    let failure = world.failures.last().unwrap();
    assert!(failure.kind == "bad-report" && failure.text.contains("reward-0"), "{failure:?}");
}
