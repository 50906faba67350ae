//! The client's side of a connection.

use crate::tls::{TlsError, TlsFiles};
use crate::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_LIMIT};
use duet_core::url::without_credentials;
use duet_proto::v1::control_service_client::ControlServiceClient;
use duet_proto::v1::status_service_client::StatusServiceClient;
use duet_proto::v1::worker_service_client::WorkerServiceClient;
use std::net::IpAddr;
use std::time::Duration;
pub use tonic::transport::Channel;
use tonic::transport::Endpoint;

/// How long one attempt to connect may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// An address that cannot be connected to.
#[derive(Debug, thiserror::Error)]
pub enum BadAddress {
    /// It is none.
    #[error(
        "`{url}` is not a coordinator's address: write `http://HOST:PORT`, or `https://` with TLS"
    )]
    Malformed {
        /// What was given.
        url: String,
    },
    /// It asks for TLS, and there are no certificates.
    #[error(
        "`{url}` asks for TLS: set security.ca, security.certificate and security.key, or for \
         `duet` the variables DUET__SECURITY__CA, DUET__SECURITY__CERTIFICATE and \
         DUET__SECURITY__KEY"
    )]
    NoCertificates {
        /// What was given.
        url: String,
    },
    /// There are certificates, and it does not ask for TLS.
    #[error(
        "`{url}` is plaintext, but security.ca, .certificate and .key are set: write `https://`"
    )]
    Plaintext {
        /// What was given.
        url: String,
    },
    /// It is plaintext to another machine, and nobody said that the network is trusted.
    #[error(
        "`{url}` is plaintext to another machine: write `https://` and set security.ca, \
         security.certificate and security.key (docs/security.md; `duet certs` makes them), or, on \
         a network that you trust, security.allow_plaintext = true (for `duet` \
         DUET__SECURITY__ALLOW_PLAINTEXT=true)"
    )]
    Exposed {
        /// What was given.
        url: String,
    },
    /// A certificate cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A channel to `url` (`http://HOST:PORT`, or `https://` with certificates). It connects with the
/// first call, and again with the next call after the connection broke.
///
/// # Errors
/// When `url` is not an address or does not fit the certificates; that nobody listens there, or
/// refuses, shows with the first call.
pub fn channel(url: &str, tls: Option<&TlsFiles>) -> Result<Channel, BadAddress> {
    channel_on(url, tls, false)
}

/// As [`channel`]; with `trusted`, plaintext beyond this machine is allowed.
///
/// # Errors
/// As [`channel`].
pub fn channel_on(url: &str, tls: Option<&TlsFiles>, trusted: bool) -> Result<Channel, BadAddress> {
    Ok(endpoint(url, tls, trusted)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_lazy())
}

/// An endpoint at `url`, checked against the certificates and, without any, for being on this machine
/// unless the network is `trusted`.
///
/// # Errors
/// As [`channel`].
pub fn endpoint(
    given: &str,
    tls: Option<&TlsFiles>,
    trusted: bool,
) -> Result<Endpoint, BadAddress> {
    let shown = without_credentials(given);
    let url = || shown.clone();
    let bad = || BadAddress::Malformed { url: url() };
    let endpoint = Endpoint::from_shared(given.to_owned()).map_err(|_| bad())?;
    if shown != given {
        // Nobody reads credentials in it, but who repeats the address would repeat them.
        return Err(bad());
    }
    let Some(host) = endpoint.uri().host() else { return Err(bad()) };
    let near = is_loopback(host);
    match (endpoint.uri().scheme_str(), tls) {
        (Some("http"), None) if near || trusted => Ok(endpoint),
        (Some("http"), None) => Err(BadAddress::Exposed { url: url() }),
        (Some("https"), Some(files)) => Ok(files.client(endpoint)?),
        (Some("http"), Some(_)) => Err(BadAddress::Plaintext { url: url() }),
        (Some("https"), None) => Err(BadAddress::NoCertificates { url: url() }),
        _ => Err(bad()),
    }
}

/// Whether a host is this machine by its own name: what a resolver says of other names may change.
fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
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
        assert!(channel("http://127.0.0.1:7070", None).is_ok());
        assert!(channel("http://[::1]:7070", None).is_ok());
        for far in
            ["http://coordinator.duet.svc:7070", "http://10.0.0.5:1", "http://127.evil.example"]
        {
            let error = channel(far, None).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains("allow_plaintext") && error.contains("duet certs"), "{error}");
            assert!(channel_on(far, None, true).is_ok());
        }
        let error =
            channel("http://me:hunter2@a:1/?sig=hunter2", None).err().map(|e| e.to_string());
        assert!(error.is_some_and(|error| !error.contains("hunter2")));
        for bad in ["", "127.0.0.1:7070", "ftp://a:1", "http://a b:1"] {
            let error = channel(bad, None).err().map(|e| e.to_string());
            assert!(error.is_some_and(|e| e.contains("http://HOST:PORT")), "{bad}");
        }
        let error = channel("https://a:1", None).err().map(|e| e.to_string());
        assert!(error.is_some_and(|e| e.contains("security.ca")));
        let files = TlsFiles { ca: "a.pem".into(), certificate: "b".into(), key: "c".into() };
        let error = channel("http://a:1", Some(&files)).err().map(|e| e.to_string());
        assert!(error.is_some_and(|e| e.contains("https://")));
        let error = channel("https://a:1", Some(&files)).err().map(|e| e.to_string());
        assert!(error.is_some_and(|e| e.contains("security.ca: a.pem")));
    }
}
