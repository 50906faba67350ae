//! A worker's session with the coordinator: registered, heard of, and reconnected by itself.

mod error;
mod exchange;
mod heartbeat;
mod link;
mod retry;

pub use error::SessionError;
pub use link::Connection;

use crate::access;
use crate::channel::endpoint;
use crate::observe::Observer;
use crate::tls::TlsFiles;
use duet_config::Config;
use duet_core::work::{Assignment, Report};
use duet_core::{Digest, Generation, Role, TrainerEpoch, WorkerId};
use duet_proto::v1 as wire;
use link::{Known, Link, POLL_SLACK};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Response, Status};

/// What a worker says of itself.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// The coordinator's address, `http://HOST:PORT`.
    pub coordinator: String,
    /// The worker's name: letters, digits, `.`, `_`, `-`.
    pub worker: WorkerId,
    /// What it can do.
    pub role: Role,
    /// Hash of its configuration; must equal the run's.
    pub config_digest: Digest,
    /// Certificates, where the coordinator's address is `https://`.
    pub tls: Option<TlsFiles>,
    /// Whether the network is trusted: plaintext then may go to other machines.
    pub allow_plaintext: bool,
    /// How long the coordinator may be unreachable before the worker gives up.
    pub reconnect_deadline: Duration,
}

/// How long the coordinator may be away before a worker gives up.
const RECONNECT: Duration = Duration::from_secs(120);

impl WorkerOptions {
    /// As a run's configuration says; checked, so that nobody loads a model to find the address wrong.
    ///
    /// # Errors
    /// [`SessionError::Address`].
    pub fn of(
        config: &Config,
        role: Role,
        coordinator: &str,
        worker: &str,
    ) -> Result<WorkerOptions, SessionError> {
        let options = WorkerOptions {
            coordinator: coordinator.to_owned(),
            worker: WorkerId(worker.to_owned()),
            role,
            config_digest: config.digest(),
            tls: config.security.tls(access::Role::of(role).as_str()).map(TlsFiles::from),
            allow_plaintext: config.security.allow_plaintext,
            reconnect_deadline: RECONNECT,
        };
        endpoint(&options.coordinator, options.tls.as_ref(), options.allow_plaintext)?;
        Ok(options)
    }
}

/// What a report did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It counted.
    Accepted,
    /// It had counted before: the answer to an earlier try was lost.
    Duplicate,
    /// It belongs to an old attempt, epoch or process and changed nothing (DU-6).
    Stale,
}

/// A registered worker. Clones share the registration and the heartbeats, which end with the last
/// of them.
#[derive(Clone)]
pub struct Session {
    link: Arc<Link>,
    heart: CancellationToken,
    _heart_stops_with_us: Arc<DropGuard>,
    /// What came with the answer to a report and was not taken yet.
    given: Arc<Mutex<Option<Assignment>>>,
    observer: Observer,
}

impl Session {
    /// Registers, trying again until the deadline, and starts the heartbeats.
    ///
    /// # Errors
    /// [`SessionError::Refused`] when the coordinator does not want this worker,
    /// [`SessionError::Lost`] when it cannot be reached, [`SessionError::Stopped`] by `shutdown`.
    ///
    /// # Panics
    /// Outside a tokio runtime, as `tokio::spawn` does.
    pub async fn connect(
        options: WorkerOptions,
        shutdown: CancellationToken,
    ) -> Result<Session, SessionError> {
        let connection = Connection::to(&options)?;
        Session::connect_over(&connection, options, shutdown).await
    }

