//! The client's side of a connection.

use crate::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_LIMIT};
use duet_proto::v1::control_service_client::ControlServiceClient;
use duet_proto::v1::status_service_client::StatusServiceClient;
use duet_proto::v1::worker_service_client::WorkerServiceClient;
use std::time::Duration;
pub use tonic::transport::Channel;
use tonic::transport::Endpoint;

/// How long one attempt to connect may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// An address that is not one.
#[derive(Debug, thiserror::Error)]
#[error("`{url}` is not a coordinator's address: write `http://HOST:PORT`")]
pub struct BadAddress {
    /// What was given.
    pub url: String,
}

/// A channel to `url` (`http://HOST:PORT`). It connects with the first call, and again with the
/// next call after the connection broke.
///
/// # Errors
/// When `url` is not an address; that nobody listens there shows with the first call.
pub fn channel(url: &str) -> Result<Channel, BadAddress> {
    let bad = || BadAddress { url: url.to_owned() };
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|_| bad())?;
    if endpoint.uri().scheme_str() != Some("http") || endpoint.uri().host().is_none() {
        return Err(bad());
    }
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_lazy())
}

/// A client of the worker service, with Duet's message limits.
pub fn worker_client(channel: Channel) -> WorkerServiceClient<Channel> {
    WorkerServiceClient::new(channel)
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT)
}

/// A client of the status service, with Duet's message limits.
pub fn status_client(channel: Channel) -> StatusServiceClient<Channel> {
    StatusServiceClient::new(channel)
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT)
}

/// A client of the control service, with Duet's message limits.
pub fn control_client(channel: Channel) -> ControlServiceClient<Channel> {
    ControlServiceClient::new(channel)
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_are_checked() {
        assert!(channel("http://127.0.0.1:7070").is_ok());
        assert!(channel("http://coordinator.duet.svc:7070").is_ok());
        for bad in ["", "127.0.0.1:7070", "ftp://a:1", "https://a:1", "http://a b:1"] {
            let error = channel(bad).err().map(|e| e.to_string());
            assert!(error.is_some_and(|e| e.contains("http://HOST:PORT")), "{bad}");
        }
    }
}
