//! Signs of life, whatever else the worker does.

use super::SessionError;
use super::link::{Link, timed};
use duet_core::TrainerEpoch;
use duet_proto::v1 as wire;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

/// Between the end of a line and the next; shorter than the coordinator waits for it.
const REOPEN: Duration = Duration::from_millis(100);

/// Sends heartbeats until `stop`. Failures are left to polls and reports, which know when to give
/// up; a coordinator that forgot us is told again who we are.
pub(super) async fn beat(link: Arc<Link>, stop: CancellationToken) {
    let beats = async {
        loop {
            let known = link.known();
            tokio::time::sleep(known.heartbeat).await;
            if let Err(error) = once(&link).await {
                tracing::debug!(%error, "heartbeat");
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = beats => {}
    }
}

/// Keeps a line to the coordinator open until `stop`, so that it sees at once when this process dies.
/// Best effort: without it, the missing heartbeats tell. `tried` hears when the first line is open, or
/// could not be opened.
pub(super) async fn attend(
    link: Arc<Link>,
    stop: CancellationToken,
    mut tried: Option<oneshot::Sender<()>>,
) {
    let lines = async {
        loop {
            let began = Instant::now();
            let held = line(&link, &mut tried).await;
            drop(tried.take());
            let lasted = began.elapsed();
            match held {
                Ok(()) => {}
                // Heartbeats do without; polls and reports say what is wrong.
                Err(status) if status.code() == Code::Unimplemented => return,
                Err(status) => tracing::debug!(error = %status.message(), "line"),
            }
            // The end of a line that stood is answered at once: the coordinator counts the moments.
            if lasted < REOPEN {
                tokio::time::sleep(link.known().heartbeat.min(REOPEN)).await;
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = lines => {}
    }
}

/// Holds one line until it ends.
async fn line(link: &Link, tried: &mut Option<oneshot::Sender<()>>) -> Result<(), Status> {
    let known = link.known();
    let request = wire::AttendRequest { caller: Some(link.caller(&known)) };
    let mut line = link.client().attend(request).await?.into_inner();
    while let Some(said) = line.message().await? {
        drop(tried.take());
        if said.unknown || said.generation != known.generation.0 {
            // Heartbeats and polls register; the line follows.
            return Ok(());
        }
    }
    Ok(())
}

async fn once(link: &Link) -> Result<(), SessionError> {
    let known = link.known();
    let request = wire::HeartbeatRequest { caller: Some(link.caller(&known)) };
    let limit = known.heartbeat.saturating_mul(3).max(Duration::from_secs(1));
    let answer = match link.client().heartbeat(timed(request, limit)).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => {
            tracing::debug!(error = %status.message(), "heartbeat not heard");
            return Ok(());
        }
    };
    if answer.unknown || answer.generation != known.generation.0 {
        return link.register(known.count).await;
    }
    if let Some(epoch) = answer.abort_epoch {
        link.abort(TrainerEpoch(epoch));
    }
    Ok(())
}