    /// As [`Session::connect`], over a connection that other sessions of this process may use too.
    ///
    /// # Errors
    /// As [`Session::connect`].
    ///
    /// # Panics
    /// As [`Session::connect`].
    pub async fn connect_over(
        connection: &Connection,
        options: WorkerOptions,
        shutdown: CancellationToken,
    ) -> Result<Session, SessionError> {
        let link = Arc::new(Link::new(options, connection, session_number(), shutdown.clone()));
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return Err(SessionError::Stopped),
            registered = link.register(0) => registered?,
        };
        let heart = CancellationToken::new();
        tokio::spawn(heartbeat::beat(link.clone(), heart.clone()));
        let (tried, opened) = oneshot::channel();
        tokio::spawn(heartbeat::attend(link.clone(), heart.clone(), Some(tried)));
        let guard = Arc::new(heart.clone().drop_guard());
        let observer = Observer::off();
        let given = Arc::default();
        // From the first assignment on, the coordinator shall see it when this process dies.
        tokio::select! {
            () = shutdown.cancelled() => {}
            _ = tokio::time::timeout(link::CALL_LIMIT, opened) => {}
        }
        Ok(Session { link, heart, _heart_stops_with_us: guard, given, observer })
    }

    /// The same session, which tells `observer` of each assignment and report.
    pub fn observed(mut self, observer: Observer) -> Session {
        self.observer = observer;
        self
    }

    /// The next thing to do; waits for it, through lost connections and new coordinators.
    ///
    /// # Errors
    /// [`SessionError::Stopped`] by shutdown, [`SessionError::Lost`] when the coordinator stays
    /// away, [`SessionError::Refused`] when it no longer wants this worker.
    pub async fn next(&self) -> Result<Assignment, SessionError> {
        tokio::select! {
            biased;
            () = self.link.shutdown.cancelled() => Err(SessionError::Stopped),
            assignment = self.given_or_polled() => assignment.inspect(|given| self.observer.received(given)),
        }
    }

    async fn given_or_polled(&self) -> Result<Assignment, SessionError> {
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner).take();
        match given {
            Some(assignment) => Ok(assignment),
            None => self.poll().await,
        }
    }

    async fn poll(&self) -> Result<Assignment, SessionError> {
        let mut retry = self.link.retry();
        loop {
            let known = self.link.known();
            let answer = match self.polled(&known).await {
                Ok(answer) => answer,
                Err(status) => {
                    self.link.recover(&mut retry, status, known.count).await?;
                    continue;
                }
            };
            // Compared with what is known now: a heartbeat may have registered us anew meanwhile.
            if answer.unknown || answer.generation != self.link.known().generation.0 {
                self.link.recover(&mut retry, unknown(), known.count).await?;
                continue;
            }
            retry.succeeded();
            if let Some(assignment) = answer.assignment {
                return Ok(assignment.try_into()?);
            }
        }
    }

    /// Waits for work once: for what is owed for the newest report, or else by a call.
    async fn polled(&self, known: &Known) -> Result<wire::PollResponse, Status> {
        let limit = known.poll.saturating_add(POLL_SLACK);
        if let Some(owed) = self.link.owed(limit).await {
            let wire::ReportResponse { generation, assignment, .. } = owed?;
            return Ok(wire::PollResponse { generation, assignment, unknown: false });
        }
        let request = wire::PollRequest { caller: Some(self.link.caller(known)) };
        let answer = self.link.client().poll(link::timed(request, limit)).await?;
        Ok(answer.into_inner())
    }

    /// Tells the coordinator something, again and again until it answers.
    ///
    /// Not cut short by shutdown, so that results and hand-backs arrive; once shutdown is on, the
    /// first failure is the last.
    ///
    /// # Errors
    /// [`SessionError::Message`] when the report cannot be (a number that is not finite, a text
    /// without bounds), [`SessionError::ReportRefused`] when the coordinator says so,
    /// [`SessionError::Lost`] and [`SessionError::Refused`] as for [`Session::next`].
    pub async fn report(&self, report: Report) -> Result<Verdict, SessionError> {
        self.tell(report, false).await
    }

    /// As [`Session::report`], and takes the next assignment along if there is one, for the next call
    /// of [`Session::next`]: one round trip and one append of the journal less for each lease. When there is
    /// none yet, the coordinator keeps looking, and that call waits for it. For workers that hold nothing
    /// once they have reported.
    ///
    /// # Errors
    /// As [`Session::report`].
    pub async fn report_and_go_on(&self, report: Report) -> Result<Verdict, SessionError> {
        self.tell(report, true).await
    }

    async fn tell(&self, report: Report, go_on: bool) -> Result<Verdict, SessionError> {
        let message = wire::Report::from(&report);
        Report::try_from(message.clone())?;
        self.observer.reporting(&report);
        let mut retry = self.link.retry();
        loop {
            let known = self.link.known();
            let caller = Some(self.link.caller(&known));
            // Who is told to stop takes nothing more.
            let next = go_on && !self.link.shutdown.is_cancelled();
            let request = wire::ReportRequest { caller, report: Some(message.clone()), next };
            let answer = match go_on {
                true => self.link.exchange(request).await,
                false => {
                    let request = link::timed(request, link::CALL_LIMIT);
                    self.link.client().report(request).await.map(Response::into_inner)
                }
            };
            let answer = match answer {
                Ok(answer) => answer,
                Err(status) => {
                    self.link.recover(&mut retry, status, known.count).await?;
                    continue;
                }
            };
            if let Some(assignment) = answer.assignment.clone() {
                let given = Some(assignment.try_into()?);
                *self.given.lock().unwrap_or_else(PoisonError::into_inner) = given;
            }
            match answer.verdict() {
                wire::Verdict::Accepted => return Ok(Verdict::Accepted),
                wire::Verdict::Duplicate => return Ok(Verdict::Duplicate),
                wire::Verdict::Stale => return Ok(Verdict::Stale),
                wire::Verdict::Refused => return Err(SessionError::ReportRefused(answer.reason)),
                wire::Verdict::Unknown => {
                    self.link.recover(&mut retry, unknown(), known.count).await?;
                }
                wire::Verdict::Unspecified => return Err(SessionError::Verdict(answer.verdict)),
            }
        }
    }

    /// The newest trainer group the coordinator called off: who belongs to it, or to an older one,
    /// drops its collectives and asks for work again.
    pub fn aborted(&self) -> watch::Receiver<Option<TrainerEpoch>> {
        self.link.aborted.subscribe()
    }

    /// Says goodbye and stops the heartbeats. Best effort: a coordinator that does not hear it
    /// notices the silence.
    pub async fn leave(&self, reason: &str) {
        self.heart.cancel();
        drop(self.link.exchange.lock().unwrap_or_else(PoisonError::into_inner).take());
        let caller = Some(self.link.caller(&self.link.known()));
        let reason = duet_proto::convert::clip_reason(reason);
        let request = wire::LeaveRequest { caller, reason };
        let limit = Duration::from_secs(2);
        if let Err(status) = self.link.client().leave(link::timed(request, limit)).await {
            tracing::debug!(error = %status.message(), "the coordinator did not hear the goodbye");
        }
    }

    /// The run's name.
    pub fn run(&self) -> String {
        self.link.known().run
    }

    /// The coordinator generation this worker is registered with.
    pub fn generation(&self) -> Generation {
        self.link.known().generation
    }

    /// The number this session was given at its start: the same through all reconnections.
    pub fn number(&self) -> u64 {
        self.link.session
    }
}

fn unknown() -> Status {
    Status::unavailable("the coordinator does not know this session")
}

/// A number that no other session has: process, time and a counter, hashed. Never zero.
fn session_number() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = now.unwrap_or_default().as_nanos();
    let mut bytes = Vec::with_capacity(28);
    bytes.extend(std::process::id().to_le_bytes());
    bytes.extend(nanos.to_le_bytes());
    bytes.extend(COUNT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    let hash = Digest::of(&bytes).0;
    u64::from_le_bytes(hash.first_chunk().copied().unwrap_or_default()).max(1)
}

#[cfg(test)]
mod tests {
    #[test]
    fn session_numbers_differ_within_a_process() {
        let numbers: std::collections::BTreeSet<u64> =
            (0..1000).map(|_| super::session_number()).collect();
        assert_eq!(numbers.len(), 1000);
    }
}
