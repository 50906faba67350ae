//! Scripts of a run, event by event, and one small world that grows whole runs.

use super::*;
use crate::advantage::AdvantageSpec;
use crate::reward::RewardSpec;
use crate::schedule::{Schedule, WindowSpec};
use crate::spec::Timing;
use crate::work::*;
use crate::{ArtifactRef, Digest, Rank, Role};
use std::collections::VecDeque;

fn spec() -> RunSpec {
    RunSpec {
        seed: 1,
        iterations: 3,
        prompts_per_iteration: 2,
        traces: 2,
        leaves: 2,
        lag: 0,
        steps: 10,
        window: WindowSpec::Random { len: 2, low: 0, high: 5 },
        schedule: Schedule::Balanced,
        reward: RewardSpec {
            llm: [("semantic".to_owned(), 1.0)].into(),
            dit: [("semantic".to_owned(), 1.0)].into(),
            ..RewardSpec::default()
        },
        llm_advantage: AdvantageSpec::default(),
        dit_advantage: AdvantageSpec::default(),
        world: 2,
        checkpoint_every: 2,
        max_attempts: 3,
        quarantine_after: 4,
        timing: Timing::default(),
    }
}

fn prompts() -> Arc<[PromptRow]> {
    (0..5)
        .map(|row| PromptRow { row, text: format!("prompt {row}"), meta: String::new() })
        .collect()
}

fn artifact(key: String) -> ArtifactRef {
    ArtifactRef { digest: Digest::of(key.as_bytes()), bytes: key.len() as u64, key }
}

/// What an honest worker makes of an assignment; a pure function, as the real one is.
fn work_of(lease: &Lease) -> Done {
    let place = lease.id.unit.place();
    match &lease.work {
        Work::Think(work) => Done::Think(
            (0..work.traces)
                .map(|j| Trace {
                    artifact: artifact(format!("{place}/think-{j}")),
                    text: "easy. Revised Prompt:\nx".to_owned(),
                    refined_prompt: "x".to_owned(),
                    well_formed: true,
                    tokens: 7,
                    finish: Finish::Stop,
                })
                .collect(),
        ),
        Work::Render(_) => Done::Render(artifact(format!("{place}/render"))),
        Work::Score(work) => {
            let seed = Digest::of(place.as_bytes()).0;
            Done::Score(
                (0..work.leaves as usize)
                    .map(|k| {
                        [("semantic".to_owned(), Score::Scored(f64::from(seed[k]) / 255.0))].into()
                    })
                    .collect(),
            )
        }
    }
}

fn digest_after(step: &Step) -> Digest {
    Digest::of(format!("{} {:?} {:?}", step.iteration, step.trees, step.gates).as_bytes())
}

/// A scheduler with honest workers and a journal in memory.
struct World {
    scheduler: Scheduler,
    journal: Vec<Record>,
    inbox: VecDeque<(WorkerId, Assignment)>,
    failures: Vec<Failure>,
    versions: BTreeMap<WorkerId, PolicyVersion>,
    now: u64,
    sampled: BTreeMap<Unit, u32>,
}

const NAMES: [(&str, Role); 5] = [
    ("rollout-0", Role::Rollout),
    ("rollout-1", Role::Rollout),
    ("reward-0", Role::Reward),
    ("trainer-0", Role::Trainer),
    ("trainer-1", Role::Trainer),
];

impl World {
    fn new(spec: RunSpec) -> World {
        let scheduler = Scheduler::new(spec, prompts(), Generation(1)).unwrap();
        let mut world = World {
            scheduler,
            journal: Vec::new(),
            inbox: VecDeque::new(),
            failures: Vec::new(),
            versions: BTreeMap::new(),
            now: 0,
            sampled: BTreeMap::new(),
        };
        world.drain();
        world
    }

