//! The coordinator, asked over gRPC: prost types come in here and go no further.

use crate::CliError;
use duet_core::url::without_credentials;
use duet_proto::v1;
use duet_proto::v1::control_service_client::ControlServiceClient;
use duet_proto::v1::status_service_client::StatusServiceClient;
use duet_service::channel::endpoint;
use duet_service::tls::TlsFiles;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tonic::transport::Channel;

/// Longest wait for a connection and for an answer.
const DEADLINE: Duration = Duration::from_secs(5);

/// File in a run's folder that holds its coordinator's address.
pub const ADDRESS_FILE: &str = "coordinator.addr";

/// A run at a moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Run {
    /// Its name.
    pub run: String,
    /// `running`, `paused`, `completed`, ...
    pub state: String,
    /// The iteration whose step comes next.
    pub iteration: u32,
    /// How many iterations it has.
    pub iterations: u32,
    /// Committed optimiser steps.
    pub version: u64,
    /// The coordinator's incarnation.
    pub generation: u64,
    /// Trees by state.
    pub trees: BTreeMap<String, u64>,
    /// Workers, by name.
    pub workers: Vec<Worker>,
    /// Images rendered.
    pub images: u64,
    /// Images a second.
    pub images_per_second: f64,
    /// Seconds to the end.
    pub eta_seconds: Option<f64>,
    /// Mean rewards of the newest committed iteration.
    pub rewards: BTreeMap<String, f64>,
    /// The trainers' numbers of the newest committed iteration.
    pub metrics: BTreeMap<String, f64>,
    /// Failures by kind.
    pub failures: BTreeMap<String, u64>,
    /// Leases given out again.
    pub retries: u64,
    /// Reports that came too late.
    pub stale_reports: u64,
    /// The newest failure; empty when there was none.
    pub last_error: String,
    /// Version of the newest checkpoint.
    pub checkpoint: Option<u64>,
    /// How the newest weights came to the rollout workers.
    pub publication: Option<Publication>,
}

/// Weights that rollout workers took.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Publication {
    /// Their version.
    pub version: u64,
    /// Bytes of their files.
    pub bytes: u64,
    /// Workers that hold them.
    pub workers: u32,
    /// Seconds that the slowest of these needed to fetch, verify and load them.
    pub seconds: f64,
}

/// A worker at a moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Worker {
    /// Its name.
    pub id: String,
    /// `rollout`, `reward`, `trainer`.
    pub role: String,
    /// `idle`, `busy`, ...
    pub state: String,
    /// The policy version it holds.
    pub version: Option<u64>,
    /// Milliseconds since its last sign of life.
    pub heard_ms_ago: u64,
    /// What it works on.
    pub lease: String,
    /// Leases done.
    pub done: u64,
    /// Leases failed.
    pub failed: u64,
}

impl Run {
    /// Whether it is over.
    pub fn over(&self) -> bool {
        matches!(self.state.as_str(), "completed" | "stopped" | "failed")
    }
}

/// `RUN_STATE_RUNNING` becomes `running`.
fn word(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_lowercase()
}

impl From<v1::Status> for Run {
    fn from(status: v1::Status) -> Run {
        let values =
            |list: Vec<v1::NamedValue>| list.into_iter().map(|n| (n.name, n.value)).collect();
        let counts =
            |list: Vec<v1::NamedCount>| list.into_iter().map(|n| (n.name, n.count)).collect();
        Run {
            state: word(status.state().as_str_name(), "RUN_STATE_"),
            run: status.run,
            iteration: status.iteration,
            iterations: status.iterations,
            version: status.version,
            generation: status.generation,
            trees: counts(status.trees),
            workers: status.workers.into_iter().map(Worker::from).collect(),
            images: status.images_done,
            images_per_second: status.images_per_second,
            eta_seconds: status.eta_seconds,
            rewards: values(status.rewards),
            metrics: values(status.metrics),
            failures: counts(status.failures),
            retries: status.retries,
            stale_reports: status.stale_reports,
            last_error: status.last_error,
            checkpoint: status.last_checkpoint_version,
            publication: status.publication.map(Publication::from),
        }
    }
}

impl From<v1::Publication> for Publication {
    fn from(publication: v1::Publication) -> Publication {
        let v1::Publication { version, bytes, workers, seconds } = publication;
        Publication { version, bytes, workers, seconds }
    }
}

impl From<v1::WorkerStatus> for Worker {
    fn from(worker: v1::WorkerStatus) -> Worker {
        Worker {
            role: word(worker.role().as_str_name(), "ROLE_"),
            state: word(worker.state().as_str_name(), "WORKER_STATE_"),
            id: worker.worker_id,
            version: worker.held_version,
            heard_ms_ago: worker.last_heartbeat_age_ms,
            lease: worker.lease,
            done: worker.done,
            failed: worker.failed,
        }
    }
}

/// A coordinator that answered once.
#[derive(Clone, Debug)]
pub struct Client {
    address: String,
    channel: Channel,
}

/// The certificates that the environment names as a configuration would: `DUET__SECURITY__CA`,
/// `DUET__SECURITY__CERTIFICATE` and `DUET__SECURITY__KEY`; `{role}` in them is `operator`.
pub fn environment_tls() -> Option<TlsFiles> {
    let path = |name: &str| {
        let value = std::env::var(format!("DUET__SECURITY__{name}")).ok()?;
        Some(PathBuf::from(value.replace("{role}", "operator")))
    };
    Some(TlsFiles { ca: path("CA")?, certificate: path("CERTIFICATE")?, key: path("KEY")? })
}

