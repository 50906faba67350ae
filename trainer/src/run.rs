//! `run`: from the configuration to a rank in session with its coordinator.

use crate::address;
use crate::args::RunArgs;
use crate::error::TrainError;
use crate::failure::Failure;
use crate::rank::RankState;
use crate::serve::{Trainer, serve};
use crate::translate;
use duet_config::Config;
use duet_core::Role;
use duet_service::observe::{Observer, Showing};
use duet_service::place::Worker as Who;
use duet_service::shutdown;
use duet_service::traces::Run;
use duet_service::worker::{Session, SessionError, WorkerOptions};
use duet_store::Store;
use duet_torch::device::DeviceThread;
use std::time::Duration;

/// Works for a run until it is over or this process is told to stop.
///
/// # Errors
/// [`Failure`] with the exit code.
pub fn run(args: &RunArgs, who: &Who) -> Result<(), Failure> {
    let environment = duet_config::environment();
    let config = Config::load(&args.config, &environment, &args.set)?;
    let options = WorkerOptions::of(&config, Role::Trainer, &args.coordinator, &who.id)?;
    let threads = config.workers.threads;
    let torch = duet_torch::init(threads).map_err(TrainError::from)?;
    let own = translate::device(&config, torch.gpus, who.place)?;
    let host = match &args.host {
        Some(host) => host.clone(),
        None => address::towards(&args.coordinator).map_err(Failure::Io)?,
    };
    let settings = translate::settings(&config, own);
    let device = DeviceThread::spawn("device", move || {
        let model = settings.model.display().to_string();
        let state = RankState::new(settings, threads)?;
        tracing::info!(model, "model loaded");
        Ok::<_, TrainError>(state)
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::Io(format!("cannot start the runtime: {error}")))?;
    runtime.block_on(work(who, &config, options, (device, host)))
}

/// In session until the end.
async fn work(
    who: &Who,
    config: &Config,
    options: WorkerOptions,
    (device, host): (DeviceThread<RankState>, String),
) -> Result<(), Failure> {
    let store = Store::open(&config.store_url()).map_err(|error| Failure::Io(error.to_string()))?;
    let token = shutdown::token()
        .map_err(|error| Failure::Io(format!("cannot listen for signals: {error}")))?;
    let observer = observer(who, config).await?;
    let mut session = match Session::connect(options, token).await {
        Err(SessionError::Stopped) => return Ok(()),
        session => session?.observed(observer.clone()),
    };
    let deadline = Duration::from_millis(config.trainer.collective_timeout_ms);
    let mut trainer = Trainer::new(device, store, (host, deadline), session.aborted());
    let reason = match serve(&mut session, &mut trainer).await {
        Err(SessionError::Stopped) => "told to stop by a signal".to_owned(),
        reason => reason?,
    };
    tracing::info!(reason, "leaving");
    session.leave(&reason).await;
    observer.finish().await;
    trainer.end().await;
    Ok(())
}

/// Metrics and traces, as `[telemetry]` says.
async fn observer(who: &Who, config: &Config) -> Result<Observer, Failure> {
    let run = Run { name: config.run.name.clone(), config: config.digest() };
    let telemetry = &config.telemetry;
    let showing = Showing {
        run: &run,
        worker: &who.id,
        role: "trainer",
        metrics: telemetry.worker_metrics.as_deref(),
        otlp: telemetry.otlp.as_deref(),
    };
    Observer::start(showing).await.map_err(|error| Failure::Io(error.to_string()))
}
