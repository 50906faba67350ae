//! What is shown of a run besides what the scheduler knows.

use super::pace::Pace;
use super::witness::Taken;
use crate::clock::Clock;
use crate::keeper::metrics;
use duet_core::scheduler::{Effect, Event, IterationLineage, Record, State, StatusView};
use duet_core::{Millis, Role, WorkerId};
use std::collections::BTreeMap;

/// Workers that are remembered, connected ones counted.
const REMEMBERED: usize = 16_384;

/// A worker that was connected and is not any more.
#[derive(Clone, Debug, PartialEq)]
pub struct GoneWorker {
    /// Its name.
    pub id: WorkerId,
    /// What it could do.
    pub role: Role,
    /// How long ago it was heard of.
    pub heard_ago: Millis,
    /// Whether it said goodbye.
    pub left: bool,
}

/// A moment of a run, as it is shown.
#[derive(Clone, Debug, PartialEq)]
pub struct RunStatus {
    /// The run's name.
    pub run: String,
    /// What the scheduler knows.
    pub view: StatusView,
    /// Whether no worker has been seen yet.
    pub starting: bool,
    /// When this coordinator started.
    pub started_at: Millis,
    /// Workers that are gone.
    pub gone: Vec<GoneWorker>,
    /// Failures by kind: attempts since the run began, others since this coordinator started.
    pub failures: BTreeMap<String, u64>,
    /// Leases given out again since this coordinator started.
    pub retries: u64,
    /// Over the last iterations.
    pub images_per_second: f64,
    /// Seconds to the end, estimated.
    pub eta_seconds: Option<f64>,
    /// Mean rewards of the newest committed iteration: `llm`, `dit` and each component.
    pub rewards: BTreeMap<String, f64>,
    /// All numbers of the newest committed iteration.
    pub metrics: BTreeMap<String, f64>,
    /// The newest failure.
    pub last_error: Option<String>,
    /// The newest weights that a rollout worker took.
    pub taken: Option<Taken>,
}

struct Known {
    role: Role,
    heard: Millis,
    left: bool,
}

/// What the driver notes down for those who watch.
pub(super) struct Board {
    run: String,
    clock: Clock,
    known: BTreeMap<WorkerId, Known>,
    /// Failures that are no failed attempts, which the durable state counts.
    others: BTreeMap<String, i64>,
    retries: u64,
    pace: Pace,
    metrics: BTreeMap<String, f64>,
    error: Option<(Millis, String)>,
}

impl Board {
    pub(super) fn new(run: &str, clock: Clock, state: &State) -> Board {
        Board {
            run: run.to_owned(),
            clock,
            known: BTreeMap::new(),
            others: BTreeMap::new(),
            retries: 0,
            pace: Pace::new(clock.now(), state.totals.images, state.version.0),
            metrics: BTreeMap::new(),
            error: None,
        }
    }

    /// Notes who was heard of.
    pub(super) fn note(&mut self, now: Millis, event: &Event) {
        let (worker, role, left) = match event {
            Event::Registered { worker, role, .. } => (worker, Some(*role), false),
            Event::Left { worker, .. } => (worker, None, true),
            Event::Polled { worker, .. }
            | Event::Heartbeat { worker, .. }
            | Event::Reported { worker, .. } => (worker, None, false),
            _ => return,
        };
        match (self.known.get_mut(worker), role) {
            (Some(known), role) => {
                let role = role.filter(|_| known.left).unwrap_or(known.role);
                *known = Known { role, heard: now, left };
            }
            (None, Some(role)) => {
                self.known.insert(worker.clone(), Known { role, heard: now, left });
                self.forget_oldest();
            }
            (None, None) => {}
        }
    }

    fn forget_oldest(&mut self) {
        if self.known.len() > REMEMBERED {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.heard);
            if let Some(id) = oldest.map(|(id, _)| id.clone()) {
                self.known.remove(&id);
            }
        }
    }

    /// Counts what an output says.
    pub(super) fn tally(
        &mut self,
        now: Millis,
        records: &[Record],
        effects: &[Effect],
        state: &State,
    ) {
        for record in records {
            match record {
                Record::Leased { id, .. } if id.attempt.0 > 1 => self.retries += 1,
                Record::AttemptFailed { kind, .. } => {
                    *self.others.entry(kind.clone()).or_default() -= 1;
                }
                Record::StepCommitted { .. } => {
                    self.pace.committed(now, state.totals.images, state.version.0);
                }
                _ => {}
            }
        }
        for effect in effects {
            if let Effect::Failed(failure) = effect {
                *self.others.entry(failure.kind.clone()).or_default() += 1;
            }
        }
    }

    /// A failure outside the scheduler.
    pub(super) fn failed(&mut self, now: Millis, kind: &str, text: String) {
        *self.others.entry(kind.to_owned()).or_default() += 1;
        self.error = Some((now, text));
    }

    /// An iteration is part of the run.
    pub(super) fn committed(&mut self, lineage: &IterationLineage) {
        self.metrics = metrics::row(lineage);
    }

    pub(super) fn show(&self, now: Millis, view: StatusView, taken: Option<Taken>) -> RunStatus {
        let mut failures = view.failures.clone();
        for (kind, count) in &self.others {
            if let Ok(count @ 1..) = u64::try_from(*count) {
                *failures.entry(kind.clone()).or_default() += count;
            }
        }
        let connected: std::collections::BTreeSet<_> = view.workers.iter().map(|w| &w.id).collect();
        let gone = self.known.iter().filter(|(id, _)| !connected.contains(id));
        let gone = gone.map(|(id, known)| GoneWorker {
            id: id.clone(),
            role: known.role,
            heard_ago: now.since(known.heard),
            left: known.left,
        });
        let ours = self.error.as_ref().map(|(at, text)| (now.since(*at), text));
        let theirs = view.last_error.as_ref().map(|(ago, text)| (*ago, text));
        let rewards = match view.rewards.is_empty() {
            true => metrics::rewards(&self.metrics),
            false => view.rewards.clone(),
        };
        RunStatus {
            run: self.run.clone(),
            starting: self.known.is_empty(),
            started_at: self.clock.started(),
            gone: gone.collect(),
            failures,
            retries: self.retries,
            images_per_second: self.pace.images_per_second(now, view.images),
            eta_seconds: self.pace.eta_seconds(now, u64::from(view.iterations)),
            rewards,
            metrics: if self.metrics.is_empty() {
                view.metrics.clone()
            } else {
                self.metrics.clone()
            },
            last_error: ours.into_iter().chain(theirs).min().map(|(_, text)| text.clone()),
            taken,
            view,
        }
    }
}
