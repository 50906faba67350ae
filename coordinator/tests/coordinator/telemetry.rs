//! Metrics are scraped and traces exported from a real run: over HTTP, and to a collector that speaks
//! OTLP over gRPC.

use crate::common::workers::Crew;
use crate::common::{Running, options, until, within};
use duet_coordinator::Service;
use duet_proto::v1::RunState;
use duet_service::metrics::table::{self, Kind, Place};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::{Span, status::StatusCode};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Keeps what it is sent, with the name of the service that sent it.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut kept = self.0.lock().unwrap();
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap().attributes;
            let name = attributes.iter().find(|a| a.key == "service.name").unwrap();
            let service = format!("{:?}", name.value);
            for scope in resource.scope_spans {
                kept.extend(scope.spans.into_iter().map(|span| (service.clone(), span)));
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn collector() -> (String, Collector) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let collector = Collector::default();
    let service = TraceServiceServer::new(collector.clone());
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (url, collector)
}

/// One request on a connection of its own; status line, header and body.
async fn get(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("{request} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    within("an answer", stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

/// The value of a series, which may stand with an empty set of labels.
fn value(page: &str, series: &str) -> f64 {
    let line = page.lines().find_map(|line| {
        let rest = line.strip_prefix(series)?;
        rest.strip_prefix("{}").unwrap_or(rest).strip_prefix(' ')
    });
    line.unwrap_or_else(|| panic!("no {series} in\n{page}")).parse().unwrap()
}

#[tokio::test]
async fn a_run_can_be_scraped() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path(), 3);
    options.telemetry.metrics = Some("127.0.0.1:0".to_owned());
    let (store, config) = (options.store.clone(), options.config);
    let service = Service::build(options).await.unwrap();
    let address = service.metrics_address().unwrap();
    let running = Running::serve(service);
    assert!(get(address, "GET /").await.starts_with("HTTP/1.1 404"));
    assert!(get(address, "POST /metrics").await.starts_with("HTTP/1.1 405"));
    let before = get(address, "GET /metrics").await;
    assert_eq!(value(&before, "duet_run_state{state=\"starting\"}"), 1.0);
    assert_eq!(value(&before, "duet_policy_version"), 0.0);

    let crew = Crew::hire(&running.url, &store, config);
    until(&running.url, "completion", |s| s.state() == RunState::Completed).await;
    let page = get(address, "GET /metrics").await;
    assert!(page.contains("content-type: application/openmetrics-text; version=1.0.0"));
    assert!(page.trim_end().ends_with("# EOF"));
    assert_eq!(value(&page, "duet_run_state{state=\"completed\"}"), 1.0);
    assert!(!page.contains("state=\"starting\""));
    assert_eq!(value(&page, "duet_policy_version"), 3.0);
    assert_eq!(value(&page, "duet_checkpoint_version"), 3.0);
    assert_eq!(value(&page, "duet_images_total"), 24.0);
    for (stage, count) in [("think", 6.0), ("render", 12.0), ("score", 12.0)] {
        let series = |name: &str| format!("{name}{{stage=\"{stage}\"}}");
        assert_eq!(value(&page, &series("duet_leases_granted_total")), count);
        assert_eq!(value(&page, &series("duet_lease_seconds_count")), count);
        assert_eq!(value(&page, &series("duet_leases")), 0.0);
    }
    assert_eq!(value(&page, "duet_step_seconds_count"), 3.0);
    assert_eq!(value(&page, "duet_training{name=\"loss\"}"), 0.1);
    assert!(value(&page, "duet_checkpoint_seconds_count") >= 1.0);
    assert!(value(&page, "duet_journal_append_seconds_count") > 0.0);
    assert!(value(&page, "duet_journal_records_total") > 30.0);
    let told = value(&page, "duet_publish_seconds_count");
    assert!(told >= 1.0 && value(&page, "duet_publish_bytes_total") >= told, "{page}");
    let weights = crate::common::status(&running.url).await.publication.unwrap();
    assert!(weights.version >= 1 && weights.bytes > 0, "{weights:?}");
    assert!(weights.seconds <= value(&page, "duet_publish_seconds_sum"), "{weights:?}\n{page}");
    assert_eq!(weights.workers, 0, "all of them left");

    // Whatever is shown stands in the table, as what it is.
    for line in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        let found = table::ALL.iter().find(|metric| {
            metric.place == Place::Coordinator
                && metric.name.strip_suffix("_total").unwrap_or(metric.name) == name
        });
        let found = found.unwrap_or_else(|| panic!("{name} is not in the table"));
        assert_eq!(found.kind.as_str(), kind, "{name}");
        assert_eq!(found.kind == Kind::Counter, found.name.ends_with("_total"));
    }
    crew.home().await;
    running.ended().await.unwrap();
}

#[tokio::test]
async fn a_trees_life_is_traced_across_processes() {
    let (url, collector) = collector().await;
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path(), 2);
    options.telemetry.otlp = Some(url);
    let (store, config) = (options.store.clone(), options.config);
    let telemetry = options.telemetry.clone();
    let running = Running::start(options).await;
    let crew = Crew::hire_observed(&running.url, &store, config, &telemetry).await;
    until(&running.url, "completion", |s| s.state() == RunState::Completed).await;
    crew.home().await;
    running.ended().await.unwrap();

    let spans = collector.0.lock().unwrap().clone();
    let by_id: BTreeMap<&[u8], &(String, Span)> =
        spans.iter().map(|kept| (kept.1.span_id.as_slice(), kept)).collect();
    assert_eq!(by_id.len(), spans.len(), "every span was sent once");
    let count = |name: &str| spans.iter().filter(|(_, span)| span.name == name).count();
    for (name, expected) in [
        ("tree", 4),
        ("lease think", 4),
        ("think", 4),
        ("lease render", 8),
        ("render", 8),
        ("lease score", 8),
        ("score", 8),
        ("step", 2),
        ("step of a rank", 4),
        ("publication", 2),
    ] {
        assert_eq!(count(name), expected, "{name}");
    }
    assert!(count("hold weights") >= 2 && count("train") == count("publish"));
    let mut crossings = 0;
    for (service, span) in &spans {
        assert!(span.end_time_unix_nano >= span.start_time_unix_nano, "{}", span.name);
        let failed = span.status.as_ref().is_some_and(|s| s.code() == StatusCode::Error);
        assert!(!failed, "{span:?}");
        for link in &span.links {
            let (_, linked) = by_id.get(link.span_id.as_slice()).expect("a link leads somewhere");
            assert_eq!(linked.trace_id, link.trace_id);
        }
        if span.parent_span_id.is_empty() {
            assert!(["tree", "step", "publication"].contains(&span.name.as_str()), "{}", span.name);
            continue;
        }
        let (parent_service, parent) =
            by_id.get(span.parent_span_id.as_slice()).unwrap_or_else(|| panic!("{span:?}"));
        assert_eq!(parent.trace_id, span.trace_id, "{}", span.name);
        crossings += usize::from(parent_service != service);
    }
    // Each lease, each rank's step and each fetch was done in another process than it was given out.
    assert_eq!(crossings, 4 + 8 + 8 + 4 + count("hold weights"));
}
