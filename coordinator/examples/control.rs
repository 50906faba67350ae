//! How many trees a second the control plane carries through their whole life, when the work itself
//! takes no time: `cargo run --release -p duet-coordinator --example control -- [--trees N] [--wide P]
//! [--lag L] [--traces J] [--in-flight N] [--keep]`.
//!
//! The coordinator, four workers (two think and render, two score) and a trainer are processes of
//! their own, over gRPC on loopback; the journal is on, with fsync and group commit. A tree is one
//! lease to think, J to render and J to score; P trees make an optimiser step, with its published
//! weights and its Parquet tables, and the trees of L steps more are sampled meanwhile. The workers have N
//! sessions together, each of which holds one lease, divided as the work is. Prints JSON, with the
//! processors' time that each lease took. `--keep` leaves the files: on some file systems new ones take longer after many were deleted.
//!
//! `control -- loss` measures how long it takes from a worker's SIGKILL, in the middle of a lease, until
//! another worker has been given that lease; `control -- floor` how long one append to the journal
//! takes here when nothing else is done.
#![forbid(unsafe_code)]

use bytes::Bytes;
use duet_coordinator::{Options, Service, codec};
use duet_core::advantage::AdvantageSpec;
use duet_core::reward::RewardSpec;
use duet_core::schedule::{Schedule, WindowSpec};
use duet_core::scheduler::Record;
use duet_core::spec::{RunSpec, Timing};
use duet_core::work::{
    Assignment, Done, Finish, Outcome, PromptRow, Report, Score, ShardDone, StepDone, Trace,
    Weights, Work,
};
use duet_core::{ArtifactRef, Digest, Millis, PolicyVersion, Rank, Role, WorkerId};
use duet_service::server::Limits;
use duet_service::worker::{Connection, Session, WorkerOptions};
use duet_store::checkpoint::Retention;
use duet_store::journal::retained;
use duet_store::{Journal, Store, keys};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Longer than anything takes here.
const DEADLINE: Duration = Duration::from_secs(240);

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["coordinator", folder, trees, wide, lag, traces] => {
            let shape = Shape {
                trees: trees.parse()?,
                wide: wide.parse()?,
                lag: lag.parse()?,
                traces: traces.parse()?,
            };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(coordinate(Path::new(folder), shape))
        }
        ["worker", folder, url, name, role, sessions] => {
            run(work(Path::new(folder), url, name, role, sessions.parse()?))
        }
        ["holder", folder, url, name] => run(hold(Path::new(folder), url, name)),
        ["loss"] => loss(),
        ["floor"] => run(floor()),
        rest => {
            let number = |flag: &str, default: u32| -> Result<u32> {
                let at = rest.iter().position(|word| *word == flag);
                let value = at.and_then(|at| rest.get(at + 1));
                Ok(value.map_or(Ok(default), |text| text.parse())?)
            };
            let shape = Shape {
                trees: number("--trees", 2_000)?,
                wide: number("--wide", 8)?,
                lag: number("--lag", 0)?,
                traces: number("--traces", 1)?,
            };
            let in_flight = number("--in-flight", 8)?;
            if in_flight < 4 {
                return Err("--in-flight: at least 4, one for each worker".into());
            }
            measure(shape, in_flight, rest.contains(&"--keep"))
        }
    }
}

/// What is grown.
#[derive(Clone, Copy)]
struct Shape {
    trees: u32,
    /// P: trees of a step.
    wide: u32,
    lag: u32,
    /// J.
    traces: u32,
}

impl Shape {
    fn steps(self) -> u32 {
        self.trees / self.wide
    }

    fn leases_per_tree(self) -> u32 {
        1 + 2 * self.traces
    }

    /// The workers and how many sessions each has, of so many: of the leases of a tree, one thinks, J
    /// render and J score, so with as many sessions for both roles those that score would often wait.
    fn workers(self, in_flight: u32) -> [(&'static str, &'static str, u32); 5] {
        let (all, rollout) = (f64::from(self.leases_per_tree()), f64::from(1 + self.traces));
        let rollout = (f64::from(in_flight) * rollout / all).round() as u32;
        let rollout = rollout.clamp(2, in_flight - 2);
        let reward = in_flight - rollout;
        [
            ("rollout-0", "rollout", rollout.div_ceil(2)),
            ("rollout-1", "rollout", rollout / 2),
            ("reward-0", "reward", reward.div_ceil(2)),
            ("reward-1", "reward", reward / 2),
            ("trainer-0", "trainer", 1),
        ]
    }
}

