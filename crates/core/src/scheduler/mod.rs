//! The scheduler: a pure state machine that grows trees, forms trainer groups and commits steps.
//!
//! It has the shape of a protocol state machine: events go in through [`Scheduler::handle`] and
//! [`Scheduler::handle_timeout`], and [`Scheduler::poll_output`] gives back what must be made durable
//! and then done, in that order (RULE 7). It cannot name a socket, a file or a clock.
//!
//! Two kinds of state live here. [`State`] is durable: it changes only by applying [`Record`]s, so
//! the journal rebuilds it (DU-11). The rest (who is connected, who holds which lease, who waits) is
//! rebuilt from what workers say after a restart.

mod api;
mod apply;
mod batch;
mod dispatch;
mod leases;
mod lineage;
mod membership;
mod outcomes;
mod record;
mod restore;
mod saving;
mod state;
mod status;
mod steps;
#[cfg(test)]
mod tests;
mod trainers;
mod workers;

pub use api::{Command, Effect, Event, Failure, FinishReason, Verdict};
pub use batch::{Judged, judge};
pub use lineage::{IterationLineage, TraceLineage, TreeLineage};
pub use record::{Fate, Output, Record};
pub use state::{Committed, Misfit, State, Subtree, Totals, Tree, Tries, iteration_range};
pub use status::{RunState, StatusView, WorkerView};
pub use trainers::SHARD;

use crate::invariants::{self, Violation};
use crate::mutation::Mutation;
use crate::seed::Seed;
use crate::spec::{RunSpec, SpecError};
use crate::work::{PromptRow, Report, Unit};
use crate::{Generation, Millis, PolicyVersion, TreeId, WorkerId};
use leases::Leases;
use saving::Saving;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use trainers::{Group, GroupFailures};
use workers::Workers;

/// Why a scheduler could not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The specification cannot be run.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The journal is not this run's.
    #[error(transparent)]
    Misfit(#[from] Misfit),
}

/// The scheduler of one run.
pub struct Scheduler {
    spec: RunSpec,
    prompts: Arc<[PromptRow]>,
    root: Seed,
    state: State,
    now: Millis,
    workers: Workers,
    leases: Leases,
    group: Group,
    /// Trees of an admitted, uncommitted iteration that are not settled yet.
    unsettled: BTreeMap<u32, u32>,
    /// Whether the leases from before a restart have been taken up.
    adopted: bool,
    /// Trainer groups that came to nothing since the last commit.
    group_failures: GroupFailures,
    /// Since when there are fewer trainers than wanted, but enough to go on.
    short_since: Option<Millis>,
    /// Iterations in a row of which no tree survived.
    barren: BTreeSet<u32>,
    /// Checkpoints whose shards are being written.
    saving: BTreeMap<PolicyVersion, Saving>,
    /// Checkpoints in a row that came to nothing for want of a shard.
    saving_failures: u32,
    /// A manifest is being written for this version.
    writing: Option<PolicyVersion>,
    stopping: bool,
    /// An invariant was broken: nothing is decided any more.
    halted: bool,
    finished: Option<FinishReason>,
    output: Output,
    stale_reports: u64,
    last_error: Option<(Millis, String)>,
    epoch_order: BTreeMap<u64, Vec<usize>>,
}

impl Scheduler {
    /// A scheduler for a new run.
    ///
    /// # Errors
    /// When the specification cannot be run with these prompts.
    pub fn new(
        spec: RunSpec,
        prompts: Arc<[PromptRow]>,
        generation: Generation,
    ) -> Result<Scheduler, RestoreError> {
        Scheduler::restore(spec, prompts, generation, None, [])
    }

    /// A scheduler that goes on where a snapshot and the records after it end.
    ///
    /// # Errors
    /// When the specification cannot be run, or a record does not fit it.
    pub fn restore(
        spec: RunSpec,
        prompts: Arc<[PromptRow]>,
        generation: Generation,
        snapshot: Option<State>,
        records: impl IntoIterator<Item = Record>,
    ) -> Result<Scheduler, RestoreError> {
        spec.check(prompts.len())?;
        let root = spec.root();
        let mut scheduler = Scheduler {
            root,
            prompts,
            state: snapshot.unwrap_or_default(),
            now: Millis(0),
            workers: Workers::default(),
            leases: Leases::default(),
            group: Group::None,
            unsettled: BTreeMap::new(),
            adopted: false,
            group_failures: GroupFailures::default(),
            short_since: None,
            barren: BTreeSet::new(),
            saving: BTreeMap::new(),
            saving_failures: 0,
            writing: None,
            stopping: false,
            halted: false,
            finished: None,
            output: Output::default(),
            stale_reports: 0,
            last_error: None,
            epoch_order: BTreeMap::new(),
            spec,
        };
        for record in records {
            scheduler.apply(&record)?;
        }
        scheduler.stopping = scheduler.state.stopping;
        scheduler.rebuild();
        scheduler.commit(Record::Opened { generation });
        let first = scheduler.state.checkpoint.as_ref().map_or(0, |(version, _)| version.0);
        for iteration in first..scheduler.state.version.0 {
            scheduler.emit_lineage(iteration as u32);
        }
        Ok(scheduler)
    }

