//! The driver: one task that owns the scheduler and the journal.
//!
//! Each turn takes all waiting requests, makes the records they caused durable in one append (group
//! commit), and only then carries out effects and answers (RULE 7). A reply that is dropped unsent
//! tells its handler that the coordinator is going.

mod effects;
mod ending;
mod handle;
mod pace;
mod request;
mod status;
mod waiting;
mod witness;

pub use handle::{Gone, Handle, Held, Next, Terms};
pub use request::{Beat, Polled};
pub use status::{GoneWorker, RunStatus};
pub use witness::{Taken, Witness};

use crate::clock::Clock;
use crate::codec;
use crate::error::CoordinatorError;
use crate::keeper::{Job, Kept};
use duet_core::scheduler::{
    Command, Effect, Event, FinishReason, Output, Record, Scheduler, Verdict,
};
use duet_core::{Millis, TrainerEpoch, WorkerId};
use duet_store::Journal;
use duet_store::journal::{MAX_RECORDS, MAX_SEGMENT};
use ending::Ending;
use request::Request;
use status::Board;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use waiting::Waiting;

/// Requests that wait for the driver; more of them wait in their handlers.
const INBOX: usize = 4096;
/// Requests of one turn.
const TURN: usize = 4096;
/// How often in a turn the network is looked at again for more of them.
const ROUNDS: usize = 8;
/// Records after which the state may be kept whole, so that a restart reads few segments. It is when they
/// have as many bytes as the state had last time: so a restart reads at most twice the state, and
/// keeping a large one costs no more than writing the records.
const RECORDS_PER_SNAPSHOT: usize = 8192;

/// The driver's end of the lines to the keeper.
pub struct KeeperLine {
    /// Jobs for it.
    pub jobs: mpsc::Sender<Job>,
    /// What became of them.
    pub kept: mpsc::UnboundedReceiver<Kept>,
}

/// How long endings may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From the wish to stop to the end without a checkpoint.
    pub stop: Duration,
    /// For workers to ask and be sent home.
    pub farewell: Duration,
}

/// Owns the run.
pub struct Driver {
    scheduler: Scheduler,
    journal: Journal,
    clock: Clock,
    inbox: mpsc::Receiver<Request>,
    keeper: KeeperLine,
    shutdown: CancellationToken,
    /// Tells watchers that something changed.
    changed: watch::Sender<u64>,
    waiting: Waiting,
    /// The newest trainer group that is over, for whoever may still be in it.
    aborted: BTreeMap<WorkerId, TrainerEpoch>,
    board: Board,
    witness: Witness,
    ending: Ending,
    since_snapshot: Written,
    /// Bytes of the newest snapshot.
    snapshot_bytes: usize,
    keep_journal: bool,
    /// What the requests of this turn have caused so far.
    turn: Turn,
}

/// What lies in the journal after the newest snapshot.
#[derive(Default)]
struct Written {
    records: usize,
    bytes: usize,
}

/// Collected over a turn, carried out after the append.
#[derive(Default)]
struct Turn {
    records: Vec<Record>,
    effects: Vec<Effect>,
    answers: Vec<(oneshot::Sender<Verdict>, Verdict)>,
    /// Polls that ran out.
    over: Vec<(WorkerId, u64)>,
}

impl Driver {
    /// A driver and the handle for everybody else.
    pub fn new(
        scheduler: Scheduler,
        journal: Journal,
        terms: Terms,
        keeper: KeeperLine,
        patience: Patience,
        witness: Witness,
        shutdown: CancellationToken,
    ) -> (Driver, Handle) {
        let (to, inbox) = mpsc::channel(INBOX);
        let (changed, changes) = watch::channel(0);
        let clock = Clock::start();
        let mut ending = Ending::new(patience);
        if scheduler.state().stopping {
            ending.stop(clock.now());
        }
        let driver = Driver {
            board: Board::new(&terms.run, clock, scheduler.state()),
            witness,
            scheduler,
            journal,
            clock,
            inbox,
            keeper,
            shutdown,
            changed,
            waiting: Waiting::default(),
            aborted: BTreeMap::new(),
            ending,
            since_snapshot: Written::default(),
            snapshot_bytes: 0,
            keep_journal: terms.keep_journal,
            turn: Turn::default(),
        };
        (driver, Handle::new(to, changes, terms))
    }

