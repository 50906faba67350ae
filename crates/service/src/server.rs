//! The server's side of a connection.

use crate::accept::{Connection, Door, accept};
use crate::access::{Guard, Refusals};
use crate::metrics::{Metrics, table::Place};
use crate::tls::{TlsError, TlsFiles};
use crate::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_LIMIT};
use duet_proto::FILE_DESCRIPTOR_SET;
use duet_proto::v1::control_service_server::{ControlService, ControlServiceServer};
use duet_proto::v1::status_service_server::{StatusService, StatusServiceServer};
use duet_proto::v1::worker_service_server::{WorkerService, WorkerServiceServer};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::server::NamedService;
use tonic::transport::server::Router;
pub use tonic_health::server::HealthReporter;
use tonic_reflection::server::Builder as Reflection;
use tower::layer::util::{Identity, Stack};

/// Calls of one connection at the same time.
const STREAMS: u32 = 1024;
/// Bytes of the headers of a call.
const HEADERS: u32 = 16 << 10;

/// What a server takes from whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests a second from one address; a second's worth may come at once.
    pub requests_per_second: u32,
    /// Connections at the same time.
    pub connections: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { requests_per_second: 5_000, connections: 4_096 }
    }
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("cannot listen on `{address}`: {source}; choose another address or port")]
    Listen {
        /// Which.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The descriptors built into this program are damaged.
    #[error("the reflection service cannot be built: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// A certificate cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Serving ended with an error.
    #[error("the server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// A server that listens, with health and reflection, and waits for its services.
pub struct Server {
    router: Router<Stack<Guard, Identity>>,
    incoming: ReceiverStream<Result<Connection, io::Error>>,
    address: SocketAddr,
    health: HealthReporter,
    announced: Vec<&'static str>,
    refusals: Arc<Refusals>,
}

/// Listens on `address` (`HOST:PORT`; port 0: any free one) and builds a server with the standard
/// health service and both versions of the reflection service. With `tls`, only clients with a
/// certificate of the same authority are served, and only with the calls of their role
/// ([`crate::access::table`]).
///
/// # Errors
/// [`ServerError::Listen`] when the address cannot be had; [`ServerError::Tls`].
pub async fn server(address: &str, tls: Option<&TlsFiles>) -> Result<Server, ServerError> {
    server_with(address, tls, Limits::default(), Metrics::new(Place::Coordinator)).await
}

/// As [`server`], with limits, and counting who was refused.
///
/// # Errors
/// As [`server`].
pub async fn server_with(
    address: &str,
    tls: Option<&TlsFiles>,
    limits: Limits,
    metrics: Metrics,
) -> Result<Server, ServerError> {
    let tls = tls.map(TlsFiles::server).transpose()?;
    let failed = |source| ServerError::Listen { address: address.to_owned(), source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    let (health, health_service) = tonic_health::server::health_reporter();
    let reflection = || {
        Reflection::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let refusals = Arc::new(Refusals::new(metrics));
    let guard = Guard::new(refusals.clone(), limits.requests_per_second);
    let router = tonic::transport::Server::builder()
        .layer(guard)
        .max_concurrent_streams(STREAMS)
        .http2_max_header_list_size(HEADERS)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    let door = Door { tls, refusals: refusals.clone(), connections: limits.connections };
    let incoming = accept(listener, door);
    Ok(Server { router, incoming, address: bound, health, announced: vec![""], refusals })
}

impl Server {
    /// Where it listens: with the real port, also when port 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where refusals are counted.
    pub fn refusals(&self) -> Arc<Refusals> {
        self.refusals.clone()
    }

    /// To tell load balancers and probes more than `serve` tells them.
    pub fn health(&self) -> HealthReporter {
        self.health.clone()
    }

    /// Adds the worker service, with Duet's message limits.
    pub async fn with_worker(mut self, service: impl WorkerService) -> Self {
        let service = WorkerServiceServer::new(service)
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT);
        self.announce(&service).await;
        self.router = self.router.add_service(service);
        self
    }

    /// Adds the status service, with Duet's message limits.
    pub async fn with_status(mut self, service: impl StatusService) -> Self {
        let service = StatusServiceServer::new(service)
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT);
        self.announce(&service).await;
        self.router = self.router.add_service(service);
        self
    }

    /// Adds the control service, with Duet's message limits.
    pub async fn with_control(mut self, service: impl ControlService) -> Self {
        let service = ControlServiceServer::new(service)
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT);
        self.announce(&service).await;
        self.router = self.router.add_service(service);
        self
    }

    async fn announce<S: NamedService>(&mut self, _: &S) {
        self.health.set_serving::<S>().await;
        self.announced.push(S::NAME);
    }

    /// Serves until `shutdown`; then health says so first, and calls in flight may finish.
    ///
    /// Streams and held polls must end by themselves on the same token, or this waits for them.
    ///
    /// # Errors
    /// [`ServerError::Serve`] when accepting connections fails.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), ServerError> {
        let (health, announced) = (self.health, self.announced);
        let told = async move {
            shutdown.cancelled().await;
            for name in announced {
                health.set_service_status(name, tonic_health::ServingStatus::NotServing).await;
            }
        };
        Ok(self.router.serve_with_incoming_shutdown(self.incoming, told).await?)
    }
}
