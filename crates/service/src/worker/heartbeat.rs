//! Signs of life, whatever else the worker does.

use super::SessionError;
use super::link::{Link, timed};
use duet_core::TrainerEpoch;
use duet_proto::v1 as wire;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

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