    /// Drives the run to its end.
    ///
    /// # Errors
    /// The journal failed or was taken over: what was not acknowledged did not happen.
    pub async fn run(mut self) -> Result<FinishReason, CoordinatorError> {
        self.collect();
        loop {
            self.commit().await?;
            if let Some(reason) = self.ending.over(self.clock.now(), &self.scheduler) {
                self.scheduler.close(self.clock.now());
                self.collect();
                self.commit().await?;
                return Ok(reason);
            }
            self.wait().await;
        }
    }

    /// Waits for something to happen and takes all that has happened meanwhile.
    async fn wait(&mut self) {
        let due = [self.scheduler.poll_timeout(), self.ending.deadline()].into_iter().flatten();
        let due = due.min().map(|at| self.clock.instant(at));
        let asked = self.ending.is_stopping();
        tokio::select! {
            Some(request) = self.inbox.recv() => self.take(request),
            Some(kept) = self.keeper.kept.recv() => self.kept(kept),
            () = self.shutdown.cancelled(), if !asked => self.stop("told to stop"),
            () = sleep_until(due) => {}
        }
        self.take_all().await;
        // After the requests: a heartbeat that waited in the queue is a sign of life.
        let now = self.clock.now();
        if self.scheduler.poll_timeout().is_some_and(|at| at <= now) {
            self.scheduler.handle_timeout(now);
            self.collect();
        }
    }

    /// Takes what waits, and then what came meanwhile, so that it is all written together.
    async fn take_all(&mut self) {
        let mut room = TURN;
        for _ in 0..ROUNDS {
            let before = room;
            while room > 0
                && let Ok(request) = self.inbox.try_recv()
            {
                self.take(request);
                room -= 1;
            }
            if room == before {
                return;
            }
            // Lets those who read from the network hand over what has come.
            tokio::task::yield_now().await;
        }
    }

    fn take(&mut self, request: Request) {
        match request {
            Request::Event { event, reply } => {
                let verdict = self.handle(event);
                self.turn.answers.push((reply, verdict));
            }
            Request::Poll { worker, session, ticket, reply } => {
                let verdict = self.handle(Event::Polled { worker: worker.clone(), session });
                match verdict {
                    Verdict::Unknown => drop(reply.send(Polled::Unknown)),
                    _ => self.waiting.wait(worker, session, ticket, reply),
                }
            }
            Request::Exchange { worker, session, report, ticket, verdict, next } => {
                let event = Event::Reported { worker: worker.clone(), session, report };
                let said = self.handle(event);
                let goes_on = !matches!(said, Verdict::Unknown | Verdict::Refused(_));
                self.turn.answers.push((verdict, said));
                if goes_on {
                    self.handle(Event::Polled { worker: worker.clone(), session });
                    self.waiting.wait(worker, session, ticket, next);
                }
            }
            Request::PollOver { worker, session, ticket } => {
                self.poll_over(worker, session, ticket);
            }
            Request::Heartbeat { worker, session, reply } => {
                let known = { self.handle(Event::Heartbeat { worker: worker.clone(), session }) }
                    != Verdict::Unknown;
                let aborted = self.aborted.get(&worker).copied();
                let _ = reply.send(Beat { known, aborted });
            }
            Request::Status { reply } => drop(reply.send(Box::new(self.status()))),
        }
    }

    /// Nobody waits for that poll's answer any more.
    fn poll_over(&mut self, worker: WorkerId, session: u64, ticket: u64) {
        if self.waiting.holds(&worker, ticket) {
            self.handle(Event::PollExpired { worker: worker.clone(), session });
            self.turn.over.push((worker, ticket));
        }
    }

    fn handle(&mut self, event: Event) -> Verdict {
        let now = self.clock.now();
        self.board.note(now, &event);
        let stop = matches!(event, Event::Control(Command::Stop | Command::Suspend));
        let joined = match &event {
            Event::Registered { worker, .. } => Some(worker.clone()),
            _ => None,
        };
        let noted = witness::notices(&event).then(|| event.clone());
        let verdict = self.scheduler.handle(now, event);
        if let Some(noted) = noted {
            self.witness.event(now, &noted, &verdict);
            self.published(now);
        }
        if let Some(worker) = joined.filter(|_| verdict == Verdict::Accepted) {
            // A process that is new here belongs to no group: whatever it thinks it is in is over.
            self.aborted.insert(worker, self.scheduler.state().epoch);
        }
        if stop {
            self.ending.stop(now);
        }
        self.collect();
        verdict
    }

