//! What a coordinator needs to know.

use crate::error::CoordinatorError;
use duet_config::{Config, Telemetry};
use duet_core::Digest;
use duet_core::spec::RunSpec;
use duet_core::work::PromptRow;
use duet_service::server::Limits;
use duet_service::tls::TlsFiles;
use duet_store::Store;
use duet_store::checkpoint::Retention;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A coordinator, before it is built.
#[derive(Clone, Debug)]
pub struct Options {
    /// The run's name.
    pub run: String,
    /// Hash over the configuration that decides results; workers must have the same.
    pub config: Digest,
    /// The whole configuration, without secrets, to be kept with the run.
    pub config_text: String,
    /// The run.
    pub spec: RunSpec,
    /// Its prompts.
    pub prompts: Arc<[PromptRow]>,
    /// Where everything durable lies.
    pub store: Store,
    /// `host:port` to listen on; port 0: any free one.
    pub listen: String,
    /// A file that gets the address once requests are taken.
    pub ready_file: Option<PathBuf>,
    /// Go on with the run that the store holds.
    pub resume: bool,
    /// Between two heartbeats of a worker.
    pub heartbeat: Duration,
    /// A poll is answered with nothing after this.
    pub poll: Duration,
    /// From the wish to stop to the end without a checkpoint; the journal then holds what is new.
    pub stop_within: Duration,
    /// From the end of the run to the end of the process, for workers to ask and be sent home.
    pub farewell: Duration,
    /// Which checkpoints are kept.
    pub retention: Retention,
    /// Certificates; `None`: plaintext.
    pub tls: Option<TlsFiles>,
    /// What is taken from whom.
    pub limits: Limits,
    /// Where metrics and traces go.
    pub telemetry: Telemetry,
    /// Whether rollouts that no restart needs are kept for replays.
    pub keep_rollouts: bool,
    /// Whether journal segments that no restart needs are kept for audits.
    pub keep_journal: bool,
}

/// For workers to ask for work once more and be sent home.
const FAREWELL: Duration = Duration::from_secs(30);
/// Objects of checkpoints that were never completed are kept so long.
const GRACE_MS: u64 = 3_600_000;

impl Options {
    /// What a configuration says; opens the store and reads the prompts.
    ///
    /// # Errors
    /// The store cannot be opened, or the prompts cannot be read: the error names the file and line.
    pub fn new(config: &Config) -> Result<Options, CoordinatorError> {
        let coordinator = &config.coordinator;
        Ok(Options {
            run: config.run.name.clone(),
            config: config.digest(),
            config_text: config.to_toml(),
            spec: config.run_spec(),
            prompts: config.read_prompts()?.into(),
            store: Store::open(&config.store_url())?,
            listen: coordinator.listen.clone(),
            ready_file: None,
            resume: false,
            heartbeat: Duration::from_millis(coordinator.heartbeat_ms),
            poll: Duration::from_millis(coordinator.poll_ms),
            stop_within: Duration::from_millis(coordinator.stop_ms),
            farewell: FAREWELL,
            retention: Retention {
                last: config.checkpoint.keep,
                every: u64::from(config.checkpoint.keep_every),
                grace_ms: GRACE_MS,
            },
            tls: config.security.tls("coordinator").map(TlsFiles::from),
            limits: Limits {
                requests_per_second: coordinator.requests_per_second,
                connections: coordinator.max_connections,
            },
            telemetry: config.telemetry.clone(),
            keep_rollouts: config.checkpoint.keep_rollouts,
            keep_journal: config.checkpoint.keep_journal,
        })
    }
}
