//! `[telemetry]`: where numbers and traces go. Nothing goes anywhere by default.

use crate::error::Problems;
use crate::raw::Raw;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// `[telemetry]`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Telemetry {
    /// Where the coordinator serves `/metrics` for Prometheus, as `HOST:PORT`; port 0 takes a free
    /// one, which the log names. Default: nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
    /// Where each worker does. Port 0 where several run on one machine. Default: nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker_metrics: Option<String>,
    /// An OpenTelemetry collector that takes traces by gRPC (OTLP), as `http://HOST:4317`. Default:
    /// none, and no spans are made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp: Option<String>,
}

/// Checks the section.
pub(crate) fn check(raw: &Raw, problems: &mut Problems) {
    let telemetry = &raw.telemetry;
    let places = [
        ("telemetry.metrics", &telemetry.metrics),
        ("telemetry.worker_metrics", &telemetry.worker_metrics),
    ];
    for (key, place) in places {
        let Some(place) = place else { continue };
        match place.parse::<SocketAddr>() {
            Err(_) => problems.add(
                key,
                format!("`{place}` is no address and port; write one like `127.0.0.1:9464`"),
            ),
            Ok(at) if !at.ip().is_loopback() && !raw.security.allow_plaintext => problems.add(
                key,
                format!(
                    "`{place}` can be reached from other machines, and metrics are served without \
                     TLS: listen on 127.0.0.1, or set security.allow_plaintext = true on a network \
                     that you trust"
                ),
            ),
            Ok(_) => {}
        }
    }
    if let Some(url) = &telemetry.otlp {
        let host = url.strip_prefix("http://").unwrap_or_default();
        problems.check(!host.is_empty(), "telemetry.otlp", || {
            format!(
                "`{}` is not the address of a collector; write one like `http://127.0.0.1:4317`",
                duet_core::url::without_credentials(url)
            )
        });
    }
}