/// Whether `DUET__SECURITY__ALLOW_PLAINTEXT` says that the network is trusted.
pub fn environment_trusts() -> bool {
    std::env::var("DUET__SECURITY__ALLOW_PLAINTEXT").is_ok_and(|value| value == "true")
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// The address is wrong, or nobody answers there.
    pub async fn connect(
        address: &str,
        tls: Option<&TlsFiles>,
        trusted: bool,
    ) -> Result<Client, CliError> {
        let unreachable = |reason: String| CliError::Unreachable {
            address: without_credentials(address),
            reason,
        };
        // Certificates are for those who ask for them.
        let tls = tls.filter(|_| address.starts_with("https://"));
        let endpoint = endpoint(address, tls, trusted).map_err(|e| unreachable(e.to_string()))?;
        let endpoint = endpoint.connect_timeout(DEADLINE);
        let channel = endpoint.connect().await.map_err(|e| unreachable(reason(&e)))?;
        Ok(Client { address: without_credentials(address), channel })
    }

    /// The run as it is now.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn get(&self) -> Result<Run, CliError> {
        let mut client = StatusServiceClient::new(self.channel.clone());
        let answer = tokio::time::timeout(DEADLINE, client.get(v1::GetRequest {})).await;
        let answer = answer.map_err(|_| self.lost("no answer in time"))?;
        let status = answer.map_err(|e| self.lost(e.message()))?.into_inner().status;
        Ok(status.unwrap_or_default().into())
    }

    /// The run each time it changes.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn watch(
        &self,
        every: Duration,
    ) -> Result<tonic::Streaming<v1::WatchResponse>, CliError> {
        let mut client = StatusServiceClient::new(self.channel.clone());
        let request = v1::WatchRequest { interval_ms: every.as_millis() as u64 };
        Ok(client.watch(request).await.map_err(|e| self.lost(e.message()))?.into_inner())
    }

    /// The next state of a watched run; `None` when the stream is over.
    pub async fn next(stream: &mut tonic::Streaming<v1::WatchResponse>) -> Option<Run> {
        let message = stream.message().await.ok().flatten()?;
        Some(message.status.unwrap_or_default().into())
    }

    /// Pauses, resumes or stops the run, or drains a worker.
    ///
    /// # Errors
    /// Nobody answers, or the coordinator refuses.
    pub async fn control(&self, wish: Wish<'_>) -> Result<(), CliError> {
        let mut client = ControlServiceClient::new(self.channel.clone());
        let call = async {
            match wish {
                Wish::Pause => client.pause(v1::PauseRequest {}).await.map(drop),
                Wish::Resume => client.resume(v1::ResumeRequest {}).await.map(drop),
                Wish::Stop(reason) => {
                    client.stop(v1::StopRequest { reason: reason.to_owned() }).await.map(drop)
                }
                Wish::Drain(worker) => {
                    client.drain(v1::DrainRequest { worker_id: worker.to_owned() }).await.map(drop)
                }
            }
        };
        let answer = tokio::time::timeout(DEADLINE, call).await;
        let answer = answer.map_err(|_| self.lost("no answer in time"))?;
        answer.map_err(|status| match status.code() {
            tonic::Code::Unavailable => self.lost(status.message()),
            _ => CliError::Refused(status.message().to_owned()),
        })
    }

    fn lost(&self, reason: &str) -> CliError {
        CliError::Unreachable { address: self.address.clone(), reason: reason.to_owned() }
    }
}

/// What an operator can want.
#[derive(Clone, Copy, Debug)]
pub enum Wish<'a> {
    /// No new work.
    Pause,
    /// Work again.
    Resume,
    /// Checkpoint and end, with a reason.
    Stop(&'a str),
    /// Send one worker home.
    Drain(&'a str),
}

/// The innermost reason of an error, which is the one that says something.
fn reason(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(next) = inner.source() {
        inner = next;
    }
    inner.to_string()
}

/// The address a person meant: an address, a run's folder, or the newest run below `runs/`.
///
/// # Errors
/// There is no such run, or it has no coordinator.
pub fn resolve(address: Option<&str>) -> Result<String, CliError> {
    match address {
        Some(text) if text.contains("://") => Ok(text.to_owned()),
        Some(folder) => read_address(&Path::new(folder).join(ADDRESS_FILE)),
        None => read_address(&newest_run().ok_or_else(|| {
            CliError::Usage(
                "no run below runs/ has a coordinator; give its address, such as http://127.0.0.1:7700"
                    .to_owned(),
            )
        })?),
    }
}

fn read_address(path: &Path) -> Result<String, CliError> {
    let text = std::fs::read_to_string(path).map_err(|e| CliError::io("read", path, e))?;
    let text = text.trim();
    Ok(if text.contains("://") { text.to_owned() } else { format!("http://{text}") })
}

fn newest_run() -> Option<PathBuf> {
    let runs = std::fs::read_dir("runs").ok()?;
    let files = runs.flatten().map(|entry| entry.path().join(ADDRESS_FILE));
    files.filter_map(|f| Some((f.metadata().ok()?.modified().ok()?, f))).max().map(|(_, f)| f)
}