    fn join(&mut self, session: u64) {
        for (name, role) in NAMES {
            self.event(Event::Registered { worker: name.into(), role, session });
            self.event(Event::Polled { worker: name.into(), session });
        }
    }

    fn event(&mut self, event: Event) -> Verdict {
        self.now += 1;
        let verdict = self.scheduler.handle(Millis(self.now), event);
        self.drain();
        self.scheduler.check().unwrap();
        verdict
    }

    fn drain(&mut self) {
        while let Some(output) = self.scheduler.poll_output() {
            self.journal.extend(output.records);
            for effect in output.effects {
                match effect {
                    Effect::Assign { worker, assignment, .. } => {
                        self.inbox.push_back((worker, assignment));
                    }
                    Effect::WriteCheckpoint { version, .. } => {
                        let manifest = artifact(format!("checkpoint {version}"));
                        let event = Event::CheckpointWritten { version, manifest };
                        self.scheduler.handle(Millis(self.now), event);
                    }
                    Effect::Failed(failure) => self.failures.push(failure),
                    _ => {}
                }
            }
        }
    }

    /// Lets the worker at the head of the queue do what it was told; false when nobody is told.
    fn step(&mut self, session: u64) -> bool {
        let Some((worker, assignment)) = self.inbox.pop_front() else { return false };
        let reports = match assignment {
            Assignment::Leave { .. } => {
                self.event(Event::Left { worker, session, reason: "told to".to_owned() });
                return true;
            }
            Assignment::Lease(lease) => {
                *self.sampled.entry(lease.id.unit).or_default() += 1;
                let result = work_of(&lease);
                let outcome = Outcome::Done { result, took: Millis(3) };
                vec![Report::Lease { id: lease.id, outcome }]
            }
            Assignment::Publish(weights) => vec![Report::PublishAck { version: weights.version }],
            Assignment::Rendezvous(r) => {
                let version = PolicyVersion(
                    r.restore.map_or(0, |m| m.key.rsplit('v').next().unwrap().parse().unwrap()),
                );
                self.versions.insert(worker.clone(), version);
                let digest = self.scheduler.state().weights(version).unwrap().digest;
                let mut reports = Vec::new();
                if r.rank == Rank(0) {
                    reports.push(Report::StoreReady { epoch: r.epoch, address: "h:1".to_owned() });
                }
                reports.push(Report::TrainerReady {
                    epoch: r.epoch,
                    rank: r.rank,
                    version,
                    digest,
                });
                reports
            }
            Assignment::Step(step) => {
                let version = self.versions[&worker];
                assert_eq!(version.0, u64::from(step.iteration), "DU-4: steps come in order");
                let after = PolicyVersion(version.0 + u64::from(step.update));
                self.versions.insert(worker.clone(), after);
                let committed = self.scheduler.state().weights(version).map(|w| w.digest);
                let digest = if step.update { digest_after(&step) } else { committed.unwrap() };
                let weights = Weights { version: after, llm: None, dit: None, digest };
                let rank = Rank(u32::from(worker.0.ends_with('1')));
                vec![Report::StepDone(StepDone {
                    epoch: step.epoch,
                    rank,
                    iteration: step.iteration,
                    weights,
                    shards: Vec::new(),
                    metrics: BTreeMap::new(),
                })]
            }
        };
        for report in reports {
            let report = Event::Reported { worker: worker.clone(), session, report };
            assert_eq!(self.event(report), Verdict::Accepted);
        }
        self.event(Event::Polled { worker, session });
        true
    }

    fn run(&mut self, session: u64) {
        while self.step(session) {}
    }
}

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

fn first_lease(world: &mut World) -> (WorkerId, Lease) {
    loop {
        let next = world.inbox.iter().position(|(_, a)| matches!(a, Assignment::Lease(_)));
        if let Some(at) = next {
            let Some((worker, Assignment::Lease(lease))) = world.inbox.remove(at) else { continue };
            return (worker, lease);
        }
        assert!(world.step(1));
    }
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
