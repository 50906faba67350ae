//! Trainer groups that fail, disagree, or are overtaken by a checkpoint.

use super::*;

/// Runs until the trainers are told to take a step; leaves that in the inbox.
fn until_step(world: &mut World) -> Vec<(WorkerId, Step)> {
    loop {
        let steps: Vec<(WorkerId, Step)> = { world.inbox.iter() }
            .filter_map(|(worker, assignment)| match assignment {
                Assignment::Step(step) => Some((worker.clone(), step.clone())),
                _ => None,
            })
            .collect();
        if steps.len() == 2 {
            world.inbox.retain(|(_, a)| !matches!(a, Assignment::Step(_)));
            return steps;
        }
        if let Some(at) = world.inbox.iter().position(|(_, a)| !matches!(a, Assignment::Step(_))) {
            let next = world.inbox.remove(at).unwrap();
            world.inbox.push_front(next);
            world.step(1);
        } else {
            world.now += 1_000;
            world.scheduler.handle_timeout(Millis(world.now));
            world.drain();
        }
    }
}

fn step_done(step: &Step, rank: u32, digest: Digest, loss: f64) -> Report {
    let version = PolicyVersion(u64::from(step.iteration) + 1);
    Report::StepDone(StepDone {
        epoch: step.epoch,
        rank: Rank(rank),
        iteration: step.iteration,
        weights: Weights { version, llm: None, dit: None, digest },
        metrics: [("loss".to_owned(), loss)].into(),
    })
}

fn polled(world: &mut World) {
    for name in ["trainer-0", "trainer-1"] {
        world.event(Event::Polled { worker: name.into(), session: 1 });
    }
}

#[test]
fn ranks_that_disagree_commit_nothing_and_a_run_in_which_they_always_do_ends_with_its_reason() {
    let mut world = World::new(spec());
    world.join(1);
    for attempt in 1..=3 {
        let steps = until_step(&mut world);
        for (rank, (worker, step)) in (0u32..).zip(&steps) {
            let report = step_done(step, rank, Digest([rank as u8; 32]), 0.5);
            world.event(Event::Reported { worker: worker.clone(), session: 1, report });
        }
        assert_eq!(world.scheduler.state().version, PolicyVersion(0));
        assert_eq!(world.scheduler.finished().is_some(), attempt == 3);
        polled(&mut world);
    }
    assert!(world.failures.iter().filter(|f| f.kind == "divergence").count() == 3);
    let Some(FinishReason::Failed(reason)) = world.scheduler.finished() else { panic!() };
    assert!(reason.contains("rank 1") && reason.contains("iteration 0"), "{reason}");
}

#[test]
fn a_loss_that_is_not_finite_commits_nothing() {
    let mut world = World::new(spec());
    world.join(1);
    let steps = until_step(&mut world);
    let (worker, step) = &steps[0];
    let report = step_done(step, 0, Digest([1; 32]), f64::NAN);
    let verdict = world.event(Event::Reported { worker: worker.clone(), session: 1, report });
    assert!(matches!(verdict, Verdict::Refused(why) if why.contains("loss is NaN")));
    assert_eq!(world.scheduler.state().version, PolicyVersion(0));
    assert_eq!(world.failures.last().map(|f| f.kind.as_str()), Some("non-finite"));
}

#[test]
fn a_step_reported_twice_or_by_an_old_group_counts_once() {
    let mut world = World::new(spec());
    world.join(1);
    let steps = until_step(&mut world);
    let (worker, step) = &steps[0];
    let report = step_done(step, 0, Digest([1; 32]), 0.5);
    let event = Event::Reported { worker: worker.clone(), session: 1, report };
    assert_eq!(world.event(event.clone()), Verdict::Accepted);
    assert_eq!(world.event(event.clone()), Verdict::Duplicate);
    let left = Event::Left { worker: "trainer-1".into(), session: 1, reason: "gone".to_owned() };
    world.event(left);
    assert_eq!(world.event(event), Verdict::Stale);
}

/// A checkpoint may be completed after the group that asked for it is gone, while the next one is
/// already repeating the steps before it: their trees are not kept any more.
#[test]
fn a_group_that_a_checkpoint_overtakes_starts_over_from_it() {
    let mut world = World::new(RunSpec { checkpoint_every: 100, ..spec() });
    world.join(1);
    while world.scheduler.state().version < PolicyVersion(2) {
        assert!(world.step(1));
    }
    let left = Event::Left { worker: "trainer-1".into(), session: 1, reason: "gone".to_owned() };
    world.event(left);
    world.inbox.retain(|(worker, _)| !worker.0.starts_with("trainer"));
    let role = Role::Trainer;
    world.event(Event::Registered { worker: "trainer-1".into(), role, session: 1 });
    polled(&mut world);
    let epoch = world.scheduler.state().epoch;
    let manifest = artifact("checkpoint v2".to_owned());
    let version = PolicyVersion(2);
    world.event(Event::CheckpointWritten { version, manifest });
    assert!(world.failures.iter().any(|failure| failure.kind == "superseded"));
    world.inbox.retain(|(worker, _)| !worker.0.starts_with("trainer"));
    world.now += 1_000;
    world.scheduler.handle_timeout(Millis(world.now));
    polled(&mut world);
    assert!(world.scheduler.state().epoch > epoch, "after a backoff");
    world.run(1);
    assert_eq!(world.scheduler.finished(), Some(&FinishReason::Completed));
    assert!(world.failures.iter().all(|failure| failure.kind != "divergence"));
}