    /// Notes it when every rollout worker holds the newest version.
    fn published(&mut self, now: Millis) {
        if self.witness.publishing().is_some_and(|newest| self.scheduler.is_published(newest)) {
            self.witness.published(now);
        }
    }

    fn stop(&mut self, why: &str) {
        tracing::info!(why, "stopping: a checkpoint first, then everybody goes home");
        self.handle(Event::Control(Command::Suspend));
    }

    fn kept(&mut self, kept: Kept) {
        match kept {
            Kept::Event(event) => drop(self.handle(event)),
            Kept::Failure { kind, text } => {
                tracing::warn!(kind, text, "failed");
                self.board.failed(self.clock.now(), kind, text);
            }
        }
    }

    /// Moves what the scheduler has to say into the turn.
    fn collect(&mut self) {
        while let Some(Output { records, effects }) = self.scheduler.poll_output() {
            let (now, state) = (self.clock.now(), self.scheduler.state());
            self.board.tally(now, &records, &effects, state);
            self.witness.decided(now, &records, &effects, state);
            self.turn.records.extend(records);
            self.turn.effects.extend(effects);
        }
    }

    /// Makes the turn durable, then carries it out.
    async fn commit(&mut self) -> Result<(), CoordinatorError> {
        let turn = std::mem::take(&mut self.turn);
        let encoded: Vec<Vec<u8>> =
            turn.records.iter().map(codec::encode_record).collect::<Result<_, _>>()?;
        for batch in batches(&encoded) {
            let started = Instant::now();
            self.journal.append(batch).await?;
            self.witness.appended(batch.len(), started.elapsed());
        }
        self.carry_out(turn.effects).await;
        self.waiting.over(turn.over);
        turn.answers.into_iter().for_each(|(reply, verdict)| drop(reply.send(verdict)));
        let written = &mut self.since_snapshot;
        written.records += encoded.len();
        written.bytes += encoded.iter().map(Vec::len).sum::<usize>();
        let due = written.records >= RECORDS_PER_SNAPSHOT && written.bytes >= self.snapshot_bytes;
        if due || turn.records.iter().any(|r| matches!(r, Record::Checkpointed { .. })) {
            self.snapshot().await;
        }
        self.changed.send_modify(|count| *count += 1);
        Ok(())
    }

    /// Keeps the state whole, so that the segments before it need not be read again. A failure here
    /// loses nothing: the segments are still there.
    async fn snapshot(&mut self) {
        self.since_snapshot = Written::default();
        if let Err(error) = self.shorten_journal().await {
            tracing::warn!(%error, "the journal could not be shortened");
            self.board.failed(self.clock.now(), "journal", error.to_string());
        }
    }

    async fn shorten_journal(&mut self) -> Result<(), CoordinatorError> {
        let state = codec::encode_state(self.scheduler.state())?;
        self.snapshot_bytes = state.len();
        self.journal.snapshot(&state).await?;
        if !self.keep_journal {
            self.journal.collect().await?;
        }
        Ok(())
    }

    fn status(&self) -> RunStatus {
        let now = self.clock.now();
        self.board.show(now, self.scheduler.status(now), self.witness.taken())
    }
}

async fn sleep_until(due: Option<tokio::time::Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Cuts records into what fits a segment each. They need not be durable together: effects follow the
/// last one.
fn batches(records: &[Vec<u8>]) -> Vec<&[Vec<u8>]> {
    /// Half of what a segment may hold, so that its own bytes need not be counted here.
    const BYTES: usize = MAX_SEGMENT / 2;
    let (mut batches, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (i, record) in records.iter().enumerate() {
        if i > start && (bytes + record.len() > BYTES || i - start >= MAX_RECORDS) {
            batches.push(&records[start..i]);
            (start, bytes) = (i, 0);
        }
        bytes += record.len();
    }
    if start < records.len() {
        batches.push(&records[start..]);
    }
    batches
}

/// A span in seconds.
fn seconds(span: Millis) -> f64 {
    span.0 as f64 / 1000.0
}
