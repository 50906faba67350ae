//! `replay`: computes an iteration's optimiser step again from what a run left in its store, and says
//! whether the losses, norms and weights are the same bits.
//!
//! ```text
//! newest checkpoint at or before N (else the base model)
//!   -> for each iteration up to N: tables + artifacts -> Step -> the same ranks, over Gloo
//!   -> metrics and digest beside those of the tables
//! ```
//! Nothing is sampled and nothing is written.

use crate::engine::batch::{StepInput, TraceFiles, share};
use crate::error::TrainError;
use crate::failure::Failure;
use crate::rank::{Place, RankState, Stepped};
use crate::{shards, translate};
use clap::Args;
use duet_config::{Config, ConfigError, Device};
use duet_core::work::{Gates, PromptRow, Step, TrainTrace, TrainTree, Window};
use duet_core::{ArtifactRef, Digest, TrainerEpoch, TreeId};
use duet_store::lineage::{AdvantageRow, Rows, TraceRow, UpdateRow};
use duet_store::{Manifest, Store, StoreError, keys};
use duet_torch::collective::AbortHandle;
use duet_torch::device::DeviceThread;
use futures::future::join_all;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Largest configuration that is read.
const MAX_CONFIG: u64 = 1 << 20;

/// `replay`.
#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// The run: its folder, or the URL of its store.
    pub run: String,
    /// The iteration, counted from 0.
    #[arg(long)]
    pub iteration: u32,
    /// The run's configuration. Default: the one that the run keeps.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Overrides a key, as `section.key=value`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
}

/// A number of the run beside the same number computed again.
#[derive(Debug, Serialize)]
pub struct Pair {
    /// In the tables.
    pub stored: Option<f64>,
    /// Now.
    pub replayed: Option<f64>,
    /// Whether all bits agree.
    pub same: bool,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub struct Account {
    /// The store.
    pub store: String,
    /// The iteration.
    pub iteration: u32,
    /// The version that the replay began from; 0: the base model.
    pub from_version: u64,
    /// Ranks, as many as the run had.
    pub world: u32,
    /// Losses, ratios, norms.
    pub metrics: BTreeMap<String, Pair>,
    /// Digest of all trained tensors after it, in the tables.
    pub stored_weights: String,
    /// Now.
    pub replayed_weights: String,
    /// Whether everything is the same, bit for bit, at every step on the way too.
    pub same: bool,
}

/// Replays and prints; whether everything is the same.
///
/// # Errors
/// [`Failure`] naming what is missing.
pub fn run(args: &ReplayArgs) -> Result<bool, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::Io(format!("cannot start the runtime: {error}")))?;
    let account = runtime.block_on(replay(args))?;
    match args.json {
        true => println!("{:#}", serde_json::json!(account)),
        false => show(&account),
    }
    Ok(account.same)
}

/// Replays an iteration.
///
/// # Errors
/// As [`run`].
pub async fn replay(args: &ReplayArgs) -> Result<Account, Failure> {
    let store = Store::open(&args.run).map_err(|error| Failure::Io(error.to_string()))?;
    let config = config(args, &store).await?;
    let last = args.iteration;
    let wanted = table(&store, last).await?;
    let (from, manifest) = beginning(&store, last).await?;
    let ranks = ranks(&config, &store, manifest.as_ref()).await?;
    let account = repeat(&ranks, &store, (from, last), wanted).await;
    // libtorch must not be at work when the process ends; rank 0 goes last, because it serves the others.
    for rank in ranks.iter().rev() {
        let _ = rank.call(RankState::end).await;
    }
    account
}