#[test]
fn stopping_without_trainers_ends_at_once_and_a_complete_run_needs_none() {
    let mut world = World::new(spec());
    world.event(Event::Control(Command::Stop));
    assert_eq!(world.scheduler.finished(), Some(&FinishReason::Stopped));

    let mut world = World::new(spec());
    world.join(1);
    world.run(1);
    let mut again =
        Scheduler::restore(spec(), prompts(), Generation(2), None, world.journal).unwrap();
    assert_eq!(again.poll_timeout(), Some(Millis(0)));
    again.handle_timeout(Millis(1));
    assert_eq!(again.finished(), Some(&FinishReason::Completed));
}

/// Three steps without a checkpoint, then a rank is lost and comes back.
fn after_a_lost_rank(peers: bool) -> World {
    let mut world = World::new(RunSpec { iterations: 6, checkpoint_every: 8, ..spec() });
    world.join(1);
    for _ in 0..3 {
        for (rank, (worker, step)) in (0u32..).zip(&until_step(&mut world)) {
            let report = step_done(step, rank, digest_after(step), 0.5);
            world.event(Event::Reported { worker: worker.clone(), session: 1, report });
        }
        polled(&mut world);
    }
    assert_eq!(world.scheduler.state().version, PolicyVersion(3));
    until_step(&mut world);
    world.peers = peers;
    let lost = WorkerId::from("trainer-1");
    world.event(Event::Left { worker: lost.clone(), session: 1, reason: "killed".to_owned() });
    world.event(Event::Registered { worker: lost, role: Role::Trainer, session: 2 });
    for (name, session) in [("trainer-0", 1), ("trainer-1", 2)] {
        world.event(Event::Polled { worker: name.into(), session });
    }
    world
}

/// The rendezvous that both ranks were told of.
fn told(world: &mut World) -> Vec<(WorkerId, Rendezvous)> {
    let mut told = Vec::new();
    loop {
        world.inbox.retain(|(worker, assignment)| match assignment {
            Assignment::Rendezvous(r) => {
                told.push((worker.clone(), r.clone()));
                false
            }
            _ => true,
        });
        let Some((first, r)) = told.first().filter(|_| told.len() == 1) else { return told };
        let report = Report::StoreReady { epoch: r.epoch, address: "h:1".to_owned() };
        let worker = first.clone();
        let session = if worker.0.ends_with('0') { 1 } else { 2 };
        world.event(Event::Reported { worker, session, report });
    }
}

#[test]
fn a_group_whose_ranks_hold_the_newest_version_goes_on_from_it_and_repeats_nothing() {
    for (peers, next) in [(true, 3), (false, 0)] {
        let mut world = after_a_lost_rank(peers);
        while !world.inbox.iter().any(|(_, a)| matches!(a, Assignment::Step(_))) {
            let session = if world.inbox.front().unwrap().0.0.ends_with('1') { 2 } else { 1 };
            world.step(session);
        }
        let step = world.inbox.iter().find_map(|(_, a)| match a {
            Assignment::Step(step) => Some(step),
            _ => None,
        });
        assert_eq!(step.unwrap().iteration, next, "peers: {peers}");
    }
}

#[test]
fn du_5_a_rank_that_holds_what_nobody_committed_or_another_version_than_the_others_ends_the_group()
{
    let ready = |r: &Rendezvous, version: u64, digest: Digest| Report::TrainerReady {
        epoch: r.epoch,
        rank: r.rank,
        version: PolicyVersion(version),
        digest,
    };
    let newest = |world: &World| world.scheduler.state().weights(PolicyVersion(3)).unwrap().digest;
    let base = Digest([0; 32]);
    for (versions, digests) in [
        // Neither the checkpoint's nor the newest.
        ([2, 2], [base, base]),
        ([4, 4], [base, base]),
        // The newest, but other bits.
        ([3, 3], [base, base]),
        // One each.
        ([3, 0], [Digest([9; 32]), base]),
    ] {
        let mut world = after_a_lost_rank(true);
        let told = told(&mut world);
        assert_eq!(told.len(), 2);
        let held = Some(Held { version: PolicyVersion(3), digest: newest(&world) });
        assert!(told.iter().all(|(_, r)| r.newest == held && r.restore.is_none()));
        let before = world.failures.len();
        for (index, (worker, r)) in told.iter().enumerate() {
            let session = if worker.0.ends_with('0') { 1 } else { 2 };
            let right = digests[index] == Digest([9; 32]);
            let digest = if right { newest(&world) } else { digests[index] };
            let report = ready(r, versions[index], digest);
            world.event(Event::Reported { worker: worker.clone(), session, report });
        }
        assert!(world.failures.len() > before, "{versions:?}");
        assert!(!world.inbox.iter().any(|(_, a)| matches!(a, Assignment::Step(_))), "{versions:?}");
    }
}
