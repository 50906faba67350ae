//! `run`: from the configuration to a worker in session with its coordinator.

use crate::args::RunArgs;
use crate::engine::{Adapters, Engine, Sampling};
use crate::error::WorkError;
use crate::failure::Failure;
use crate::serve::{Worker, serve};
use duet_config::{Config, ConfigError, DitObjective, Dtype, Lora, Sampler};
use duet_core::Role;
use duet_models::ModelError;
use duet_models::defaults::Defaults;
use duet_models::lora::LoraConfig;
use duet_models::pipeline::{LoadOptions, Pipeline};
use duet_models::render::RenderOptions;
use duet_models::sde::SdeKind;
use duet_service::observe::{Observer, Showing};
use duet_service::place::Worker as Who;
use duet_service::shutdown;
use duet_service::traces::Run;
use duet_service::worker::{Session, SessionError, WorkerOptions};
use duet_store::Store;
use duet_torch::device::DeviceThread;
use tch::Kind;

/// Works for a run until it is over or this process is told to stop.
///
/// # Errors
/// [`Failure`] with the exit code.
pub fn run(args: &RunArgs, who: &Who) -> Result<(), Failure> {
    let environment = duet_config::environment();
    let config = Config::load(&args.config, &environment, &args.set)?;
    let options = WorkerOptions::of(&config, Role::Rollout, &args.coordinator, &who.id)?;
    let torch = duet_torch::init(config.workers.threads)?;
    let gpu = who.place.device(config.workers.device, torch.gpus)?;
    let own = gpu.map_or(tch::Device::Cpu, |gpu| tch::Device::Cuda(gpu as usize));
    let sampling = sampling(&config).map_err(WorkError::from)?;
    let device = device(&config, own, sampling)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::Io(format!("cannot start the runtime: {error}")))?;
    runtime.block_on(work(who, &config, options, device))
}

/// In session until the end.
async fn work(
    who: &Who,
    config: &Config,
    options: WorkerOptions,
    device: DeviceThread<Engine>,
) -> Result<(), Failure> {
    let store = Store::open(&config.store_url()).map_err(|error| Failure::Io(error.to_string()))?;
    let token = shutdown::token()
        .map_err(|error| Failure::Io(format!("cannot listen for signals: {error}")))?;
    let observer = observer(who, config).await?;
    let mut session = match Session::connect(options, token).await {
        Err(SessionError::Stopped) => return Ok(()),
        session => session?.observed(observer.clone()),
    };
    let worker = Worker::new(device, store.artifacts());
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
        role: "rollout",
        metrics: telemetry.worker_metrics.as_deref(),
        otlp: telemetry.otlp.as_deref(),
    };
    Observer::start(showing).await.map_err(|error| Failure::Io(error.to_string()))
}

/// Loads the models, on the thread that will own them.
fn device(
    config: &Config,
    device: tch::Device,
    sampling: Sampling,
) -> Result<DeviceThread<Engine>, WorkError> {
    let folder = config.model_path();
    let kind = match config.model.dtype {
        Dtype::Float32 => Kind::Float,
        Dtype::Bfloat16 => Kind::BFloat16,
    };
    let options = LoadOptions { device, lm: kind, dit: kind, vae: Kind::Float };
    let adapters = Adapters {
        llm: config.llm.branch.lora.as_ref().map(adapter),
        dit: config.dit.branch.lora.as_ref().map(adapter),
    };
    // Trees in the making need the version of `lag` steps ago; one more is on its way.
    let versions = config.rollout.lag as usize + 2;
    DeviceThread::spawn("device", move || {
        let pipeline = Pipeline::load_with(&folder, options)?;
        tracing::info!(model = %folder.display(), "model loaded");
        Ok(Engine::new(pipeline, sampling, adapters, versions)?)
    })
}

/// An adapter in the models' words.
fn adapter(lora: &Lora) -> LoraConfig {
    LoraConfig { rank: i64::from(lora.rank), alpha: lora.alpha, targets: lora.targets.clone() }
}

/// `[rollout]` in the engine's words.
fn sampling(config: &Config) -> Result<Sampling, ModelError> {
    let rollout = &config.rollout;
    let instruction = match &rollout.instruction {
        Some(path) => std::fs::read_to_string(path).map_err(|error| ModelError::io(path, error))?,
        None => Defaults::read(&config.model_path())?.instruction,
    };
    Ok(Sampling {
        instruction,
        temperature: rollout.temperature,
        max_new_tokens: rollout.max_new_tokens as usize,
        render: RenderOptions {
            steps: rollout.steps as usize,
            guidance: rollout.guidance_scale,
            sde: match rollout.sampler {
                Sampler::FlowGrpo => SdeKind::FlowGrpo,
                Sampler::Cps => SdeKind::Cps,
                Sampler::Dance => SdeKind::Dance,
            },
            noise_level: rollout.noise_level,
            width: i64::from(rollout.width),
            height: i64::from(rollout.height),
        },
        keep_last: config.dit.objective == DitObjective::Nft,
    })
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::Read { .. } => Failure::Io(error.to_string()),
            error => Failure::Config(error.to_string()),
        }
    }
}
