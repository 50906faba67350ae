//! The driver, as its handlers see it.

use super::request::{Beat, Polled, Request};
use super::status::RunStatus;
use duet_core::scheduler::{Command, Event, Verdict};
use duet_core::work::{Assignment, Report};
use duet_core::{Digest, Generation, Role, WorkerId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
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

    /// A worker reports and takes what work there is at once: `None` when there is none.
    ///
    /// # Errors
    /// The driver has ended.
    pub async fn exchange(
        &self,
        worker: WorkerId,
        session: u64,
        report: Report,
    ) -> Result<(Verdict, Option<Box<Assignment>>), Gone> {
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        let ((verdict, said), (next, given)) = (oneshot::channel(), oneshot::channel());
        let request = Request::Exchange { worker, session, report, ticket, verdict, next };
        self.to.send(request).await.map_err(|_| Gone)?;
        let said = said.await.map_err(|_| Gone)?;
        // Not sent where the verdict says that the worker does not go on.
        let given = match given.await {
            Ok(Polled::Assigned(assignment)) => Some(assignment),
            Ok(Polled::Nothing | Polled::Unknown) | Err(_) => None,
        };
        Ok((said, given))
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
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        let (reply, mut answer) = oneshot::channel();
        let request = Request::Poll { worker: worker.clone(), session, ticket, reply };
        self.to.send(request).await.map_err(|_| Gone)?;
        let mut hangup = Hangup { to: &self.to, poll: Some((worker, session, ticket)) };
        let answered = match tokio::time::timeout(self.terms.poll, &mut answer).await {
            Ok(answered) => answered,
            Err(_) => {
                // Work may be on its way: let the driver say whether it is.
                if let Some(over) = hangup.take() {
                    self.to.send(over).await.map_err(|_| Gone)?;
                }
                answer.await
            }
        };
        hangup.take();
        answered.map_err(|_| Gone)
    }
}

/// Tells the driver that nobody waits any more, when a handler is dropped in the middle of a poll.
struct Hangup<'a> {
    to: &'a mpsc::Sender<Request>,
    poll: Option<(WorkerId, u64, u64)>,
}

impl Hangup<'_> {
    fn take(&mut self) -> Option<Request> {
        let (worker, session, ticket) = self.poll.take()?;
        Some(Request::PollOver { worker, session, ticket })
    }
}

impl Drop for Hangup<'_> {
    fn drop(&mut self) {
        if let Some(over) = self.take() {
            // With a full inbox this is lost, and the worker's next poll makes good for it.
            drop(self.to.try_send(over));
        }
    }
}
