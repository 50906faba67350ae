//! `duet launch`: a coordinator and local workers as child processes.
//!
//! ```text
//! start coordinator --ready file--> start workers --Status.Watch--> show ... until the coordinator ends
//!      |  dies: again with --resume, at the same address       |  dies: again        Ctrl-C: Stop
//!      +-------------------- at most RESTARTS times each -------+
//! ```

use crate::CliError;
use crate::args::{LaunchArgs, LaunchWithSftArgs};
use crate::children::{Logged, Memory, code, program};
use crate::client::{ADDRESS_FILE, Client, Run, Wish};
use crate::progress::Progress;
use crate::show::{bold, span};
use duet_config::{Config, Device};
use duet_service::tls::TlsFiles;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

/// How often a process may be started again before the launch gives up.
const RESTARTS: u32 = 5;
/// How long a coordinator may take until it listens.
const READY: Duration = Duration::from_secs(60);
/// How long workers may take to leave once the run is over.
const FAREWELL: Duration = Duration::from_secs(20);
/// How often files and children are looked at.
const LOOK: Duration = Duration::from_millis(50);
/// How often the status comes.
const EVERY: Duration = Duration::from_millis(500);
/// Exit code of a worker or coordinator whose configuration is wrong: starting it again is no use.
const BAD_CONFIG: i32 = 78;

/// How a launch ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The last status that was seen.
    pub run: Run,
    /// Whether a person stopped it.
    pub interrupted: bool,
    /// Seconds from start to end.
    pub seconds: f64,
}

/// Reads a configuration with overrides and the environment.
///
/// # Errors
/// It is wrong.
pub fn load(path: &Path, set: &[String]) -> Result<Config, CliError> {
    let env = duet_config::environment();
    Ok(Config::load(path, &env, set)?)
}

/// `duet launch`.
///
/// # Errors
/// The configuration is wrong, or a process cannot be kept alive.
pub async fn run(args: LaunchWithSftArgs) -> Result<u8, CliError> {
    let LaunchWithSftArgs { launch: args, skip_sft } = args;
    let memory = Memory::start();
    let (mut args, mut config) = (args.clone(), load(&args.config.config, &args.config.set)?);
    let again = format!("duet launch {} --resume", args.config.config.display());
    if config.sft.is_some() && !skip_sft {
        // What was never begun cannot be gone on with: SFT may have been what was interrupted.
        let begun = config.local_folder().join("logs/coordinator.log").exists();
        let Some(model) = crate::sft::stage(&config, &args, &again, &memory).await? else {
            return Ok(0);
        };
        let model = crate::demo::toml_string(&model.display().to_string());
        args.config.set.push(format!("model.path={model}"));
        args.resume &= begun;
        config = load(&args.config.config, &args.config.set)?;
    }
    let outcome = train(&config, &args, &memory).await?;
    farewell(&outcome, &again);
    eprintln!("  peak memory of all processes {:.0} MiB", memory.peak_mib());
    Ok(0)
}

/// Says how it ended and how to go on.
pub fn farewell(outcome: &Outcome, again: &str) {
    let (run, time) = (&outcome.run, span(outcome.seconds));
    if outcome.interrupted {
        eprintln!(
            "{} after iteration {} of {} ({time})",
            bold("stopped"),
            run.version,
            run.iterations
        );
        eprintln!("  go on with: {again}");
    } else {
        eprintln!(
            "{} {} iterations, {} images in {time}",
            bold("trained"),
            run.version,
            run.images
        );
    }
}

/// The folder of a run on this machine: logs, address file, report.
///
/// # Errors
/// The run's store is not on this machine and its folder cannot be made.
pub fn folder(config: &Config) -> Result<PathBuf, CliError> {
    let folder = config.local_folder();
    let logs = folder.join("logs");
    std::fs::create_dir_all(&logs).map_err(|e| CliError::io("create", &logs, e))?;
    Ok(folder)
}

/// Trains until the run is completed or stopped.
///
/// # Errors
/// A process cannot be kept alive.
pub async fn train(
    config: &Config,
    args: &LaunchArgs,
    memory: &Memory,
) -> Result<Outcome, CliError> {
    let started = Instant::now();
    let folder = folder(config)?;
    let mut fleet = Fleet::new(config, args, folder, memory.clone())?;
    let address = fleet.start_coordinator(args.resume).await?;
    fleet.start_workers(config, &address)?;
    let tls = config.security.tls("operator").map(TlsFiles::from);
    let client = Client::connect(&address, tls.as_ref(), true).await?;
    let mut progress = Progress::new();
    let result = fleet.follow(&client, &address, &mut progress).await;
    progress.finish();
    let (run, interrupted) = result?;
    fleet.see_off().await;
    Ok(Outcome { run, interrupted, seconds: started.elapsed().as_secs_f64() })
}

