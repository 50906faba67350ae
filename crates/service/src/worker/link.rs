//! The registration and the channel, shared by polls, reports and heartbeats.

use super::exchange::Exchange;
use super::retry::Retry;
use super::{SessionError, WorkerOptions};
use crate::channel::{Channel, channel_on, worker_client};
use duet_core::{Generation, TrainerEpoch};
use duet_proto::v1 as wire;
use duet_proto::v1::worker_service_client::WorkerServiceClient;
use std::time::Duration;
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};

/// How long a call other than a poll may take.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(30);
/// How much longer than the coordinator promised a poll may take.
pub(super) const POLL_SLACK: Duration = Duration::from_secs(10);

/// What the coordinator said at the newest registration.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    /// Which registration of this session it was; zero: none yet.
    pub(super) count: u64,
    pub(super) generation: Generation,
    pub(super) heartbeat: Duration,
    pub(super) poll: Duration,
    pub(super) run: String,
}

pub(super) struct Link {
    pub(super) options: WorkerOptions,
    pub(super) session: u64,
    pub(super) shutdown: CancellationToken,
    pub(super) aborted: watch::Sender<Option<TrainerEpoch>>,
    /// The stream of reports, while nobody waits for an answer on it.
    pub(super) exchange: std::sync::Mutex<Option<Exchange>>,
    client: WorkerServiceClient<Channel>,
    known: watch::Sender<Known>,
    registering: Mutex<()>,
}

/// A connection to the coordinator, which the sessions of one process may share: then what is said to
/// them at the same time comes together. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Connection(WorkerServiceClient<Channel>);

impl Connection {
    /// One to where the options say. It is made with the first call, and again after it broke.
    ///
    /// # Errors
    /// [`SessionError::Address`].
    pub fn to(options: &WorkerOptions) -> Result<Connection, SessionError> {
        let WorkerOptions { coordinator, tls, allow_plaintext, .. } = options;
        let channel = channel_on(coordinator, tls.as_ref(), *allow_plaintext)?;
        Ok(Connection(worker_client(channel)))
    }
}

impl Link {
    pub(super) fn new(
        options: WorkerOptions,
        connection: &Connection,
        session: u64,
        shutdown: CancellationToken,
    ) -> Link {
        Link {
            options,
            session,
            shutdown,
            client: connection.0.clone(),
            exchange: std::sync::Mutex::default(),
            aborted: watch::Sender::new(None),
            known: watch::Sender::new(Known::default()),
            registering: Mutex::new(()),
        }
    }

    pub(super) fn client(&self) -> WorkerServiceClient<Channel> {
        self.client.clone()
    }

    pub(super) fn known(&self) -> Known {
        self.known.borrow().clone()
    }

    pub(super) fn caller(&self, known: &Known) -> wire::Caller {
        wire::Caller {
            worker_id: self.options.worker.0.clone(),
            session: self.session,
            generation: known.generation.0,
        }
    }

    pub(super) fn retry(&self) -> Retry {
        let WorkerOptions { coordinator, reconnect_deadline, .. } = &self.options;
        Retry::new(coordinator.clone(), *reconnect_deadline, self.shutdown.clone(), self.session)
    }

    /// After a failed call: waits, then registers anew unless that has happened since.
    pub(super) async fn recover(
        &self,
        retry: &mut Retry,
        status: Status,
        seen: u64,
    ) -> Result<(), SessionError> {
        retry.after(&status).await?;
        self.register_with(retry, seen).await
    }

    /// Registers, unless somebody else did since registration number `seen`.
    pub(super) async fn register(&self, seen: u64) -> Result<(), SessionError> {
        self.register_with(&mut self.retry(), seen).await
    }

    async fn register_with(&self, retry: &mut Retry, seen: u64) -> Result<(), SessionError> {
        let _one_at_a_time = self.registering.lock().await;
        if self.known.borrow().count > seen {
            return Ok(());
        }
        loop {
            let request = wire::RegisterRequest {
                caller: Some(self.caller(&Known::default())),
                role: wire::Role::from(self.options.role).into(),
                config_digest: self.options.config_digest.0.to_vec(),
                build: concat!("duet ", env!("CARGO_PKG_VERSION")).to_owned(),
            };
            match self.client().register(timed(request, CALL_LIMIT)).await {
                Ok(answer) => {
                    self.remember(answer.into_inner());
                    return Ok(());
                }
                Err(status) => retry.after(&status).await?,
            }
        }
    }

    fn remember(&self, answer: wire::RegisterResponse) {
        let generation = Generation(answer.generation);
        tracing::info!(worker = %self.options.worker, run = %answer.run, %generation, "registered");
        self.known.send_modify(|known| {
            *known = Known {
                count: known.count + 1,
                generation,
                heartbeat: Duration::from_millis(answer.heartbeat_ms.max(1)),
                poll: Duration::from_millis(answer.poll_ms),
                run: answer.run,
            };
        });
    }

    /// Takes note of a trainer group that is over.
    pub(super) fn abort(&self, epoch: TrainerEpoch) {
        self.aborted.send_if_modified(|newest| {
            let newer = newest.is_none_or(|newest| epoch > newest);
            if newer {
                *newest = Some(epoch);
            }
            newer
        });
    }
}

/// A request that must be answered within `limit`.
pub(super) fn timed<T>(message: T, limit: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}
