//! Scripts of a run, event by event, and one small world that grows whole runs.

mod faults;
mod groups;
mod life;
mod limits;
mod scores;
mod smaller;

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
        extra_prompts: 0,
        world: 2,
        min_world: 0,
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
    /// Whether ranks go on from the newest version, as if one of them held it still.
    peers: bool,
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
            peers: false,
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
                let saved = PolicyVersion(
                    r.restore.map_or(0, |m| m.key.rsplit('v').next().unwrap().parse().unwrap()),
                );
                let held = r.newest.filter(|_| self.peers).map(|held| held.version);
                let version = held.unwrap_or(saved);
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
                let done = Report::StepDone(StepDone {
                    epoch: step.epoch,
                    rank,
                    iteration: step.iteration,
                    weights,
                    metrics: BTreeMap::new(),
                });
                let shard = step.checkpoint.then(|| shard_done(&step, rank.0));
                // In either order, as far as the scheduler is concerned.
                let mut reports: Vec<Report> = [Some(done), shard].into_iter().flatten().collect();
                if rank == Rank(1) {
                    reports.reverse();
                }
                reports
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

fn shard_done(step: &Step, rank: u32) -> Report {
    let version = PolicyVersion(u64::from(step.iteration) + u64::from(step.update));
    Report::ShardDone(ShardDone {
        epoch: step.epoch,
        rank: Rank(rank),
        version,
        shards: vec![artifact(format!("shard {rank} of {version}"))],
    })
}

/// The next lease that somebody is told; everything else is worked off meanwhile.
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
