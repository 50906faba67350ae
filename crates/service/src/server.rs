//! The server's side of a connection.

use crate::tls::{TlsError, TlsFiles};
use crate::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MESSAGE_LIMIT};
use duet_proto::FILE_DESCRIPTOR_SET;
use duet_proto::v1::control_service_server::{ControlService, ControlServiceServer};
use duet_proto::v1::status_service_server::{StatusService, StatusServiceServer};
use duet_proto::v1::worker_service_server::{WorkerService, WorkerServiceServer};
use std::net::SocketAddr;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::server::NamedService;
use tonic::transport::server::{Router, TcpIncoming};
pub use tonic_health::server::HealthReporter;
use tonic_reflection::server::Builder as Reflection;

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
    router: Router,
    incoming: TcpIncoming,
    address: SocketAddr,
    health: HealthReporter,
    announced: Vec<&'static str>,
}

/// Listens on `address` (`HOST:PORT`; port 0: any free one) and builds a server with the standard
/// health service and both versions of the reflection service. With `tls`, only clients with a
/// certificate of the same authority are served.
///
/// # Errors
/// [`ServerError::Listen`] when the address cannot be had; [`ServerError::Tls`].
pub async fn server(address: &str, tls: Option<&TlsFiles>) -> Result<Server, ServerError> {
    let failed = |source| ServerError::Listen { address: address.to_owned(), source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    let (health, health_service) = tonic_health::server::health_reporter();
    let reflection = || {
        Reflection::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let mut builder = tonic::transport::Server::builder();
    if let Some(files) = tls {
        builder = builder.tls_config(files.server()?)?;
    }
    let router = builder
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    Ok(Server { router, incoming, address: bound, health, announced: vec![""] })
}

impl Server {
    /// Where it listens: with the real port, also when port 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
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
