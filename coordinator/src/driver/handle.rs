//! The driver, as its handlers see it.

use super::request::{Beat, Polled, Request};
use super::status::RunStatus;
use duet_core::scheduler::{Command, Event, Verdict};
use duet_core::work::{Assignment, Report};
use duet_core::{Digest, Generation, Role, WorkerId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{mpsc, oneshot, watch};

/// What every worker is told when it registers.
#[derive(Clone, Debug)]
pub struct Terms {
    /// The run's name.
    pub run: String,
    /// Hash over the configuration that decides results.
    pub config: Digest,
    /// This coordinator's incarnation.
    pub generation: Generation,
    /// Between two heartbeats.
    pub heartbeat: Duration,
    /// A poll is answered with nothing after this.
    pub poll: Duration,
    /// Whether the journal keeps segments that no restart needs.
    pub keep_journal: bool,
}

/// The driver has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the coordinator is going away")]
pub struct Gone;

/// Talks to the driver. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    to: mpsc::Sender<Request>,
    changes: watch::Receiver<u64>,
    terms: Arc<Terms>,
    tickets: Arc<AtomicU64>,
}

impl Handle {
    pub(super) fn new(
        to: mpsc::Sender<Request>,
        changes: watch::Receiver<u64>,
        terms: Terms,
    ) -> Handle {
        Handle { to, changes, terms: Arc::new(terms), tickets: Arc::default() }
    }

    /// What workers are told.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Changes whenever the run does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, Gone> {
        let (reply, answer) = oneshot::channel();
        self.to.send(request(reply)).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }

    async fn event(&self, event: Event) -> Result<Verdict, Gone> {
        self.ask(|reply| Request::Event { event, reply }).await
    }

    /// A worker introduces itself.
    ///
    /// # Errors
    /// The driver has ended; so for all calls.
    pub async fn register(
        &self,
        worker: WorkerId,
        role: Role,
        session: u64,
    ) -> Result<Verdict, Gone> {
        self.event(Event::Registered { worker, role, session }).await
    }

    /// A worker reports.
    ///
    /// # Errors
    /// The driver has ended.
    pub async fn report(
        &self,
        worker: WorkerId,
        session: u64,
        report: Report,
    ) -> Result<Verdict, Gone> {
        self.event(Event::Reported { worker, session, report }).await
    }

    /// A worker reports and asks for work.
    ///
    /// # Errors
    /// The driver has ended.
    pub async fn exchange(
        &self,
        worker: WorkerId,
        session: u64,
        report: Report,
    ) -> Result<(Verdict, Next), Gone> {
        let (next, poll) = self.held(worker.clone(), session);
        let (verdict, said) = oneshot::channel();
        let ticket = poll.ticket;
        let request = Request::Exchange { worker, session, report, ticket, verdict, next };
        self.to.send(request).await.map_err(|_| Gone)?;
        Ok((said.await.map_err(|_| Gone)?, poll.next()))
    }

    /// A poll that is about to be asked.
    fn held(&self, worker: WorkerId, session: u64) -> (oneshot::Sender<Polled>, Held) {
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        let (to, limit) = (self.to.clone(), self.terms.poll);
        (reply, Held { to, limit, worker, session, ticket, answer, over: false })
    }

    /// A worker's connection closed. Best effort: with a full inbox the heartbeats tell.
    pub fn disconnected(&self, worker: WorkerId, session: u64) {
        let (reply, _) = oneshot::channel();
        let event = Event::Disconnected { worker, session };
        drop(self.to.try_send(Request::Event { event, reply }));
    }

    /// A worker goes.
    ///
    /// # Errors
    /// The driver has ended.
    pub async fn leave(
        &self,
        worker: WorkerId,
        session: u64,
        reason: String,
    ) -> Result<Verdict, Gone> {
        self.event(Event::Left { worker, session, reason }).await
    }

    /// An operator wants something.
    ///
    /// # Errors
    /// The driver has ended.
    pub async fn control(&self, command: Command) -> Result<Verdict, Gone> {
        self.event(Event::Control(command)).await
    }

    /// A worker lives.
    ///
    /// # Errors
    /// The driver has ended.
    pub async fn heartbeat(&self, worker: WorkerId, session: u64) -> Result<Beat, Gone> {
        self.ask(|reply| Request::Heartbeat { worker, session, reply }).await
    }

    /// What the run is doing.
    ///
    /// # Errors
    /// The driver has ended.
    pub async fn status(&self) -> Result<RunStatus, Gone> {
        self.ask(|reply| Request::Status { reply }).await.map(|status| *status)
    }

    /// A worker asks for work; waits for it up to the agreed time. When the caller stops waiting, the
    /// driver is told.
    ///
    /// # Errors
    /// The driver has ended.
    pub async fn poll(&self, worker: WorkerId, session: u64) -> Result<Polled, Gone> {
        let (reply, poll) = self.held(worker.clone(), session);
        let request = Request::Poll { worker, session, ticket: poll.ticket, reply };
        self.to.send(request).await.map_err(|_| Gone)?;
        poll.wait().await
    }
}

/// What there is to do for a worker that has reported.
pub enum Next {
    /// This.
    Given(Box<Assignment>),
    /// Nothing yet.
    Later(Held),
    /// It does not go on, or has asked again meanwhile.
    Nothing,
}

/// A poll that the driver holds. It is told when nobody waits any more.
pub struct Held {
    to: mpsc::Sender<Request>,
    limit: Duration,
    worker: WorkerId,
    session: u64,
    ticket: u64,
    answer: oneshot::Receiver<Polled>,
    /// It is answered.
    over: bool,
}

impl Held {
    /// Waits for work up to the agreed time.
    ///
    /// # Errors
    /// The driver has ended.
    pub async fn wait(mut self) -> Result<Polled, Gone> {
        let answered = match tokio::time::timeout(self.limit, &mut self.answer).await {
            Ok(answered) => answered,
            Err(_) => {
                // Work may be on its way: let the driver say whether it is.
                self.to.send(self.hangup()).await.map_err(|_| Gone)?;
                (&mut self.answer).await
            }
        };
        self.over = true;
        answered.map_err(|_| Gone)
    }

    /// What is there now.
    fn next(mut self) -> Next {
        let answered = self.answer.try_recv();
        self.over = !matches!(answered, Err(TryRecvError::Empty));
        match answered {
            Ok(Polled::Assigned(assignment)) => Next::Given(assignment),
            Ok(Polled::Nothing | Polled::Unknown) | Err(TryRecvError::Closed) => Next::Nothing,
            Err(TryRecvError::Empty) => Next::Later(self),
        }
    }

    fn hangup(&self) -> Request {
        let (worker, session, ticket) = (self.worker.clone(), self.session, self.ticket);
        Request::PollOver { worker, session, ticket }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.over {
            // With a full inbox this is lost, and the worker's next poll makes good for it.
            drop(self.to.try_send(self.hangup()));
        }
    }
}
