//! Groups of fewer ranks than wanted, where the run allows them.

use super::*;

fn allowing(checkpoint_every: u32) -> World {
    let mut world = World::new(RunSpec { min_world: 1, checkpoint_every, ..spec() });
    world.join(1);
    world
}

fn lose_trainer_1(world: &mut World) {
    let left = Event::Left { worker: "trainer-1".into(), session: 1, reason: "gone".to_owned() };
    world.event(left);
    world.inbox.retain(|(worker, _)| !worker.0.starts_with("trainer"));
    world.event(Event::Polled { worker: "trainer-0".into(), session: 1 });
}

/// Lets time pass until the scheduler does something with trainers.
fn wait_for_group(world: &mut World) {
    let epoch = world.scheduler.state().epoch;
    while world.scheduler.state().epoch == epoch {
        let at = world.scheduler.poll_timeout().expect("it waits for something");
        world.now = world.now.max(at.0);
        for name in ["rollout-0", "rollout-1", "reward-0", "trainer-0"] {
            world.event(Event::Heartbeat { worker: name.into(), session: 1 });
        }
        world.scheduler.handle_timeout(Millis(world.now));
        world.drain();
    }
}

/// What one rank alone comes to: other bits than two.
fn alone(step: &Step) -> Digest {
    Digest::of(format!("alone {}", step.iteration).as_bytes())
}

/// Works on; steps of a group of one give what one rank comes to.
fn run_alone(world: &mut World) {
    while let Some((worker, assignment)) = world.inbox.pop_front() {
        let Assignment::Step(step) = &assignment else {
            world.inbox.push_front((worker, assignment));
            world.step(1);
            continue;
        };
        let version = PolicyVersion(u64::from(step.iteration) + u64::from(step.update));
        let weights = Weights { version, llm: None, dit: None, digest: alone(step) };
        world.versions.insert(worker.clone(), version);
        let done = Report::StepDone(StepDone {
            epoch: step.epoch,
            rank: Rank(0),
            iteration: step.iteration,
            weights,
            metrics: BTreeMap::new(),
        });
        let shard = step.checkpoint.then(|| shard_done(step, 0));
        for report in [Some(done), shard].into_iter().flatten() {
            let reported = Event::Reported { worker: worker.clone(), session: 1, report };
            assert_eq!(world.event(reported), Verdict::Accepted);
        }
        world.event(Event::Polled { worker, session: 1 });
    }
}

#[test]
fn a_smaller_group_repeats_to_its_own_bits_and_goes_on_from_them() {
    let mut world = allowing(100);
    while world.scheduler.state().version < PolicyVersion(2) {
        assert!(world.step(1));
    }
    let committed = world.scheduler.state().weights(PolicyVersion(2)).unwrap();
    lose_trainer_1(&mut world);
    wait_for_group(&mut world);
    let members = world.inbox.iter().filter(|(_, a)| matches!(a, Assignment::Rendezvous(_)));
    assert_eq!(members.count(), 1);
    run_alone(&mut world);
    assert_eq!(world.scheduler.finished(), Some(&FinishReason::Completed));
    assert!(world.failures.iter().all(|f| f.kind != "divergence"), "{:?}", world.failures);
    let retaken: Vec<u32> = { world.journal.iter() }
        .filter_map(|record| match record {
            Record::Retaken { iteration, .. } => Some(*iteration),
            _ => None,
        })
        .collect();
    assert_eq!(retaken, [0, 1]);
    let restored = |records: &[Record]| {
        let spec = RunSpec { min_world: 1, checkpoint_every: 100, ..spec() };
        Scheduler::restore(spec, prompts(), Generation(1), None, records.to_vec()).unwrap()
    };
    assert_eq!(restored(&world.journal).state(), world.scheduler.state(), "DU-11");
    // What samples is what was committed and published; before the last checkpoint made it needless.
    let saved = world.journal.iter().position(|r| matches!(r, Record::Checkpointed { .. }));
    let before = restored(&world.journal[..saved.unwrap()]);
    let (version, state) = (PolicyVersion(2), before.state());
    assert_eq!(state.weights(version), Some(committed.clone()));
    let trained = state.trained_digest(version).unwrap();
    assert_ne!(trained, committed.digest);
}

#[test]
fn a_group_waits_for_all_where_the_run_does_not_allow_fewer() {
    let mut world = World::new(spec());
    world.join(1);
    while world.scheduler.state().version < PolicyVersion(1) {
        assert!(world.step(1));
    }
    lose_trainer_1(&mut world);
    let epoch = world.scheduler.state().epoch;
    for _ in 0..100 {
        world.now += 1_000;
        world.event(Event::Heartbeat { worker: "trainer-0".into(), session: 1 });
        world.scheduler.handle_timeout(Millis(world.now));
        world.drain();
    }
    assert_eq!(world.scheduler.state().epoch, epoch);
}

#[test]
fn a_smaller_group_grows_when_a_rank_comes_back_and_nothing_must_be_repeated() {
    let mut world = allowing(1);
    while world.scheduler.state().version < PolicyVersion(1) {
        assert!(world.step(1));
    }
    lose_trainer_1(&mut world);
    wait_for_group(&mut world);
    while world.inbox.iter().any(|(_, a)| matches!(a, Assignment::Rendezvous(_))) {
        world.step(1);
    }
    let (role, epoch) = (Role::Trainer, world.scheduler.state().epoch);
    world.event(Event::Registered { worker: "trainer-1".into(), role, session: 1 });
    world.event(Event::Polled { worker: "trainer-1".into(), session: 1 });
    world.run(1);
    assert!(world.scheduler.state().epoch > epoch);
    assert_eq!(world.scheduler.state().world, 2);
    assert_eq!(world.scheduler.finished(), Some(&FinishReason::Completed));
    assert!(world.failures.iter().all(|f| f.kind != "divergence"), "{:?}", world.failures);
}
