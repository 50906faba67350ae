//! `run`: from the configuration to a worker in session with its coordinator.

use crate::args::RunArgs;
use crate::failure::Failure;
use crate::http::Remote;
use crate::scorer::{Panel, Scorer};
use crate::serve::{Worker, serve};
use crate::world::WorldScorer;
use duet_config::{Config, Reward, Scorer as Kind};
use duet_core::Role;
use duet_service::observe::{Observer, Showing};
use duet_service::place::Worker as Who;
use duet_service::shutdown;
use duet_service::traces::Run;
use duet_service::worker::{Session, SessionError, WorkerOptions};
use duet_store::Store;
use duet_torch::device::DeviceThread;
use std::path::Path;
use std::time::Duration;

/// Works for a run until it is over or this process is told to stop.
///
/// # Errors
/// [`Failure`] with the exit code.
pub fn run(args: &RunArgs, who: &Who) -> Result<(), Failure> {
    let environment = duet_config::environment();
    let config = Config::load(&args.config, &environment, &args.set)?;
    let options = WorkerOptions::of(&config, Role::Reward, &args.coordinator, &who.id)?;
    duet_torch::init(config.workers.threads)?;
    let (folder, reward) = (config.model_path(), config.reward.clone());
    let device = DeviceThread::spawn("scorers", move || configured(&folder, &reward))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::Io(format!("cannot start the runtime: {error}")))?;
    runtime.block_on(work(who, &config, options, device))
}

/// The scorers that the configuration names.
pub(crate) fn configured(folder: &Path, reward: &Reward) -> Result<Panel, Failure> {
    let limit = Duration::from_millis(reward.timeout_ms);
    let load = |kind: &Kind| -> Result<Box<dyn Scorer>, Failure> {
        match (kind, &reward.http) {
            (Kind::Miniworld, _) => Ok(Box::new(WorldScorer::load(folder)?)),
            // A little sooner than the worker gives up, so that the reason is known.
            (Kind::Http, Some(http)) => Ok(Box::new(Remote::new(http, limit.mul_f64(0.95))?)),
            (Kind::Http, None) => {
                let reason = "reward.http: is missing: scorer `http` needs it".to_owned();
                Err(Failure::Config(reason))
            }
        }
    };
    let scorers = reward.scorers.iter().map(load).collect::<Result<_, _>>()?;
    Ok(Panel::new(scorers)?)
}

/// The small world's scorers alone.
pub(crate) fn small_world(folder: &Path) -> Result<Panel, Failure> {
    Ok(Panel::new(vec![Box::new(WorldScorer::load(folder)?)])?)
}

/// In session until the end.
async fn work(
    who: &Who,
    config: &Config,
    options: WorkerOptions,
    device: DeviceThread<Panel>,
) -> Result<(), Failure> {
    let store = Store::open(&config.store_url()).map_err(|error| Failure::Io(error.to_string()))?;
    let limit = Duration::from_millis(config.reward.timeout_ms);
    let worker = Worker::new(device, store.artifacts(), limit).await?;
    let wanted = config.reward.llm.keys().chain(config.reward.dit.keys());
    if let Some(missing) = wanted.into_iter().find(|name| !worker.components().contains(*name)) {
        let known: Vec<&str> = worker.components().iter().map(String::as_str).collect();
        return Err(Failure::Config(format!(
            "reward: no scorer gives `{missing}`; those of reward.scorers give {}",
            known.join(", ")
        )));
    }
    let token = shutdown::token()
        .map_err(|error| Failure::Io(format!("cannot listen for signals: {error}")))?;
    let observer = observer(who, config).await?;
    let mut session = match Session::connect(options, token).await {
        Err(SessionError::Stopped) => return Ok(()),
        session => session?.observed(observer.clone()),
    };
    let reason = match serve(&mut session, &worker).await {
        Err(SessionError::Stopped) => "told to stop by a signal".to_owned(),
        reason => reason?,
    };
    tracing::info!(reason, "leaving");
    session.leave(&reason).await;
    observer.finish().await;
    Ok(())
}

/// Metrics and traces, as `[telemetry]` says.
async fn observer(who: &Who, config: &Config) -> Result<Observer, Failure> {
    let run = Run { name: config.run.name.clone(), config: config.digest() };
    let telemetry = &config.telemetry;
    let showing = Showing {
        run: &run,
        worker: &who.id,
        role: "reward",
        metrics: telemetry.worker_metrics.as_deref(),
        otlp: telemetry.otlp.as_deref(),
    };
    Observer::start(showing).await.map_err(|error| Failure::Io(error.to_string()))
}