/// Takes the steps from version `from` to the iteration `last`, whose tables are `wanted`.
async fn repeat(
    ranks: &[DeviceThread<RankState>],
    store: &Store,
    (from, last): (u64, u32),
    wanted: Rows,
) -> Result<Account, Failure> {
    let mut same = true;
    let mut end = None;
    for iteration in from as u32..=last {
        let rows = if iteration == last { wanted.clone() } else { table(store, iteration).await? };
        let step = step(&rows, iteration)?;
        let stepped = advance(ranks, store, &step).await?;
        let update = updates(&rows, iteration)?;
        let found = compare(&update.metrics, &stepped.metrics)?;
        same &= found.values().all(|pair| pair.same);
        same &= stepped.digest.to_string() == update.weights_digest;
        tracing::info!(iteration, same, digest = stepped.digest.short(), "replayed");
        end = Some((found, update.weights_digest.clone(), stepped.digest.to_string()));
    }
    let (metrics, stored_weights, replayed_weights) = end.unwrap_or_default();
    Ok(Account {
        store: store.place().to_owned(),
        iteration: last,
        from_version: from,
        world: ranks.len() as u32,
        metrics,
        stored_weights,
        replayed_weights,
        same,
    })
}

async fn config(args: &ReplayArgs, store: &Store) -> Result<Config, Failure> {
    let environment = duet_config::environment();
    if let Some(path) = &args.config {
        return Ok(Config::load(path, &environment, &args.set)?);
    }
    let bytes = store.get_at_most(keys::CONFIG, MAX_CONFIG).await.map_err(|error| match error {
        StoreError::Missing { .. } => Failure::Io(format!(
            "{} keeps no {}: give the run's configuration with --config",
            store.place(),
            keys::CONFIG
        )),
        error => Failure::Io(error.to_string()),
    })?;
    let name = format!("{} of {}", keys::CONFIG, store.place());
    let text = String::from_utf8_lossy(&bytes);
    // The run's own settings, not those of the shell that asks.
    Config::from_text(&name, &text, &BTreeMap::new(), &args.set)
        .map_err(|error: ConfigError| error.into())
}

async fn table(store: &Store, iteration: u32) -> Result<Rows, Failure> {
    match store.lineage().read(iteration).await {
        Ok(rows) => Ok(rows),
        Err(StoreError::Missing { .. }) => {
            let known = store.lineage().iterations().await.map_err(io)?;
            let known = match (known.first(), known.last()) {
                (Some(first), Some(last)) => format!("it has those of {first} to {last}"),
                _ => "it has none".to_owned(),
            };
            Err(Failure::Io(format!(
                "{} has no tables of iteration {iteration}: {known}",
                store.place()
            )))
        }
        Err(error) => Err(io(error)),
    }
}

/// The newest checkpoint from which `iteration` can be reached, none: the base model.
async fn beginning(store: &Store, iteration: u32) -> Result<(u64, Option<Manifest>), Failure> {
    let versions = store.checkpoints().list().await.map_err(io)?;
    let usable = versions.into_iter().filter(|version| version.0 <= u64::from(iteration)).max();
    let Some(version) = usable else { return Ok((0, None)) };
    Ok((version.0, Some(store.checkpoints().at(version).await.map_err(io)?.manifest)))
}

