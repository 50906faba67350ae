//! OpenTelemetry traces of a tree's life, across processes, exported by OTLP over gRPC.
//!
//! Spans are made whole when they end, with ids that follow from what they are about ([`points`]),
//! and handed to OpenTelemetry's own batching exporter: a bounded queue and a thread of its own. When
//! the collector does not keep up or is away, spans are lost and the run goes on.

pub mod points;

pub use points::{Point, Run};

use opentelemetry::trace::{Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor,
};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Spans that wait to be sent; more of them are dropped.
const QUEUE: usize = 16_384;
/// Between two messages to the collector.
const INTERVAL: Duration = Duration::from_secs(1);
/// For a message, and for the last ones when the process ends.
const DEADLINE: Duration = Duration::from_secs(5);

/// The exporter cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("telemetry.otlp: `{url}` cannot be used: {reason}")]
pub struct TraceError {
    url: String,
    reason: String,
}

/// Which process speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process<'a> {
    /// `duet-coordinator`, `duet-rollout-worker`, ...
    pub service: &'a str,
    /// Its name in the run: `rollout-0`.
    pub instance: &'a str,
}

/// A span that has ended.
#[derive(Clone, Debug)]
pub struct Span {
    /// What it is about.
    pub point: Point,
    /// When it began.
    pub start: SystemTime,
    /// When it ended.
    pub end: SystemTime,
    /// Why it came to nothing, if it did.
    pub error: Option<String>,
    /// Anything worth knowing.
    pub attributes: Vec<(&'static str, String)>,
    /// What it has to do with in other traces.
    pub links: Vec<Point>,
}

impl Span {
    /// From `start` to `end`, in milliseconds since 1970.
    pub fn between(point: Point, start: duet_core::Millis, end: duet_core::Millis) -> Span {
        let at = |millis: duet_core::Millis| UNIX_EPOCH + Duration::from_millis(millis.0);
        let (start, end) = (at(start), at(end));
        Span { point, start, end, error: None, attributes: Vec::new(), links: Vec::new() }
    }

    /// From `took` ago until now.
    pub fn ended(point: Point, took: Duration) -> Span {
        let end = SystemTime::now();
        let start = end.checked_sub(took).unwrap_or(UNIX_EPOCH);
        Span { point, start, end, error: None, attributes: Vec::new(), links: Vec::new() }
    }

    /// With an attribute.
    pub fn with(mut self, name: &'static str, value: impl ToString) -> Span {
        self.attributes.push((name, value.to_string()));
        self
    }

    /// Failed for this reason, if there is one.
    pub fn failed(mut self, reason: Option<&str>) -> Span {
        self.error = reason.map(str::to_owned);
        self
    }

    /// With links to points of other traces.
    pub fn linked(mut self, links: impl IntoIterator<Item = Point>) -> Span {
        self.links.extend(links);
        self
    }
}

/// Sends spans, or does nothing. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Traces {
    inner: Option<Arc<Inner>>,
}

#[derive(Debug)]
struct Inner {
    run: Run,
    processor: BatchSpanProcessor,
    scope: InstrumentationScope,
}

impl Traces {
    /// Sends nothing.
    pub fn off() -> Traces {
        Traces::default()
    }

    /// Sends to the collector at `url`; `None`: nothing. To be called within a runtime, which must
    /// last until [`Traces::finish`].
    ///
    /// # Errors
    /// The address is none.
    pub fn start(url: Option<&str>, run: Run, process: Process<'_>) -> Result<Traces, TraceError> {
        let Some(url) = url else { return Ok(Traces::off()) };
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(url)
            .with_timeout(DEADLINE)
            .build()
            .map_err(|error| TraceError { url: url.to_owned(), reason: error.to_string() })?;
        let config = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE)
            .with_scheduled_delay(INTERVAL)
            .build();
        let mut processor = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
        let resource = Resource::builder_empty()
            .with_service_name(process.service.to_owned())
            .with_attribute(KeyValue::new("service.namespace", "duet"))
            .with_attribute(KeyValue::new("service.instance.id", process.instance.to_owned()))
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attribute(KeyValue::new("duet.run", run.name.clone()))
            .build();
        processor.set_resource(&resource);
        let scope = InstrumentationScope::builder("duet").build();
        Ok(Traces { inner: Some(Arc::new(Inner { run, processor, scope })) })
    }

    /// Whether spans are of any use.
    pub fn is_on(&self) -> bool {
        self.inner.is_some()
    }

    /// Sends a span, soon.
    pub fn send(&self, span: Span) {
        if let Some(inner) = &self.inner {
            inner.processor.on_end(inner.data(span));
        }
    }

    /// Sends what waits, for at most five seconds. Spans after it are lost.
    pub async fn finish(&self) {
        let Some(inner) = self.inner.clone() else { return };
        let ended =
            tokio::task::spawn_blocking(move || inner.processor.shutdown_with_timeout(DEADLINE));
        if let Ok(Err(error)) = ended.await {
            tracing::warn!(%error, "the last spans did not reach the collector");
        }
    }
}

impl Inner {
    fn context(&self, point: &Point) -> SpanContext {
        let (trace, span) = (self.run.trace_id(point), self.run.span_id(point));
        SpanContext::new(trace, span, TraceFlags::SAMPLED, false, TraceState::default())
    }

    fn data(&self, span: Span) -> SpanData {
        let attributes = span.attributes.into_iter();
        let mut links = SpanLinks::default();
        links.links =
            span.links.iter().map(|point| Link::with_context(self.context(point))).collect();
        let parent = span.point.parent();
        let remote = matches!(span.point, Point::Work(_) | Point::Rank(..) | Point::Hold(..));
        let leased =
            matches!(span.point, Point::Lease(_) | Point::Step(..) | Point::Publication(_));
        SpanData {
            span_context: self.context(&span.point),
            parent_span_id: parent.map_or(SpanId::INVALID, |parent| self.run.span_id(&parent)),
            parent_span_is_remote: remote,
            span_kind: match () {
                () if remote => SpanKind::Consumer,
                () if leased => SpanKind::Producer,
                () => SpanKind::Internal,
            },
            name: span.point.name().into(),
            start_time: span.start,
            end_time: span.end.max(span.start),
            attributes: attributes.map(|(name, value)| KeyValue::new(name, value)).collect(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links,
            status: span.error.map_or(Status::Unset, Status::error),
            instrumentation_scope: self.scope.clone(),
        }
    }
}
