//! `/metrics` over HTTP/1.1, for one scraper or a few.

use super::{CONTENT_TYPE, Metrics};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::CONTENT_TYPE as HEADER;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Connections at the same time; more of them wait to be accepted.
const CONNECTIONS: usize = 32;
/// For a client to send its request.
const HEADERS: Duration = Duration::from_secs(10);
/// For one connection from its first to its last byte.
const LIFE: Duration = Duration::from_secs(120);

/// Why there is no page of metrics.
#[derive(Debug, thiserror::Error)]
#[error("metrics cannot be served on `{address}`: {source}; choose another address or port")]
pub struct ServeError {
    address: String,
    source: std::io::Error,
}

/// A port that is listened on.
pub struct Scraped {
    listener: TcpListener,
    address: SocketAddr,
}

/// Listens on `address`; port 0 takes a free one.
///
/// # Errors
/// The address cannot be had.
pub async fn bind(address: &str) -> Result<Scraped, ServeError> {
    let failed = |source| ServeError { address: address.to_owned(), source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok(Scraped { listener, address })
}

impl Scraped {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until it is dropped; `refresh` brings the values up to date before each answer.
    pub async fn serve<F, R>(self, metrics: Metrics, refresh: F)
    where
        F: Fn() -> R + Send + Sync + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        let (refresh, free) = (Arc::new(refresh), Arc::new(Semaphore::new(CONNECTIONS)));
        loop {
            // The semaphore is never closed.
            let Ok(permit) = free.clone().acquire_owned().await else { return };
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a scraper could not be let in");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (metrics, refresh) = (metrics.clone(), refresh.clone());
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    answer(
                        request.method() == Method::GET,
                        request,
                        metrics.clone(),
                        refresh.clone(),
                    )
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADERS)
                    .serve_connection(TokioIo::new(stream), service);
                if let Ok(Err(error)) = tokio::time::timeout(LIFE, connection).await {
                    tracing::debug!(%error, "a scraper went away");
                }
                drop(permit);
            });
        }
    }
}

async fn answer<B, F, R>(
    get: bool,
    request: Request<B>,
    metrics: Metrics,
    refresh: Arc<F>,
) -> Result<Response<Full<Bytes>>, Infallible>
where
    F: Fn() -> R,
    R: Future<Output = ()>,
{
    let mut response = Response::new(Full::default());
    if !get {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    } else if request.uri().path() == "/metrics" {
        refresh().await;
        let header = hyper::header::HeaderValue::from_static(CONTENT_TYPE);
        response.headers_mut().insert(HEADER, header);
        *response.body_mut() = Full::from(metrics.text());
    } else {
        *response.status_mut() = StatusCode::NOT_FOUND;
        *response.body_mut() = Full::from("metrics are at /metrics\n");
    }
    Ok(response)
}