/// As many ranks as the run had, in one group on this machine, each on a thread of its own.
async fn ranks(
    config: &Config,
    store: &Store,
    manifest: Option<&Manifest>,
) -> Result<Vec<DeviceThread<RankState>>, Failure> {
    let (world, threads) = (config.trainer.world_size, config.workers.threads);
    let deadline = Duration::from_millis(config.trainer.collective_timeout_ms);
    let place = |rank| Place {
        epoch: TrainerEpoch(1),
        rank,
        world,
        host: "127.0.0.1".to_owned(),
        deadline,
    };
    let gpus = duet_torch::init(threads).map_err(TrainError::from)?.gpus;
    let mut ranks = Vec::new();
    for rank in 0..world {
        // In turn, where there are several GPUs.
        let device = match config.workers.device {
            Device::Cpu => tch::Device::Cpu,
            Device::Cuda => tch::Device::Cuda((rank % gpus.max(1)) as usize),
        };
        let settings = translate::settings(config, device);
        let name = format!("rank {rank}");
        ranks.push(DeviceThread::spawn(&name, move || RankState::new(settings, threads))?);
    }
    let mut address = None;
    if let Some(first) = ranks.first().filter(|_| world > 1) {
        let own = place(0);
        address = Some(first.call(move |state| state.serve(&own)).await.map_err(thread)??);
    }
    let mut files = Vec::new();
    for _ in 0..world {
        files.push(match manifest {
            Some(manifest) => shards::open(store, manifest).await?,
            None => Vec::new(),
        });
    }
    let joined = ranks.iter().zip(0..).zip(files).map(|((device, rank), shards)| {
        let own = place(rank);
        let address = address.clone().filter(|_| rank > 0);
        device.call(move |state| {
            state.join(&own, address.as_deref(), AbortHandle::default())?;
            state.restore(shards)
        })
    });
    for joined in join_all(joined).await {
        joined.map_err(thread)??;
    }
    Ok(ranks)
}

fn updates(rows: &Rows, iteration: u32) -> Result<&UpdateRow, Failure> {
    match rows.updates.as_slice() {
        [update] if update.policy_version == u64::from(iteration) + 1 => Ok(update),
        _ => Err(Failure::Io(format!(
            "iteration {iteration} has no update of its own in its tables: `duet audit` tells more"
        ))),
    }
}

/// The step as the coordinator gave it out: trees with something to learn from, in order.
fn step(rows: &Rows, iteration: u32) -> Result<Step, Failure> {
    let update = updates(rows, iteration)?;
    let mut trees = Vec::new();
    for prompt in &rows.prompts {
        let id = TreeId { iteration, index: prompt.tree };
        let own = rows.traces.iter().filter(|row| row.tree == prompt.tree);
        let mut traces: Vec<TrainTrace> = own.map(|row| trace(rows, row.tree, row)).collect();
        traces.sort_by_key(|trace| trace.trace);
        let teaches = |trace: &TrainTrace| trace.advantage.is_some() || trace.render.is_some();
        if traces.iter().any(teaches) {
            let prompt =
                PromptRow { row: prompt.row, text: prompt.prompt.clone(), meta: String::new() };
            trees.push(TrainTree { id, prompt, traces });
        }
    }
    Ok(Step {
        epoch: TrainerEpoch(1),
        iteration,
        gates: Gates { llm: update.llm_weight, dit: update.dit_weight },
        window: Window { start: update.window_start, len: update.window_len },
        trees,
        update: true,
        publish: false,
        checkpoint: false,
    })
}

fn trace(rows: &Rows, tree: u32, row: &TraceRow) -> TrainTrace {
    let here = |branch: &'static str| {
        let of =
            move |a: &&AdvantageRow| a.branch == branch && a.tree == tree && a.trace == row.trace;
        rows.advantages.iter().filter(of)
    };
    let mut leaves: Vec<_> = here("dit").map(|row| (row.leaf, row.advantage)).collect();
    leaves.sort_by_key(|(leaf, _)| *leaf);
    let leaf_advantages: Vec<Option<f64>> = leaves.into_iter().map(|(_, a)| a).collect();
    let image = rows.leaves.iter().find(|leaf| leaf.tree == tree && leaf.trace == row.trace);
    let trained = leaf_advantages.iter().any(Option::is_some);
    TrainTrace {
        trace: row.trace,
        artifact: unhashed(&row.artifact),
        advantage: here("llm").find_map(|row| row.advantage),
        render: image.filter(|_| trained).map(|leaf| unhashed(&leaf.artifact)),
        leaf_advantages,
    }
}

/// The tables name artifacts by key alone.
fn unhashed(key: &str) -> ArtifactRef {
    ArtifactRef { key: key.to_owned(), digest: Digest([0; 32]), bytes: 0 }
}

