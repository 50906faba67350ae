//! What the driver tells Prometheus and an OpenTelemetry collector of what it sees go by.
//!
//! Everything here is volatile: after a restart, what began before it has no beginning, and is left
//! out of the histograms and traces.

use duet_core::scheduler::{Effect, Event, Fate, Record, State, Verdict};
use duet_core::work::{Assignment, LeaseId, Outcome, Report, Unit, Weights};
use duet_core::{Attempt, Millis, PolicyVersion, TrainerEpoch, TreeId, WorkerId};
use duet_service::metrics::{Metrics, table};
use duet_service::traces::{Point, Span, Traces};
use std::collections::BTreeMap;
use std::time::Duration;

/// Sees everything and changes nothing.
pub struct Witness {
    metrics: Metrics,
    traces: Traces,
    leases: BTreeMap<LeaseId, Millis>,
    /// Leases that are out, by stage.
    out: BTreeMap<&'static str, i64>,
    admitted: BTreeMap<u32, Millis>,
    step: Option<Stepping>,
    publication: Option<Publication>,
    /// Weights that a worker was told of, and how many bytes they have.
    told: BTreeMap<WorkerId, (PolicyVersion, Millis, u64)>,
    /// The newest version that a worker took.
    taken: Option<Taken>,
    checkpoint: Option<(PolicyVersion, Millis, u64)>,
}

/// Weights that rollout workers have taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Taken {
    /// Their version.
    pub version: PolicyVersion,
    /// Bytes of their files.
    pub bytes: u64,
    /// Seconds from telling a worker to its word, the slowest one.
    pub seconds: f64,
}

struct Stepping {
    iteration: u32,
    epoch: TrainerEpoch,
    since: Millis,
}

/// A committed version on its way to the rollout workers.
struct Publication {
    version: PolicyVersion,
    since: Millis,
    bytes: u64,
    /// The trees that led to it, and when each was admitted.
    trees: Vec<(TreeId, Millis)>,
}

/// Whether a witness wants to be told of an event besides what the scheduler makes of it.
pub(super) fn notices(event: &Event) -> bool {
    match event {
        Event::CheckpointWritten { .. } | Event::CheckpointFailed { .. } => true,
        Event::Reported { report, .. } => matches!(
            report,
            Report::PublishAck { .. }
                | Report::PublishFailed { .. }
                | Report::Lease { outcome: Outcome::HandedBack, .. }
        ),
        _ => false,
    }
}

impl Witness {
    /// One that has seen nothing yet.
    pub fn new(metrics: Metrics, traces: Traces) -> Witness {
        Witness {
            metrics,
            traces,
            leases: BTreeMap::new(),
            out: BTreeMap::new(),
            admitted: BTreeMap::new(),
            step: None,
            publication: None,
            told: BTreeMap::new(),
            taken: None,
            checkpoint: None,
        }
    }

    /// A batch of records is durable.
    pub(super) fn appended(&self, records: usize, took: Duration) {
        self.metrics.observe(&table::JOURNAL_SECONDS, &[], took);
        self.metrics.add(&table::JOURNAL_RECORDS, &[], records as f64);
    }

    /// Something happened, and the scheduler said what it thinks of it.
    pub(super) fn event(&mut self, now: Millis, event: &Event, verdict: &Verdict) {
        if *verdict != Verdict::Accepted {
            return;
        }
        match event {
            Event::Reported { worker, report, .. } => self.report(now, worker, report),
            Event::CheckpointWritten { version, .. } => {
                let begun = self.checkpoint.take_if(|(begun, ..)| begun == version);
                if let Some((_, since, bytes)) = begun {
                    self.metrics.observe(&table::CHECKPOINT_SECONDS, &[], span(since, now));
                    self.metrics.set(&table::CHECKPOINT_BYTES, &[], bytes as f64);
                    self.metrics.set(&table::CHECKPOINT_TIME, &[], super::seconds(now));
                }
            }
            Event::CheckpointFailed { .. } => {
                self.checkpoint = None;
                self.metrics.add(&table::CHECKPOINT_FAILURES, &[], 1.0);
            }
            _ => {}
        }
    }

