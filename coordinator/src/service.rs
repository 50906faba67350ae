//! A coordinator from its options to its end.

use crate::codec;
use crate::driver::{Driver, KeeperLine, Patience, Terms, Witness};
use crate::error::CoordinatorError;
use crate::exposition;
use crate::grpc::{Control, Roles, StatusPage, Workers};
use crate::identity::Identity;
use crate::keeper::Keeper;
use crate::options::Options;
use crate::stall::Stall;
use duet_core::scheduler::{FinishReason, Record, Scheduler, State};
use duet_service::metrics::{self, Metrics, Scraped, table::Place};
use duet_service::server::{self, Server};
use duet_service::traces::{Process, Run, Traces};
use duet_store::{Journal, Opened, Store, keys};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// For a disk of this machine to take what is written to it.
const HELD_UP: Duration = Duration::from_secs(30);
/// For the last word of a process that was held up.
const SAYING: Duration = Duration::from_secs(5);
/// For calls in flight after the driver has ended.
const CLOSING: Duration = Duration::from_secs(5);
/// For the keeper to write what is still in its queue.
const KEEPING: Duration = Duration::from_secs(120);

/// A coordinator that listens and has its journal open, but serves nobody yet.
pub struct Service {
    options: Options,
    server: Server,
    scraped: Option<Scraped>,
    metrics: Metrics,
    opened: Restored,
}

/// A journal and what it says.
struct Restored {
    journal: Journal,
    scheduler: Scheduler,
}

impl Service {
    /// Listens, claims the store and restores the run.
    ///
    /// The port comes first: who cannot have it must not take the journal over.
    ///
    /// # Errors
    /// [`CoordinatorError`], naming what is in the way; the store is then as it was.
    pub async fn build(options: Options) -> Result<Service, CoordinatorError> {
        options
            .spec
            .check(options.prompts.len())
            .map_err(duet_core::scheduler::RestoreError::from)?;
        let metrics = Metrics::new(Place::Coordinator);
        let server = server::server_with(
            &options.listen,
            options.tls.as_ref(),
            options.limits,
            metrics.clone(),
        )
        .await?;
        let scraped = match &options.telemetry.metrics {
            Some(address) => Some(metrics::bind(address).await?),
            None => None,
        };
        if let Some(scraped) = &scraped {
            tracing::info!(address = %scraped.address(), "metrics at /metrics");
        }
        options.store.reach().await?;
        let new = Identity::claim(&options).await?;
        let opened = restore(&options).await?;
        let state = opened.scheduler.state();
        let (run, generation) = (&options.run, opened.journal.generation());
        let (version, address) = (state.version, server.address());
        tracing::info!(run, new, %generation, %version, %address, "coordinator");
        Ok(Service { options, server, scraped, metrics, opened })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Where it serves `/metrics`, if it does.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.scraped.as_ref().map(Scraped::address)
    }

    /// Serves until the run has ended or `shutdown` asked for the end and it has come.
    ///
    /// # Errors
    /// [`CoordinatorError::RunFailed`] when the run cannot go on; the journal or the server failed.
    pub async fn run(self, shutdown: CancellationToken) -> Result<FinishReason, CoordinatorError> {
        let Service { options, server, scraped, metrics, opened } = self;
        let traces = traces(&options)?;
        let (keeper, jobs, kept) = Keeper::new(&options)?;
        let terms = Terms {
            run: options.run.clone(),
            config: options.config,
            generation: opened.journal.generation(),
            heartbeat: options.heartbeat,
            poll: options.poll,
            keep_journal: options.keep_journal,
        };
        let patience = Patience { stop: options.stop_within, farewell: options.farewell };
        let line = KeeperLine { jobs, kept };
        let Restored { journal, scheduler } = opened;
        let witness = Witness::new(metrics.clone(), traces.clone());
        let _stall = watch_thread(&options.store)?;
        let (driver, handle) =
            Driver::new(scheduler, journal, terms, line, patience, witness, shutdown);

        let closing = CancellationToken::new();
        let (address, roles) = (server.address(), Roles::new(server.refusals()));
        let server = server
            .with_worker(Workers::new(handle.clone(), roles.clone(), closing.clone()))
            .await
            .with_status(StatusPage::new(handle.clone(), closing.clone()))
            .await
            .with_control(Control::new(handle.clone(), roles))
            .await;
        let scraping = scraped.map(|scraped| {
            let values = metrics.clone();
            let refresh = move || exposition::refresh(handle.clone(), metrics.clone());
            tokio::spawn(scraped.serve(values, refresh))
        });
        let keeper = tokio::spawn(keeper.run());
        let mut serving = tokio::spawn(server.serve(closing.clone()));
        if let Some(path) = &options.ready_file {
            let scheme = if options.tls.is_some() { "https" } else { "http" };
            announce(path, scheme, address)?;
        }
        let ended = tokio::select! {
            ended = driver.run() => ended,
            served = &mut serving => Err(stopped_serving(served)),
        };
        closing.cancel();
        if !serving.is_finished() && tokio::time::timeout(CLOSING, serving).await.is_err() {
            tracing::warn!("calls in flight did not end in time");
        }
        if tokio::time::timeout(KEEPING, keeper).await.is_err() {
            tracing::warn!("tables were not written in time: resuming the run writes them");
        }
        if let Some(scraping) = scraping {
            scraping.abort();
        }
        traces.finish().await;
        match ended? {
            FinishReason::Failed(reason) => Err(CoordinatorError::RunFailed(reason)),
            reason => Ok(reason),
        }
    }
}