/// One step of all ranks; what the first found.
async fn advance(
    ranks: &[DeviceThread<RankState>],
    store: &Store,
    step: &Step,
) -> Result<Stepped, Failure> {
    let mut inputs = Vec::new();
    for rank in 0..ranks.len() as u32 {
        let mut files = Vec::new();
        for tree in share(&step.trees, rank, ranks.len() as u32) {
            let mut of_tree = Vec::new();
            for trace in &tree.traces {
                let think = artifact(store, &trace.artifact).await?;
                let render = match &trace.render {
                    Some(render) => Some(artifact(store, render).await?),
                    None => None,
                };
                of_tree.push(TraceFiles { think, render });
            }
            files.push(of_tree);
        }
        inputs.push(StepInput { step: step.clone(), files });
    }
    let calls = ranks.iter().zip(inputs).map(|(rank, input)| rank.call(|s| s.step(input)));
    let mut first = None;
    for stepped in join_all(calls).await {
        let stepped = stepped.map_err(thread)??;
        first.get_or_insert(stepped);
    }
    first.ok_or_else(|| Failure::Config("trainer.world_size: there are no ranks".to_owned()))
}

async fn artifact(store: &Store, at: &ArtifactRef) -> Result<Vec<u8>, Failure> {
    match store.get(&at.key).await {
        Ok(bytes) => Ok(bytes.into()),
        Err(StoreError::Missing { .. }) => Err(Failure::Io(format!(
            "{} holds no {} any more: rollouts are deleted once a checkpoint has made them needless; \
             `checkpoint.keep_rollouts = true` keeps them for replays",
            store.place(),
            at.key
        ))),
        Err(error) => Err(io(error)),
    }
}

/// Each metric of the table beside the replayed one.
fn compare(
    stored: &str,
    replayed: &BTreeMap<String, f64>,
) -> Result<BTreeMap<String, Pair>, Failure> {
    let stored: BTreeMap<String, f64> = serde_json::from_str(stored)
        .map_err(|error| Failure::Io(format!("metrics of the tables: {error}")))?;
    let names: std::collections::BTreeSet<&String> = stored.keys().chain(replayed.keys()).collect();
    let pair = |name: &String| {
        let (stored, replayed) = (stored.get(name).copied(), replayed.get(name).copied());
        let same = stored.map(f64::to_bits) == replayed.map(f64::to_bits);
        (name.clone(), Pair { stored, replayed, same })
    };
    Ok(names.into_iter().map(pair).collect())
}

fn show(account: &Account) {
    let Account { store, iteration, from_version, world, .. } = account;
    let from = match from_version {
        0 => "the base model".to_owned(),
        version => format!("the checkpoint of version {version}"),
    };
    println!("iteration {iteration} of {store}, replayed by {world} ranks from {from}");
    let width = account.metrics.keys().map(String::len).max().unwrap_or(0);
    let number = |value: Option<f64>| match value {
        None => "-".to_owned(),
        Some(v) if v == 0.0 || (1e-4..1e9).contains(&v.abs()) => v.to_string(),
        Some(v) => format!("{v:e}"),
    };
    for (name, pair) in &account.metrics {
        let (stored, replayed) = (number(pair.stored), number(pair.replayed));
        match pair.same {
            true => println!("  {name:<width$}  {stored}"),
            false => println!("  {name:<width$}  {stored}, now {replayed}   <- not the same"),
        }
    }
    println!("  {:<width$}  {}", "weights", account.stored_weights);
    if account.stored_weights != account.replayed_weights {
        println!("  {:<width$}  {}   <- not the same", "now", account.replayed_weights);
    }
    match account.same {
        true => println!("the same bits"),
        false => println!("NOT the same bits, here or at a step on the way"),
    }
}

fn io(error: StoreError) -> Failure {
    Failure::Io(error.to_string())
}

fn thread(error: duet_torch::device::DeviceError) -> Failure {
    Failure::Train(TrainError::from(error))
}
