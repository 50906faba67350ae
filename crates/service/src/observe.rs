//! What a process shows of itself to Prometheus and to an OpenTelemetry collector.

use crate::metrics::{self, Metrics, Scraped, table};
use crate::traces::{Point, Process, Run, Span, Traces};
use duet_core::work::{Assignment, Outcome, Report, Weights};
use duet_core::{TrainerEpoch, WorkerId};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The metrics and traces of a worker, which its session feeds. Cheap to clone; [`Observer::off`] shows
/// nothing.
#[derive(Clone)]
pub struct Observer {
    metrics: Metrics,
    traces: Traces,
    worker: WorkerId,
    /// What was received last, and when: a worker does one thing at a time.
    held: Arc<Mutex<(Instant, Held)>>,
}

/// What a report is about and does not say itself.
#[derive(Clone, Copy, Debug)]
enum Held {
    /// Weights of so many bytes.
    Weights(u64),
    /// A step of this iteration.
    Step(u32),
    Other,
}

/// Who a worker is and where it shows itself.
#[derive(Clone, Copy, Debug)]
pub struct Showing<'a> {
    /// The run.
    pub run: &'a Run,
    /// Its name.
    pub worker: &'a str,
    /// `rollout`, `reward` or `trainer`.
    pub role: &'a str,
    /// `HOST:PORT` for `/metrics`; `None`: nowhere.
    pub metrics: Option<&'a str>,
    /// A collector of traces; `None`: none.
    pub otlp: Option<&'a str>,
}

/// Why a process cannot show itself.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// The port cannot be had.
    #[error(transparent)]
    Metrics(#[from] metrics::ServeError),
    /// The collector's address is none.
    #[error(transparent)]
    Traces(#[from] crate::traces::TraceError),
}

impl Observer {
    /// Shows nothing.
    pub fn off() -> Observer {
        Observer::new(Metrics::new(table::Place::Worker), Traces::off(), "")
    }

    fn new(metrics: Metrics, traces: Traces, worker: &str) -> Observer {
        let held = Arc::new(Mutex::new((Instant::now(), Held::Other)));
        Observer { metrics, traces, worker: worker.into(), held }
    }

    /// Starts what was asked for, on the runtime of the caller.
    ///
    /// # Errors
    /// [`ObserveError`].
    pub async fn start(showing: Showing<'_>) -> Result<Observer, ObserveError> {
        let metrics = Metrics::new(table::Place::Worker);
        let version = env!("CARGO_PKG_VERSION");
        metrics.set(&table::WORKER_INFO, &[showing.worker, showing.role, version], 1.0);
        let service = format!("duet-{}", showing.role);
        let process = Process { service: &service, instance: showing.worker };
        let traces = Traces::start(showing.otlp, showing.run.clone(), process)?;
        if let Some(address) = showing.metrics {
            let scraped: Scraped = metrics::bind(address).await?;
            tracing::info!(address = %scraped.address(), "metrics at /metrics");
            tokio::spawn(scraped.serve(metrics.clone(), || async {}));
        }
        Ok(Observer::new(metrics, traces, showing.worker))
    }

    /// The worker was given something to do.
    pub(crate) fn received(&self, assignment: &Assignment) {
        let held = match assignment {
            Assignment::Publish(weights) => Held::Weights(bytes(weights)),
            Assignment::Step(step) => Held::Step(step.iteration),
            _ => Held::Other,
        };
        *self.held() = (Instant::now(), held);
    }

    /// The worker has done what it was given, and is about to say so.
    pub(crate) fn reporting(&self, report: &Report) {
        let (since, held) = *self.held();
        let took = since.elapsed();
        let (kind, failure) = match (report, held) {
            (Report::Lease { id, outcome }, _) => (id.unit.stage(), failure(outcome)),
            (Report::PublishAck { .. }, _) => ("publish", None),
            (Report::PublishFailed { reason, .. }, _) => ("publish", Some(reason.clone())),
            (Report::StepDone(_), _) => ("step", None),
            (Report::TrainerFailed { kind, reason, .. }, Held::Step(_)) => {
                ("step", Some(format!("{kind}: {reason}")))
            }
            _ => return,
        };
        let outcome = if failure.is_none() { "done" } else { "failed" };
        self.metrics.add(&table::WORK, &[kind, outcome], 1.0);
        self.metrics.observe(&table::WORK_SECONDS, &[kind], took);
        if let Some(span) = self.span(report, held, took) {
            self.traces.send(span.failed(failure.as_deref()));
        }
    }

    fn span(&self, report: &Report, held: Held, took: Duration) -> Option<Span> {
        match (report, held) {
            (Report::Lease { id, .. }, _) => Some(
                Span::ended(Point::Work(*id), took)
                    .with("duet.unit", id.unit.place())
                    .with("duet.attempt", id.attempt.0),
            ),
            (Report::PublishAck { version }, Held::Weights(bytes))
            | (Report::PublishFailed { version, .. }, Held::Weights(bytes)) => Some(
                Span::ended(Point::Hold(*version, self.worker.clone()), took)
                    .with("duet.version", version.0)
                    .with("duet.bytes", bytes),
            ),
            (Report::StepDone(done), _) => {
                Some(rank(done.iteration, done.epoch, done.rank.0, took))
            }
            (Report::TrainerFailed { epoch, rank: number, .. }, Held::Step(iteration)) => {
                Some(rank(iteration, *epoch, number.0, took))
            }
            _ => None,
        }
    }

    fn held(&self) -> MutexGuard<'_, (Instant, Held)> {
        // Nothing that holds it can panic.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the last spans; to be called before the runtime ends.
    pub async fn finish(&self) {
        self.traces.finish().await;
    }
}

fn rank(iteration: u32, epoch: TrainerEpoch, rank: u32, took: Duration) -> Span {
    Span::ended(Point::Rank(iteration, epoch, rank), took)
        .with("duet.iteration", iteration)
        .with("duet.rank", rank)
}

fn failure(outcome: &Outcome) -> Option<String> {
    match outcome {
        Outcome::Done { .. } => None,
        Outcome::Failed { kind, reason } => Some(format!("{kind}: {reason}")),
        Outcome::HandedBack => Some("handed back".to_owned()),
    }
}

fn bytes(weights: &Weights) -> u64 {
    [&weights.llm, &weights.dit].into_iter().flatten().map(|file| file.bytes).sum()
}
