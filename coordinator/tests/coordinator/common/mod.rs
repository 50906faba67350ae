//! A coordinator on loopback and scripted workers that talk to it over real gRPC.
#![allow(dead_code)] // each test file uses its own part

pub mod process;
pub mod workers;

use duet_coordinator::{CoordinatorError, Options, Service};
use duet_core::advantage::AdvantageSpec;
use duet_core::reward::RewardSpec;
use duet_core::schedule::{Schedule, WindowSpec};
use duet_core::scheduler::FinishReason;
use duet_core::spec::{RunSpec, Timing};
use duet_core::work::PromptRow;
use duet_core::{Digest, Millis};
use duet_proto::v1 as wire;
use duet_service::channel::{Channel, channel, status_client};
use duet_store::Store;
use duet_store::checkpoint::Retention;
use std::path::Path;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Longer than anything takes here: a test that reaches it has failed.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Waits for `future`, but not for ever.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} did not happen within {} s", DEADLINE.as_secs()),
    }
}

pub fn spec(iterations: u32) -> RunSpec {
    RunSpec {
        seed: 7,
        iterations,
        prompts_per_iteration: 2,
        traces: 2,
        leaves: 2,
        lag: 0,
        steps: 10,
        window: WindowSpec::Random { len: 2, low: 0, high: 5 },
        schedule: Schedule::Balanced,
        reward: RewardSpec {
            llm: [("semantic".to_owned(), 1.0)].into(),
            dit: [("semantic".to_owned(), 1.0)].into(),
            ..RewardSpec::default()
        },
        llm_advantage: AdvantageSpec::default(),
        dit_advantage: AdvantageSpec::default(),
        extra_prompts: 0,
        world: 2,
        min_world: 0,
        checkpoint_every: 2,
        max_attempts: 3,
        quarantine_after: 8,
        timing: Timing { backoff: Millis(10), backoff_max: Millis(100), ..Timing::default() },
    }
}

pub fn options(folder: &Path, iterations: u32) -> Options {
    let prompt = |row| PromptRow { row, text: format!("prompt {row}"), meta: String::new() };
    Options {
        run: "test".to_owned(),
        config: Digest::of(b"the configuration"),
        config_text: "# the configuration".to_owned(),
        spec: spec(iterations),
        prompts: (0..5).map(prompt).collect(),
        store: Store::open(&folder.display().to_string()).unwrap(),
        listen: "127.0.0.1:0".to_owned(),
        ready_file: None,
        resume: false,
        heartbeat: Duration::from_millis(50),
        poll: Duration::from_millis(200),
        stop_within: Duration::from_secs(30),
        farewell: Duration::from_secs(10),
        retention: Retention { last: 2, every: 0, grace_ms: 0 },
        tls: None,
        limits: duet_service::server::Limits::default(),
        telemetry: duet_config::Telemetry::default(),
        keep_journal: false,
        keep_rollouts: false,
    }
}

/// A coordinator in this process.
pub struct Running {
    pub url: String,
    pub shutdown: CancellationToken,
    pub task: JoinHandle<Result<FinishReason, CoordinatorError>>,
}

impl Running {
    pub async fn start(options: Options) -> Running {
        Running::serve(Service::build(options).await.unwrap())
    }

    pub fn serve(service: Service) -> Running {
        let url = format!("http://{}", service.address());
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(service.run(shutdown.clone()));
        Running { url, shutdown, task }
    }

    pub async fn ended(self) -> Result<FinishReason, CoordinatorError> {
        within("the end of the coordinator", self.task).await.unwrap()
    }
}

/// The status of a coordinator.
pub async fn status(url: &str) -> wire::Status {
    let answer = status_client(connect(url)).get(wire::GetRequest {}).await.unwrap();
    answer.into_inner().status.unwrap()
}

/// Follows a coordinator until its status is as wanted.
pub async fn until(url: &str, what: &str, wanted: impl Fn(&wire::Status) -> bool) -> wire::Status {
    let follow = async {
        let request = wire::WatchRequest { interval_ms: 50 };
        let stream = status_client(connect(url)).watch(request).await.unwrap();
        let mut stream = stream.into_inner();
        while let Some(message) = stream.message().await.unwrap() {
            let status = message.status.unwrap();
            if wanted(&status) {
                return status;
            }
        }
        panic!("the coordinator ended before: {what}");
    };
    within(what, follow).await
}

pub fn connect(url: &str) -> Channel {
    channel(url, None).unwrap()
}

/// The count of a name in a list.
pub fn count(of: &[wire::NamedCount], name: &str) -> u64 {
    of.iter().find(|c| c.name == name).map_or(0, |c| c.count)
}