fn run<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}

/// Processes that end with this one.
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

fn start(args: &[&str]) -> Result<Child> {
    let own = std::env::current_exe()?;
    Ok(Command::new(own).args(args).stdin(Stdio::null()).spawn()?)
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let until = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = look() {
            return Ok(value);
        }
        if Instant::now() > until {
            return Err(format!("waited in vain for {what}").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Starts everything and measures from outside: by the files that the processes leave.
fn measure(shape: Shape, in_flight: u32, keep: bool) -> Result<()> {
    let mut folder = tempfile::tempdir()?;
    folder.disable_cleanup(keep);
    let path = folder.path().display().to_string();
    let began = Instant::now();
    let numbers = [shape.trees, shape.wide, shape.lag, shape.traces].map(|n| n.to_string());
    let [trees, wide, lag, traces] = &numbers;
    let coordinator = start(&["coordinator", &path, trees, wide, lag, traces])?;
    let process = coordinator.id();
    let mut all = Children(vec![coordinator]);
    let ready = folder.path().join("ready");
    let url = wait_for("the coordinator", || std::fs::read_to_string(&ready).ok())?;
    for (name, role, sessions) in shape.workers(in_flight) {
        all.0.push(start(&["worker", &path, url.trim(), name, role, &sessions.to_string()])?);
    }
    let lease = folder.path().join("leased");
    wait_for("the first lease", || lease.exists().then_some(()))?;
    let cold = began.elapsed();
    let made = |step: u32| {
        let table = keys::table("updates", step - 1);
        folder.path().join("store").join(table).exists().then(Instant::now)
    };
    let processes: Vec<u32> = all.0.iter().map(Child::id).collect();
    let used = || processes.iter().map(|process| ticks(*process)).collect::<Vec<f64>>();
    let first = wait_for("the first step", || made(1))?;
    let before = used();
    let last = wait_for("the last step", || made(shape.steps()))?;
    let after = used();
    let seconds = (last - first).as_secs_f64();
    let carried = f64::from((shape.steps() - 1) * shape.wide);
    let leases = carried * f64::from(shape.leases_per_tree());
    let cost: Vec<f64> =
        before.iter().zip(&after).map(|(before, after)| (after - before) * 1e6 / leases).collect();
    let peak = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let peak = peak.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak: f64 = peak.and_then(|kib| kib.split_whitespace().next()?.parse().ok()).unwrap_or(0.0);
    let journal = run(async { Ok(retained(&store(folder.path())?, keys::JOURNAL).await?) })?;
    let segments = journal.batches.last().map_or(0, |batch| batch.number);
    let held = held(journal.batches.iter().map(|batch| &batch.records[..]))?;
    println!(
        "{}",
        serde_json::json!({
            "trees": carried,
            "trees_of_a_step": shape.wide,
            "traces": shape.traces,
            "lag": shape.lag,
            "leases_in_flight_at_most": in_flight,
            "leases_in_flight_mean": held,
            "seconds": seconds,
            "trees_per_second": carried / seconds,
            "leases_per_second": leases / seconds,
            "journal_segments_per_lease":
                segments as f64 / f64::from(shape.trees * shape.leases_per_tree()),
            "coordinator_cpu_us_per_lease": cost[0],
            "workers_cpu_us_per_lease": cost[1..5].iter().sum::<f64>(),
            "trainer_cpu_us_per_lease": cost[5],
            "cold_start_to_first_lease_ms": cold.as_millis() as u64,
            "coordinator_peak_mb": peak * 1024.0 / 1e6,
        })
    );
    Ok(())
}

/// How many leases are out after each append, on average.
fn held<'a>(batches: impl Iterator<Item = &'a [Vec<u8>]>) -> Result<f64> {
    let (mut out, mut sum, mut appends) = (0_i64, 0_i64, 0_i64);
    for batch in batches {
        for record in batch {
            match codec::decode_record(record)? {
                Record::Leased { .. } => out += 1,
                Record::Completed { .. } => out -= 1,
                _ => {}
            }
        }
        sum += out;
        appends += 1;
    }
    Ok(sum as f64 / appends.max(1) as f64)
}

/// Seconds of processor time that a process has had.
fn ticks(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The name, in parentheses, may hold blanks.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields = fields.split_whitespace().skip(11).take(2);
    // Linux gives them in hundredths.
    fields.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Appends one after the other, each awaited.
async fn floor() -> Result<()> {
    const APPENDS: usize = 500;
    let folder = tempfile::tempdir()?;
    let mut journal = Journal::open(&store(folder.path())?, keys::JOURNAL).await?.journal;
    let mut spans = Vec::with_capacity(APPENDS);
    for _ in 0..APPENDS {
        let began = Instant::now();
        journal.append(&[vec![b'x'; 2_000]]).await?;
        spans.push(began.elapsed().as_secs_f64() * 1000.0);
    }
    spans.sort_by(f64::total_cmp);
    let mean = spans.iter().sum::<f64>() / APPENDS as f64;
    let report = serde_json::json!({
        "appends": APPENDS,
        "append_ms": spans[APPENDS / 2],
        "mean_ms": mean,
        "p90_ms": spans[APPENDS * 9 / 10],
    });
    println!("{report}");
    Ok(())
}

/// Rounds of which the median is printed.
const ROUNDS: usize = 9;

/// A worker that holds a lease is killed while another one waits for work.
fn loss() -> Result<()> {
    let mut spans = Vec::new();
    for _ in 0..ROUNDS {
        let folder = tempfile::tempdir()?;
        let path = folder.path().display().to_string();
        let mut all = Children(vec![start(&["coordinator", &path, "1", "1", "0", "1"])?]);
        let ready = folder.path().join("ready");
        let url = wait_for("the coordinator", || std::fs::read_to_string(&ready).ok())?;
        let held = |name: &str| {
            let file = folder.path().join(format!("{name} holds"));
            wait_for("a lease", || file.exists().then(Instant::now))
        };
        all.0.push(start(&["holder", &path, url.trim(), "rollout-0"])?);
        held("rollout-0")?;
        all.0.push(start(&["holder", &path, url.trim(), "rollout-1"])?);
        let waits = folder.path().join("rollout-1 waits");
        wait_for("the other worker", || waits.exists().then_some(()))?;
        all.0[1].kill()?;
        let killed = Instant::now();
        spans.push((held("rollout-1")? - killed).as_secs_f64() * 1000.0);
    }
    spans.sort_by(f64::total_cmp);
    let report = serde_json::json!({
        "rounds": ROUNDS,
        "sigkill_to_work_elsewhere_ms": spans[ROUNDS / 2],
        "longest_ms": spans[ROUNDS - 1],
    });
    println!("{report}");
    Ok(())
}

/// Takes a lease and keeps it.
async fn hold(folder: &Path, url: &str, name: &str) -> Result<()> {
    let session = Session::connect(worker(url, name, Role::Rollout), CancellationToken::new());
    let session = session.await?;
    std::fs::write(folder.join(format!("{name} waits")), "")?;
    let Assignment::Lease(_) = session.next().await? else { return Err("no lease".into()) };
    std::fs::write(folder.join(format!("{name} holds")), "")?;
    tokio::time::sleep(DEADLINE).await;
    Ok(())
}

fn worker(url: &str, name: &str, role: Role) -> WorkerOptions {
    WorkerOptions {
        coordinator: url.to_owned(),
        worker: WorkerId::from(name),
        role,
        config_digest: config(),
        tls: None,
        allow_plaintext: false,
        reconnect_deadline: Duration::from_secs(5),
    }
}

fn config() -> Digest {
    Digest::of(b"bench-control")
}

fn store(folder: &Path) -> Result<Store> {
    Ok(Store::open(&folder.join("store").display().to_string())?)
}

async fn coordinate(folder: &Path, shape: Shape) -> Result<()> {
    let spec = RunSpec {
        seed: 1,
        iterations: shape.steps(),
        prompts_per_iteration: shape.wide,
        traces: shape.traces,
        leaves: 1,
        lag: shape.lag,
        steps: 2,
        window: WindowSpec::Random { len: 1, low: 0, high: 1 },
        schedule: Schedule::Balanced,
        reward: RewardSpec {
            llm: [("null".to_owned(), 1.0)].into(),
            dit: [("null".to_owned(), 1.0)].into(),
            ..RewardSpec::default()
        },
        llm_advantage: AdvantageSpec::default(),
        dit_advantage: AdvantageSpec::default(),
        extra_prompts: 0,
        world: 1,
        min_world: 0,
        checkpoint_every: u32::MAX,
        max_attempts: 3,
        quarantine_after: 8,
        timing: Timing::default(),
    };
    let row = |row| PromptRow { row, text: format!("prompt {row}"), meta: String::new() };
    let options = Options {
        run: "control".to_owned(),
        config: config(),
        config_text: String::new(),
        spec,
        prompts: (0..100).map(row).collect(),
        store: store(folder)?,
        listen: "127.0.0.1:0".to_owned(),
        ready_file: Some(PathBuf::from(folder).join("ready")),
        resume: false,
        heartbeat: Duration::from_secs(1),
        poll: Duration::from_secs(5),
        stop_within: Duration::from_secs(5),
        farewell: Duration::from_secs(5),
        retention: Retention { last: 2, every: 0, grace_ms: 0 },
        keep_journal: false,
        keep_rollouts: false,
        tls: None,
        limits: Limits { requests_per_second: u32::MAX, ..Limits::default() },
        telemetry: duet_config::Telemetry::default(),
    };
    Service::build(options).await?.run(CancellationToken::new()).await?;
    Ok(())
}

/// A worker with so many sessions.
async fn work(folder: &Path, url: &str, name: &str, role: &str, sessions: u32) -> Result<()> {
    let role = match role {
        "rollout" => Role::Rollout,
        "reward" => Role::Reward,
        _ => Role::Trainer,
    };
    let connection = Connection::to(&worker(url, name, role))?;
    let names = (0..sessions).map(|n| format!("{name}.{n}"));
    let all = names.map(|name| serve(folder, &connection, worker(url, &name, role)));
    futures::future::try_join_all(all).await?;
    Ok(())
}

async fn serve(folder: &Path, connection: &Connection, options: WorkerOptions) -> Result<()> {
    let role = options.role;
    let session = Session::connect_over(connection, options, CancellationToken::new()).await?;
    let store = store(folder)?;
    let mut leased = false;
    let nothing = ArtifactRef { key: "nothing".to_owned(), digest: Digest([0; 32]), bytes: 0 };
    let mut version = PolicyVersion(0);
    loop {
        let report = match session.next().await? {
            Assignment::Lease(lease) => {
                if !std::mem::replace(&mut leased, true) {
                    std::fs::write(folder.join("leased"), "")?;
                }
                let outcome =
                    Outcome::Done { result: null(&lease.work, &nothing), took: Millis(0) };
                Report::Lease { id: lease.id, outcome }
            }
            Assignment::Publish(weights) => Report::PublishAck { version: weights.version },
            Assignment::Rendezvous(part) => {
                let (epoch, address) = (part.epoch, "127.0.0.1:1".to_owned());
                if part.store.is_none() {
                    session.report(Report::StoreReady { epoch, address }).await?;
                }
                let digest = Digest([0; 32]);
                Report::TrainerReady { epoch, rank: part.rank, version, digest }
            }
            Assignment::Step(step) => {
                version = if step.update { PolicyVersion(version.0 + 1) } else { version };
                let bytes = Bytes::from(version.to_string());
                let digest = Digest::of(&bytes);
                let artifacts = store.artifacts();
                let mut llm = None;
                if step.publish {
                    let key = keys::weights(version, keys::Branch::Llm, step.epoch);
                    llm = Some(artifacts.put(&key, bytes.clone()).await?);
                }
                let (epoch, rank) = (step.epoch, Rank(0));
                if step.checkpoint {
                    let shards =
                        vec![artifacts.put(&keys::shard(version, rank, 1, epoch), bytes).await?];
                    let done = ShardDone { epoch, rank, version, shards };
                    session.report(Report::ShardDone(done)).await?;
                }
                Report::StepDone(StepDone {
                    epoch,
                    rank,
                    iteration: step.iteration,
                    weights: Weights { version, llm, dit: None, digest },
                    metrics: [("loss".to_owned(), 0.0)].into(),
                })
            }
            Assignment::Leave { .. } => {
                session.leave("sent home").await;
                return Ok(());
            }
        };
        match role {
            // As the real ones do.
            Role::Rollout | Role::Reward => session.report_and_go_on(report).await?,
            Role::Trainer => session.report(report).await?,
        };
    }
}

/// What a lease gives when nothing is computed.
fn null(work: &Work, nothing: &ArtifactRef) -> Done {
    match work {
        Work::Think(think) => {
            let trace = Trace {
                artifact: nothing.clone(),
                text: String::new(),
                refined_prompt: "x".to_owned(),
                well_formed: true,
                tokens: 1,
                finish: Finish::Stop,
            };
            Done::Think(vec![trace; think.traces as usize])
        }
        Work::Render(_) => Done::Render(nothing.clone()),
        Work::Score(_) => Done::Score(vec![[("null".to_owned(), Score::Scored(0.5))].into()]),
    }
}