    fn report(&mut self, now: Millis, worker: &WorkerId, report: &Report) {
        match report {
            Report::Lease { id, outcome: Outcome::HandedBack } => drop(self.ended(*id)),
            Report::PublishAck { version } => {
                let told = self.told.remove(worker).filter(|(told, ..)| told == version);
                if let Some((version, since, bytes)) = told {
                    self.took(version, bytes, span(since, now).as_secs_f64());
                    self.metrics.observe(&table::PUBLISH_SECONDS, &[], span(since, now));
                    self.metrics.add(&table::PUBLISH_BYTES, &[], bytes as f64);
                }
            }
            Report::PublishFailed { .. } => {
                self.told.remove(worker);
                self.metrics.add(&table::PUBLISH_FAILURES, &[], 1.0);
            }
            _ => {}
        }
    }

    fn took(&mut self, version: PolicyVersion, bytes: u64, seconds: f64) {
        match &mut self.taken {
            Some(taken) if taken.version > version => {}
            Some(taken) if taken.version == version => taken.seconds = taken.seconds.max(seconds),
            taken => *taken = Some(Taken { version, bytes, seconds }),
        }
    }

    /// The newest version that a worker took since this coordinator started.
    pub(super) fn taken(&self) -> Option<Taken> {
        self.taken
    }

    /// The scheduler decided something; `state` is what came of it.
    pub(super) fn decided(
        &mut self,
        now: Millis,
        records: &[Record],
        effects: &[Effect],
        state: &State,
    ) {
        for record in records {
            self.record(now, record, state);
        }
        for effect in effects {
            match effect {
                Effect::Assign { worker, assignment, .. } => self.assigned(now, worker, assignment),
                Effect::WriteCheckpoint { version, shards, .. } => {
                    let bytes = shards.iter().flatten().map(|shard| shard.bytes).sum();
                    self.checkpoint = Some((*version, now, bytes));
                }
                Effect::Finished(_) => self.published(now),
                _ => {}
            }
        }
    }

    fn record(&mut self, now: Millis, record: &Record, state: &State) {
        match record {
            Record::Admitted { iteration } => drop(self.admitted.insert(*iteration, now)),
            Record::Leased { id, .. } => {
                self.forget(id.unit);
                self.leases.insert(*id, now);
                self.count(id.unit, 1);
                self.metrics.add(&table::LEASES_GRANTED, &[id.unit.stage()], 1.0);
            }
            Record::Completed { id, worker, .. } => {
                let Some(since) = self.ended(*id) else { return };
                let stage = id.unit.stage();
                self.metrics.observe(&table::LEASE_SECONDS, &[stage], span(since, now));
                if self.traces.is_on() {
                    self.traces.send(lease(*id, worker, since, now));
                }
            }
            Record::AttemptFailed { id, worker, kind, reason, lost } => {
                if *lost {
                    self.metrics.add(&table::LEASES_EXPIRED, &[id.unit.stage()], 1.0);
                }
                if let Some(since) = self.ended(*id) {
                    let failed = format!("{kind}: {reason}");
                    self.traces.send(lease(*id, worker, since, now).failed(Some(&failed)));
                }
            }
            Record::GivenUp { tree, reason } => {
                let units: Vec<Unit> =
                    self.leases.keys().map(|id| id.unit).filter(|u| u.tree() == *tree).collect();
                units.into_iter().for_each(|unit| self.forget(unit));
                if let Some(since) = self.admitted.get(&tree.iteration) {
                    let span = Span::between(Point::Tree(*tree), *since, now);
                    self.traces.send(span.with("duet.fate", "failed").failed(Some(reason)));
                }
            }
            Record::StepCommitted { iteration, weights, .. } => {
                self.committed(now, *iteration, weights, state);
            }
            _ => {}
        }
    }

    fn assigned(&mut self, now: Millis, worker: &WorkerId, assignment: &Assignment) {
        match assignment {
            Assignment::Step(step) if step.update => {
                let (iteration, epoch) = (step.iteration, step.epoch);
                let known = self.step.as_ref();
                if known.is_none_or(|s| (s.iteration, s.epoch) != (iteration, epoch)) {
                    self.step = Some(Stepping { iteration, epoch, since: now });
                }
            }
            Assignment::Publish(weights) => {
                self.told.insert(worker.clone(), (weights.version, now, bytes(weights)));
            }
            _ => {}
        }
    }