    /// The specification.
    pub fn spec(&self) -> &RunSpec {
        &self.spec
    }

    /// The durable state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Why the run ended, once it has.
    pub fn finished(&self) -> Option<&FinishReason> {
        self.finished.as_ref()
    }

    /// The worker names that are still connected.
    pub fn connected(&self) -> usize {
        self.workers.len()
    }

    /// Takes an event at a moment. Outputs must be drained afterwards, also when it was refused.
    pub fn handle(&mut self, now: Millis, event: Event) -> Verdict {
        self.begin(now);
        let verdict = match event {
            Event::Registered { worker, role, session } => self.register(worker, role, session),
            Event::Polled { worker, session } => self.polled(&worker, session),
            Event::PollExpired { worker, session } => {
                self.workers.stop_waiting(&worker, session);
                Verdict::Accepted
            }
            Event::Heartbeat { worker, session } => self.heard(&worker, session),
            Event::Disconnected { worker, session } => self.disconnected(&worker, session),
            Event::Reported { worker, session, report } => self.reported(&worker, session, report),
            Event::Left { worker, session, reason } => self.left(&worker, session, &reason),
            Event::CheckpointWritten { version, manifest } => {
                self.writing = None;
                self.checkpointed(version, manifest)
            }
            Event::CheckpointFailed { version, reason } => {
                self.writing = None;
                self.fail("checkpoint", format!("checkpoint of {version}: {reason}"));
                if self.stopping || version.0 == u64::from(self.spec.iterations) {
                    self.finish(FinishReason::Failed(format!("checkpoint of {version}: {reason}")));
                }
                Verdict::Accepted
            }
            Event::Control(command) => self.control(command),
        };
        self.progress();
        verdict
    }

    /// Takes note of the time: leases, workers and groups whose deadline has passed are given up.
    pub fn handle_timeout(&mut self, now: Millis) {
        self.begin(now);
        self.expire_leases();
        self.expire_workers();
        self.expire_group();
        self.expire_saving();
        self.leases.wake(self.now);
        self.workers.unpark(self.now);
        self.progress();
    }

    /// The last call before the coordinator leaves in order: ends a run that had no time for a
    /// checkpoint (the journal holds what is new), and strikes an operator's wish to stop, which is
    /// fulfilled now: whoever resumes the run wants it to go on.
    pub fn close(&mut self, now: Millis) {
        self.begin(now);
        self.finish(FinishReason::Stopped);
        if self.state.stopping {
            self.commit(Record::Stopping(false));
        }
    }

    fn begin(&mut self, now: Millis) {
        self.now = self.now.max(now);
        if !self.adopted {
            self.adopted = true;
            self.adopt_orphans();
            self.finish_decisions();
        }
    }

    /// When [`Scheduler::handle_timeout`] wants to be called next; a moment that has passed means
    /// at once.
    pub fn poll_timeout(&self) -> Option<Millis> {
        if !self.adopted {
            return Some(Millis(0));
        }
        let leases = self.leases.next_deadline();
        let group = [self.next_group_deadline(), self.next_saving_deadline()];
        [leases, self.next_worker_deadline(), self.next_late()]
            .into_iter()
            .chain(group)
            .flatten()
            .min()
    }

    /// What must be made durable and then done; `None` when there is nothing.
    pub fn poll_output(&mut self) -> Option<Output> {
        let nothing = self.output.records.is_empty() && self.output.effects.is_empty();
        if nothing { None } else { Some(std::mem::take(&mut self.output)) }
    }

    /// Checks the invariants that can be read off the state.
    ///
    /// # Errors
    /// The first violation found.
    pub fn check(&self) -> Result<(), Violation> {
        invariants::check(&self.spec, &self.state)?;
        self.leases.check(&self.state)
    }

    fn reported(&mut self, worker: &WorkerId, session: u64, report: Report) -> Verdict {
        let heard = self.heard(worker, session);
        if heard != Verdict::Accepted {
            return heard;
        }
        let verdict = match report {
            Report::Lease { id, outcome } => self.lease_reported(worker, id, outcome),
            Report::PublishAck { version } => self.published(worker, version),
            Report::PublishFailed { version, reason } => {
                self.fail("publish", format!("{worker} could not take {version}: {reason}"));
                self.publish_failed(worker)
            }
            Report::StoreReady { epoch, address } => self.store_ready(worker, epoch, address),
            Report::TrainerReady { epoch, rank, version, digest } => {
                self.trainer_ready(worker, epoch, rank, version, digest)
            }
            Report::StepDone(done) => self.step_done(worker, done),
            Report::ShardDone(done) => self.shard_done(worker, done),
            Report::TrainerFailed { epoch, rank, kind, reason } => {
                self.trainer_failed(worker, epoch, rank, &kind, &reason)
            }
        };
        if verdict == Verdict::Stale {
            self.stale_reports += 1;
        }
        verdict
    }

