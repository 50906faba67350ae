//! The status service.

use super::gone;
use crate::driver::{GoneWorker, Handle, RunStatus};
use duet_core::scheduler::{FinishReason, RunState, WorkerView};
use duet_proto::convert::clip_reason;
use duet_proto::v1 as wire;
use duet_proto::v1::status_service_server::StatusService;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

/// Between two messages of a watch when the watcher has no wish.
const INTERVAL: Duration = Duration::from_millis(500);
/// The shortest time between two messages of a watch, whatever the wish.
const SHORTEST: Duration = Duration::from_millis(50);
/// A watch sends at least so often, because ages and estimates change by themselves.
const LONGEST: Duration = Duration::from_secs(5);

/// Watches at the same time; beyond that, asking is refused.
const WATCHES: usize = 256;

/// Shows the run.
pub struct StatusPage {
    handle: Handle,
    closing: CancellationToken,
    watches: Arc<Semaphore>,
}

impl StatusPage {
    /// The service in front of a driver; watches end with `closing`.
    pub fn new(handle: Handle, closing: CancellationToken) -> StatusPage {
        StatusPage { handle, closing, watches: Arc::new(Semaphore::new(WATCHES)) }
    }
}

#[tonic::async_trait]
impl StatusService for StatusPage {
    async fn get(
        &self,
        _: Request<wire::GetRequest>,
    ) -> Result<Response<wire::GetResponse>, Status> {
        let status = self.handle.status().await.map_err(gone)?;
        Ok(Response::new(wire::GetResponse { status: Some(encode(&status)) }))
    }

    type WatchStream = ReceiverStream<Result<wire::WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<wire::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let interval = match request.into_inner().interval_ms {
            0 => INTERVAL,
            wish => Duration::from_millis(wish).clamp(SHORTEST, LONGEST),
        };
        let watching = self.watches.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!("{WATCHES} watches are open; use Get, or try later"))
        })?;
        // One message: a watcher that does not read slows down nobody but itself.
        let (to, stream) = mpsc::channel(1);
        let (handle, closing) = (self.handle.clone(), self.closing.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = watch(handle, interval, to.clone()) => {}
                () = closing.cancelled() => {}
                () = to.closed() => {}
            }
            drop(watching);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Sends the status now, and after each change, until nobody reads or the driver has ended.
async fn watch(
    handle: Handle,
    interval: Duration,
    to: mpsc::Sender<Result<wire::WatchResponse, Status>>,
) {
    let mut changes = handle.changes();
    loop {
        changes.mark_unchanged();
        let Ok(status) = handle.status().await else { return };
        let message = wire::WatchResponse { status: Some(encode(&status)) };
        if to.send(Ok(message)).await.is_err() {
            return;
        }
        tokio::time::sleep(interval).await;
        if let Ok(Err(_)) = tokio::time::timeout(LONGEST, changes.changed()).await {
            return;
        }
    }
}

fn encode(status: &RunStatus) -> wire::Status {
    let view = &status.view;
    let workers = view.workers.iter().map(worker).chain(status.gone.iter().map(gone_worker));
    let mut workers: Vec<wire::WorkerStatus> = workers.collect();
    workers.sort_by(|a, b| a.worker_id.cmp(&b.worker_id));
    let trees = view
        .trees
        .iter()
        .map(|(name, count)| wire::NamedCount { name: (*name).to_owned(), count: *count });
    wire::Status {
        run: status.run.clone(),
        state: state(status).into(),
        iteration: u32::try_from(view.version.0).unwrap_or(u32::MAX).min(view.iterations),
        iterations: view.iterations,
        version: view.version.0,
        generation: view.generation.0,
        trees: trees.collect(),
        workers,
        images_done: view.images,
        images_per_second: status.images_per_second,
        eta_seconds: status.eta_seconds,
        rewards: values(&status.rewards),
        metrics: values(&status.metrics),
        failures: status
            .failures
            .iter()
            .map(|(name, count)| wire::NamedCount { name: name.clone(), count: *count })
            .collect(),
        retries: status.retries,
        stale_reports: view.stale_reports,
        last_error: clip_reason(status.last_error.as_deref().unwrap_or_default()),
        started_at_ms: status.started_at.0,
        last_checkpoint_version: view.checkpoint.map(|version| version.0),
        trainer_epoch: view.epoch.0,
        publication: status.taken.map(|taken| wire::Publication {
            version: taken.version.0,
            bytes: taken.bytes,
            workers: view.workers.iter().filter(|w| w.version == Some(taken.version)).count()
                as u32,
            seconds: taken.seconds,
        }),
    }
}

fn values(from: &BTreeMap<String, f64>) -> Vec<wire::NamedValue> {
    let value =
        |(name, value): (&String, &f64)| wire::NamedValue { name: name.clone(), value: *value };
    from.iter().filter(|(_, value)| value.is_finite()).map(value).collect()
}

fn state(status: &RunStatus) -> wire::RunState {
    match &status.view.state {
        RunState::Running if status.starting => wire::RunState::Starting,
        RunState::Running => wire::RunState::Running,
        RunState::Paused => wire::RunState::Paused,
        RunState::Stopping => wire::RunState::Stopping,
        RunState::Finished(FinishReason::Completed) => wire::RunState::Completed,
        RunState::Finished(FinishReason::Stopped) => wire::RunState::Stopped,
        RunState::Finished(FinishReason::Failed(_)) => wire::RunState::Failed,
    }
}

fn worker(view: &WorkerView) -> wire::WorkerStatus {
    let state = match view.state {
        "idle" => wire::WorkerState::Idle,
        "draining" => wire::WorkerState::Draining,
        "quarantined" => wire::WorkerState::Quarantined,
        _ => wire::WorkerState::Busy,
    };
    wire::WorkerStatus {
        worker_id: view.id.0.clone(),
        role: wire::Role::from(view.role).into(),
        state: state.into(),
        held_version: view.version.map(|version| version.0),
        last_heartbeat_age_ms: view.heard_ago.0,
        lease: view.holds.clone(),
        done: view.done,
        failed: view.failed,
    }
}

fn gone_worker(worker: &GoneWorker) -> wire::WorkerStatus {
    let state = if worker.left { wire::WorkerState::Left } else { wire::WorkerState::Lost };
    wire::WorkerStatus {
        worker_id: worker.id.0.clone(),
        role: wire::Role::from(worker.role).into(),
        state: state.into(),
        held_version: None,
        last_heartbeat_age_ms: worker.heard_ago.0,
        lease: String::new(),
        done: 0,
        failed: 0,
    }
}