/// The newest checkpoint of a run in a folder.
///
/// # Errors
/// There is none, or it cannot be read.
pub async fn newest(folder: &Path) -> Result<duet_store::Manifest, CliError> {
    let usage = |e: duet_store::StoreError| CliError::Usage(e.to_string());
    let store = duet_store::Store::open(&folder.display().to_string()).map_err(usage)?;
    let newest = store.checkpoints().newest().await.map_err(usage)?;
    newest.ok_or_else(|| CliError::Usage(format!("{} holds no checkpoint", folder.display())))
}

/// `HOST:PORT` of an address.
fn listened(address: &str) -> String {
    address.split_once("://").map_or(address, |(_, place)| place).to_owned()
}

/// The arguments of `duet-rollout-worker` that put a run's weights, or their moving average, onto its
/// base model.
pub fn export_args(
    folder: &Path,
    base: &Path,
    out: &Path,
    manifest: &duet_store::Manifest,
    average: bool,
) -> Vec<String> {
    let text = |path: &Path| path.display().to_string();
    let mut args: Vec<String> =
        vec!["export".into(), "--model".into(), text(base), "--out".into(), text(out)];
    if average {
        for shard in manifest.shards.iter().flatten() {
            args.extend(["--average".to_owned(), text(&folder.join(&shard.key))]);
        }
        return args;
    }
    let weights = &manifest.weights;
    for (name, file) in [("--llm-weights", &weights.llm), ("--dit-weights", &weights.dit)] {
        if let Some(file) = file {
            args.extend([name.to_owned(), text(&folder.join(&file.key))]);
        }
    }
    args
}

/// A GPU for each rollout worker, then for each rank; scorers need none.
fn own_gpus(config: &Config) -> BTreeMap<String, u32> {
    if config.workers.device != Device::Cuda {
        return BTreeMap::new();
    }
    let rollout = (0..config.workers.rollout).map(|i| format!("rollout-{i}"));
    let trainer = (0..config.trainer.world_size).map(|i| format!("trainer-{i}"));
    rollout.chain(trainer).zip(0..).collect()
}

/// The processes of a launch.
struct Fleet {
    folder: PathBuf,
    config: PathBuf,
    set: Vec<String>,
    memory: Memory,
    coordinator: Option<Logged>,
    workers: Vec<(&'static str, Logged)>,
    /// Which GPU a worker takes, where several can be seen.
    own_gpus: BTreeMap<String, u32>,
    restarts: BTreeMap<String, u32>,
    address: Option<String>,
}

impl Fleet {
    fn new(
        config: &Config,
        args: &LaunchArgs,
        folder: PathBuf,
        memory: Memory,
    ) -> Result<Fleet, CliError> {
        for name in
            ["duet-coordinator", "duet-rollout-worker", "duet-reward-worker", "duet-trainer"]
        {
            program(name)?;
        }
        Ok(Fleet {
            own_gpus: own_gpus(config),
            folder,
            config: args.config.config.clone(),
            set: args.config.set.clone(),
            memory,
            coordinator: None,
            workers: Vec::new(),
            restarts: BTreeMap::new(),
            address: None,
        })
    }

    fn common(&self) -> Vec<String> {
        let mut args = vec!["--config".to_owned(), self.config.display().to_string()];
        for set in &self.set {
            args.extend(["--set".to_owned(), set.clone()]);
        }
        args
    }