    fn control(&mut self, command: Command) -> Verdict {
        match command {
            Command::Pause => self.pause(true),
            Command::Resume => self.pause(false),
            Command::Stop => {
                self.stopping = true;
                if !self.state.stopping && self.finished.is_none() {
                    self.commit(Record::Stopping(true));
                }
            }
            Command::Suspend => self.stopping = true,
            Command::Drain(worker) => return self.drain(&worker),
        }
        Verdict::Accepted
    }

    /// Applies a record and queues it for the journal. A record the scheduler itself made always
    /// fits; if it does not, that is a bug, and the run stops with its name instead of going wrong.
    fn commit(&mut self, record: Record) {
        if self.halted {
            return;
        }
        if let Err(misfit) = self.apply(&record) {
            self.halt(misfit.to_string());
            return;
        }
        if Mutation::SkipRecord.on() && matches!(record, Record::AttemptFailed { .. }) {
            return;
        }
        self.output.records.push(record);
    }

    /// Stops everything: an invariant is broken, and nothing may build on that.
    fn halt(&mut self, text: String) {
        if !self.halted {
            self.halted = true;
            self.fail("invariant", text.clone());
            self.finish(FinishReason::Failed(text));
        }
    }

    fn apply(&mut self, record: &Record) -> Result<(), Misfit> {
        let rows = match record {
            Record::Admitted { iteration } => self.rows(*iteration),
            Record::Extended { iteration, trees } => self.extra_rows(*iteration, *trees),
            _ => Vec::new(),
        };
        self.state.apply(&self.spec, &rows, record)
    }

    /// Moves everything that can move: admission, steps, leases, farewells.
    fn progress(&mut self) {
        if self.finished.is_none() && self.is_complete() {
            self.finish(FinishReason::Completed);
        }
        if self.finished.is_none() {
            self.admit();
            self.write_checkpoint();
            self.drive_trainers();
        }
        if self.finished.is_none() {
            self.dispatch();
        }
        if self.finished.is_some() {
            self.dismiss_all();
        }
    }

    /// Whether all iterations are committed and checkpointed: nothing is left to do for anybody.
    fn is_complete(&self) -> bool {
        let last = PolicyVersion(u64::from(self.spec.iterations));
        self.state.checkpoint.as_ref().is_some_and(|(version, _)| *version >= last)
    }

    /// Admits iterations up to the lag: at most L + 1 beyond the committed version.
    fn admit(&mut self) {
        let open = self.state.version.0 + u64::from(self.spec.lag) + 1;
        let last = open.min(u64::from(self.spec.iterations));
        while !self.state.paused && !self.stopping && u64::from(self.state.admitted) < last {
            let iteration = self.state.admitted;
            self.commit(Record::Admitted { iteration });
            self.open_trees(iteration, self.state.trees_of(iteration));
        }
    }

    /// Makes the last `trees` trees of an iteration ready for thinking.
    fn open_trees(&mut self, iteration: u32, trees: u32) {
        *self.unsettled.entry(iteration).or_default() += trees;
        let end = self.state.trees_of(iteration);
        for index in end.saturating_sub(trees)..end {
            self.leases.ready(Unit::Think(TreeId { iteration, index }));
        }
    }

    /// The version an iteration is sampled with (DU-3).
    fn sampling_version(&self, iteration: u32) -> PolicyVersion {
        if Mutation::SampleAhead.on() {
            return self.state.version;
        }
        State::sampled_with(&self.spec, iteration)
    }

    fn fail(&mut self, kind: &str, text: String) {
        self.last_error = Some((self.now, text.clone()));
        let failure = Failure { kind: kind.to_owned(), text };
        self.output.effects.push(Effect::Failed(failure));
    }

    fn finish(&mut self, reason: FinishReason) {
        if self.finished.is_some() {
            return;
        }
        if matches!(self.group, Group::Forming { .. } | Group::Stepping { .. }) {
            // Its ranks may be waiting for one another.
            let (epoch, workers) = (self.state.epoch, self.group.members().to_vec());
            let reason = "the run is over".to_owned();
            self.output.effects.push(Effect::AbortTrainers { epoch, workers, reason });
            self.group = Group::None;
        }
        self.finished = Some(reason.clone());
        self.output.effects.push(Effect::Finished(reason));
    }
}