    fn committed(&mut self, now: Millis, iteration: u32, weights: &Weights, state: &State) {
        self.published(now);
        let admitted = self.admitted.remove(&iteration);
        self.admitted = self.admitted.split_off(&iteration);
        let range = TreeId { iteration, index: 0 }..=TreeId { iteration, index: u32::MAX };
        let trees = state.trees.range(range).map(|(id, tree)| (*id, tree.fate.clone()));
        let trees: Vec<(TreeId, Option<Fate>)> = trees.collect();
        let step = self.step.take().filter(|step| step.iteration == iteration);
        let trained = |fate: &Option<Fate>| matches!(fate, Some(Fate::Trained));
        if let Some(Stepping { epoch, since, .. }) = &step {
            self.metrics.observe(&table::STEP_SECONDS, &[], span(*since, now));
            let point = Point::Step(iteration, *epoch);
            let trained: Vec<TreeId> =
                trees.iter().filter(|(_, fate)| trained(fate)).map(|(id, _)| *id).collect();
            let links = trained.iter().map(|id| Point::Train(*id));
            let step = Span::between(point.clone(), *since, now).linked(links);
            self.traces.send(step.with("duet.iteration", iteration));
            for tree in trained {
                let train = Span::between(Point::Train(tree), *since, now);
                self.traces.send(train.linked([point.clone()]));
            }
        }
        let Some(since) = admitted else { return };
        for (tree, _) in trees.iter().filter(|(_, fate)| matches!(fate, Some(Fate::ZeroSpread))) {
            let span = Span::between(Point::Tree(*tree), since, now);
            self.traces.send(span.with("duet.fate", "zero-spread"));
        }
        let trees = trees.into_iter().filter(|(_, fate)| trained(fate));
        self.publication = Some(Publication {
            version: weights.version,
            since: now,
            bytes: bytes(weights),
            trees: trees.map(|(id, _)| (id, since)).collect(),
        });
    }

    /// The version whose way to the workers is being watched.
    pub(super) fn publishing(&self) -> Option<PolicyVersion> {
        self.publication.as_ref().map(|publication| publication.version)
    }

    /// Every rollout worker holds the newest version, or it is overtaken by the next.
    pub(super) fn published(&mut self, now: Millis) {
        let Some(Publication { version, since, bytes, trees }) = self.publication.take() else {
            return;
        };
        let point = Point::Publication(version);
        let links = trees.iter().map(|(tree, _)| Point::Publish(*tree));
        let span = Span::between(point.clone(), since, now).linked(links);
        self.traces.send(span.with("duet.version", version.0).with("duet.bytes", bytes));
        for (tree, admitted) in trees {
            let publish = Span::between(Point::Publish(tree), since, now);
            self.traces.send(publish.linked([point.clone()]));
            let whole = Span::between(Point::Tree(tree), admitted, now);
            self.traces.send(whole.with("duet.fate", "trained"));
        }
    }

    fn ended(&mut self, id: LeaseId) -> Option<Millis> {
        let since = self.leases.remove(&id)?;
        self.count(id.unit, -1);
        Some(since)
    }

    /// Ends what is known of any attempt at a unit.
    fn forget(&mut self, unit: Unit) {
        let any =
            LeaseId { unit, attempt: Attempt(0) }..=LeaseId { unit, attempt: Attempt(u32::MAX) };
        let known: Vec<LeaseId> = self.leases.range(any).map(|(id, _)| *id).collect();
        for id in known {
            self.ended(id);
        }
    }

    fn count(&mut self, unit: Unit, by: i64) {
        let out = self.out.entry(unit.stage()).or_default();
        *out += by;
        self.metrics.set(&table::LEASES, &[unit.stage()], *out as f64);
    }
}

fn lease(id: LeaseId, worker: &WorkerId, since: Millis, now: Millis) -> Span {
    Span::between(Point::Lease(id), since, now)
        .with("duet.worker", &worker.0)
        .with("duet.unit", id.unit.place())
        .with("duet.attempt", id.attempt.0)
}

fn bytes(weights: &Weights) -> u64 {
    [&weights.llm, &weights.dit].into_iter().flatten().map(|file| file.bytes).sum()
}

fn span(since: Millis, now: Millis) -> Duration {
    Duration::from_millis(now.since(since).0)
}