/// Ends the process when its thread is held up: nothing that is not durable may be done, and a thread
/// that waits for a disk cannot be had back.
fn watch_thread(store: &Store) -> Result<Stall, CoordinatorError> {
    let place = store.place().to_owned();
    let late = move || {
        let error = CoordinatorError::HeldUp { place, after: HELD_UP };
        let code = error.exit_code();
        // The log may lie on the same disk.
        let (writing, written) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            tracing::error!("{error}");
            drop(writing);
        });
        let _ = written.recv_timeout(SAYING);
        std::process::exit(code.into())
    };
    Stall::watch(HELD_UP, late).map_err(CoordinatorError::Runtime)
}

/// Traces as they are configured.
fn traces(options: &Options) -> Result<Traces, CoordinatorError> {
    let run = Run { name: options.run.clone(), config: options.config };
    let process = Process { service: "duet-coordinator", instance: "coordinator" };
    Ok(Traces::start(options.telemetry.otlp.as_deref(), run, process)?)
}

fn stopped_serving(
    served: Result<Result<(), server::ServerError>, tokio::task::JoinError>,
) -> CoordinatorError {
    match served {
        Ok(Err(error)) => error.into(),
        Ok(Ok(())) => CoordinatorError::RunFailed("the server ended before the run".to_owned()),
        Err(error) => CoordinatorError::RunFailed(format!("the server died: {error}")),
    }
}

/// Opens the journal and rebuilds the run from it.
async fn restore(options: &Options) -> Result<Restored, CoordinatorError> {
    let Opened { journal, generation, snapshot, records, torn } =
        Journal::open(&options.store, keys::JOURNAL).await?;
    if let Some(key) = torn {
        tracing::warn!(key, "the last segment was cut off by a crash; nobody was told of it");
    }
    let unreadable = |reason| CoordinatorError::Unreadable {
        place: options.store.place().to_owned(),
        key: keys::JOURNAL.to_owned(),
        reason,
    };
    let snapshot: Option<State> =
        snapshot.as_deref().map(codec::decode_state).transpose().map_err(unreadable)?;
    let records: Vec<Record> = records
        .iter()
        .map(|record| codec::decode_record(record))
        .collect::<Result<_, _>>()
        .map_err(unreadable)?;
    let (spec, prompts) = (options.spec.clone(), options.prompts.clone());
    let scheduler = Scheduler::restore(spec, prompts, generation, snapshot, records)?;
    if let Some((_, manifest)) = &scheduler.state().checkpoint {
        // Every trainer group starts from it: better to know now than from each rank in turn.
        options.store.checkpoints().read(manifest).await?;
    }
    Ok(Restored { journal, scheduler })
}

/// Writes the address for those who wait for it; whole or not at all.
fn announce(path: &Path, scheme: &str, address: SocketAddr) -> Result<(), CoordinatorError> {
    let failed = |source| CoordinatorError::File { path: path.display().to_string(), source };
    let host = match address.ip() {
        ip if ip.is_unspecified() => "127.0.0.1".to_owned(),
        ip if ip.is_ipv6() => format!("[{ip}]"),
        ip => ip.to_string(),
    };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    let aside = path.with_extension("new");
    std::fs::write(&aside, format!("{scheme}://{host}:{}\n", address.port())).map_err(failed)?;
    std::fs::rename(&aside, path).map_err(failed)
}
