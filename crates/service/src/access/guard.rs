//! The guard before every service.

use super::bucket::Buckets;
use super::refusals::Refusals;
use super::{Peer, allowed, table};
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

/// A call that is not held must be answered within this.
const ANSWER: Duration = Duration::from_secs(60);
/// Longest path that is kept for the log: longer ones are nobody's.
const PATH: usize = 128;

/// Lets pass who may call, as often as it may.
#[derive(Clone)]
pub struct Guard {
    refusals: Arc<Refusals>,
    buckets: Arc<Buckets>,
}

impl Guard {
    /// Each address may make so many requests a second.
    pub fn new(refusals: Arc<Refusals>, per_second: u32) -> Guard {
        Guard { refusals, buckets: Arc::new(Buckets::new(per_second)) }
    }

    fn check(&self, request: &Request<Body>) -> Result<(), Status> {
        let path = request.uri().path();
        let Some(peer) = request.extensions().get::<Peer>() else {
            return Err(Status::internal("a connection without a peer"));
        };
        let ip = peer.address.ip();
        let named = || {
            // An unknown path is the caller's own invention, and there could be any number of them.
            let path = if table::find(path).is_some() { path } else { "another call" };
            format!("{path} as {}", peer.shown.name())
        };
        allowed(&peer.shown, path.get(..PATH).unwrap_or(path)).inspect_err(|status| {
            self.refusals.note(Some(ip), &named(), "role", status.message());
        })?;
        self.take(ip)
    }

    /// Counts a request of an address.
    fn take(&self, ip: IpAddr) -> Result<(), Status> {
        self.buckets.take(anyone(ip), Instant::now()).map_err(|wait| {
            let wait = wait.as_millis().max(1);
            let text = format!("too many requests from {ip}: try again in {wait} ms");
            self.refusals.note(Some(ip), "requests", "rate", &text);
            let mut status = Status::resource_exhausted(text);
            if let Ok(value) = wait.to_string().parse() {
                // https://github.com/grpc/proposal/blob/master/A6-client-retries.md
                status.metadata_mut().insert("grpc-retry-pushback-ms", value);
            }
            status
        })
    }
}

/// Counts the messages of a call that has many, as if each were a call.
#[derive(Clone)]
pub struct Meter {
    guard: Guard,
    ip: IpAddr,
}

impl Meter {
    /// Counts one.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` when the address sends too many.
    pub fn count(&self) -> Result<(), Status> {
        self.guard.take(self.ip)
    }
}

/// An IPv4 address that came as an IPv6 one is the same peer.
fn anyone(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(six) => six.to_ipv4_mapped().map_or(ip, |four: Ipv4Addr| IpAddr::V4(four)),
        IpAddr::V4(_) => ip,
    }
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { guard: self.clone(), inner }
    }
}

/// A service behind the guard.
#[derive(Clone)]
pub struct Guarded<S> {
    guard: Guard,
    inner: S,
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if let Err(status) = self.guard.check(&request) {
            return Box::pin(async move { Ok(status.into_http()) });
        }
        if let Some(ip) = request.extensions().get::<Peer>().map(|peer| peer.address.ip()) {
            request.extensions_mut().insert(Meter { guard: self.guard.clone(), ip });
        }
        let held = table::find(request.uri().path()).is_some_and(|call| call.held);
        let answer = self.inner.call(request);
        if held {
            return Box::pin(answer);
        }
        Box::pin(async move {
            match tokio::time::timeout(ANSWER, answer).await {
                Ok(answer) => answer,
                Err(_) => {
                    let text = format!("no answer within {} s: try again", ANSWER.as_secs());
                    Ok(Status::deadline_exceeded(text).into_http())
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Shown;
    use crate::metrics::{Metrics, table::Place};
    use std::convert::Infallible;
    use tower::service_fn;

    #[tokio::test]
    async fn the_messages_of_a_call_count_as_calls_of_its_address() {
        let refusals = Arc::new(Refusals::new(Metrics::new(Place::Coordinator)));
        let service = service_fn(async |request: Request<Body>| {
            let meter = request.extensions().get::<Meter>().cloned();
            let meter = meter.ok_or("no meter");
            // As many as no refill makes up for.
            let told = meter.map(|meter| (0..10_000).find_map(|_| meter.count().err()));
            let told = told.ok().flatten().unwrap_or_else(|| Status::internal("never refused"));
            Ok::<_, Infallible>(told.into_http())
        });
        let mut guarded = Guard::new(refusals, 1).layer(service);
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = "/duet.v1.WorkerService/Exchange".parse().unwrap();
        let address = "127.0.0.1:9".parse().unwrap();
        request.extensions_mut().insert(Peer { address, shown: Shown::Nothing });
        let answer = guarded.call(request).await.unwrap();
        let code = answer.headers().get("grpc-status").unwrap().to_str().unwrap();
        assert_eq!(code, (tonic::Code::ResourceExhausted as i32).to_string());
    }
}