    /// Starts the coordinator and waits until it listens; its address.
    async fn start_coordinator(&mut self, resume: bool) -> Result<String, CliError> {
        let file = self.folder.join(ADDRESS_FILE);
        if let Err(e) = std::fs::remove_file(&file)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            return Err(CliError::io("remove", &file, e));
        }
        let mut args = self.common();
        args.extend(["--ready-file".to_owned(), file.display().to_string()]);
        if let Some(address) = &self.address {
            args.extend(["--listen".to_owned(), listened(address)]);
        }
        if resume {
            args.push("--resume".to_owned());
        }
        let log = self.log("coordinator");
        let path = program("duet-coordinator")?;
        let mut child = Logged::start("coordinator", &path, &args, log, &self.memory)?;
        let until = Instant::now() + READY;
        while !file.is_file() {
            if let Some(status) = child.ended() {
                return Err(child.failure(status));
            }
            if Instant::now() > until {
                return Err(CliError::Usage(format!(
                    "the coordinator did not listen within {} s; see {}",
                    READY.as_secs(),
                    child.log.display()
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
        self.coordinator = Some(child);
        let address = crate::client::resolve(Some(&self.folder.display().to_string()))?;
        self.address = Some(address.clone());
        Ok(address)
    }

    fn log(&self, name: &str) -> PathBuf {
        self.folder.join("logs").join(format!("{name}.log"))
    }

    fn start_workers(&mut self, config: &Config, address: &str) -> Result<(), CliError> {
        let counts = [
            ("duet-rollout-worker", "rollout", config.workers.rollout),
            ("duet-reward-worker", "reward", config.workers.reward),
            ("duet-trainer", "trainer", config.trainer.world_size),
        ];
        for (name, role, count) in counts {
            for i in 0..count {
                let child = self.start_worker(name, &format!("{role}-{i}"), address)?;
                self.workers.push((name, child));
            }
        }
        Ok(())
    }

    fn start_worker(
        &self,
        name: &'static str,
        id: &str,
        address: &str,
    ) -> Result<Logged, CliError> {
        let mut args = vec!["run".to_owned()];
        args.extend(self.common());
        args.extend(["--coordinator", address, "--id", id].map(str::to_owned));
        if let Some(gpu) = self.own_gpus.get(id) {
            args.extend(["--local-rank".to_owned(), gpu.to_string()]);
        }
        Logged::start(id, &program(name)?, &args, self.log(id), &self.memory)
    }

    /// Shows the run until its coordinator ends; the last status, and whether a person stopped it.
    async fn follow(
        &mut self,
        client: &Client,
        address: &str,
        progress: &mut Progress,
    ) -> Result<(Run, bool), CliError> {
        let mut run = Run::default();
        let mut interrupted = false;
        let mut stream = client.watch(EVERY).await.ok();
        let mut look = tokio::time::interval(EVERY);
        loop {
            tokio::select! {
                next = next(&mut stream) => match next {
                    Some(now) => { progress.show(&now); run = now; }
                    None => stream = None,
                },
                _ = look.tick() => {
                    if let Some(status) = self.coordinator.as_mut().and_then(Logged::ended) {
                        if status.success() {
                            return Ok((run, interrupted));
                        }
                        self.revive_coordinator(status, progress).await?;
                    }
                    if stream.is_none() {
                        stream = client.watch(EVERY).await.ok();
                    }
                    self.revive_workers(address, &run, progress)?;
                }
                _ = tokio::signal::ctrl_c() => {
                    if interrupted {
                        return Err(CliError::Usage("interrupted twice: everything was killed; the run can be resumed from its journal".to_owned()));
                    }
                    interrupted = true;
                    progress.say("stopping in order: a checkpoint is being written (Ctrl-C again kills)");
                    client.control(Wish::Stop("interrupted at the terminal")).await?;
                }
            }
        }
    }

    async fn revive_coordinator(
        &mut self,
        status: ExitStatus,
        progress: &Progress,
    ) -> Result<(), CliError> {
        let Some(child) = self.coordinator.take() else { return Ok(()) };
        let failure = child.failure(status);
        // An exit with a code is the coordinator's own verdict; only a crash is worth another try.
        if status.code().is_some() {
            return Err(failure);
        }
        self.count_restart("coordinator").map_err(|()| failure)?;
        progress.say(&format!("coordinator died ({status}); starting it again"));
        let address = self.start_coordinator(true).await?;
        // Whoever its predecessor sent home may be needed again; if not, its successor says so.
        for i in 0..self.workers.len() {
            let (name, child) = &mut self.workers[i];
            if child.ended().is_some_and(|status| status.success()) {
                let (name, id) = (*name, child.name.clone());
                self.workers[i].1 = self.start_worker(name, &id, &address)?;
            }
        }
        Ok(())
    }

    fn revive_workers(
        &mut self,
        address: &str,
        run: &Run,
        progress: &Progress,
    ) -> Result<(), CliError> {
        for i in 0..self.workers.len() {
            let (name, child) = &mut self.workers[i];
            let (name, id) = (*name, child.name.clone());
            let Some(status) = child.ended() else { continue };
            if status.success() || run.over() {
                continue;
            }
            if status.code() == Some(BAD_CONFIG) || self.count_restart(&id).is_err() {
                return Err(self.workers[i].1.failure(status));
            }
            progress.say(&format!("{id} died ({status}); starting it again"));
            self.workers[i].1 = self.start_worker(name, &id, address)?;
        }
        Ok(())
    }

    fn count_restart(&mut self, name: &str) -> Result<(), ()> {
        let count = self.restarts.entry(name.to_owned()).or_default();
        *count += 1;
        if *count > RESTARTS { Err(()) } else { Ok(()) }
    }

    /// Waits for the workers, who were told to leave.
    async fn see_off(&mut self) {
        let until = tokio::time::Instant::now() + FAREWELL;
        for (_, worker) in &mut self.workers {
            match tokio::time::timeout_at(until, worker.wait()).await {
                Ok(Ok(status)) if !status.success() => {
                    tracing::warn!(
                        worker = worker.name,
                        code = code(&status),
                        "did not leave in order"
                    );
                }
                Ok(_) => {}
                Err(_) => worker.kill().await,
            }
        }
    }
}

async fn next(stream: &mut Option<tonic::Streaming<duet_proto::v1::WatchResponse>>) -> Option<Run> {
    match stream {
        Some(stream) => Client::next(stream).await,
        None => std::future::pending().await,
    }
}
