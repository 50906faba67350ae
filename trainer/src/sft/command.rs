//! The command: from a configuration to a rank that works until the stage is over.

use super::checkpoint::Checkpoints;
use super::data;
use super::tuner::{Settings, StepDone, Tuner};
use crate::engine::gradient::Sharing;
use crate::error::TrainError;
use crate::failure::Failure;
use crate::translate;
use clap::Args;
use duet_config::{Config, Sft};
use duet_core::{Digest, Seed};
use duet_models::defaults::Defaults;
use duet_models::pipeline::LoadOptions;
use duet_service::place::{Place, PlaceArgs};
use duet_service::shutdown;
use duet_torch::collective::{AbortHandle, Collective, Gloo, GroupOptions, Solo, Store};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// `sft`.
#[derive(Debug, Args)]
pub struct SftArgs {
    /// The configuration, with an `[sft]` section.
    #[arg(long)]
    pub config: PathBuf,
    /// Overrides a key, as `section.key=value`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// This rank, of `trainer.world_size`.
    #[arg(long, default_value_t = 0)]
    pub rank: u32,
    /// The number of the GPU to use, where several can be seen.
    #[arg(long, value_name = "N")]
    pub local_rank: Option<u32>,
    /// Rank 0: the file to write the address into that the other ranks join.
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
    /// The other ranks: that address, `HOST:PORT`.
    #[arg(long, value_name = "ADDRESS")]
    pub join: Option<String>,
    /// This machine's address, as the other ranks reach it.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
}

/// `summary.json`: what was learned from how much.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// What decides the result: model, examples, seed, `[sft]`.
    pub stage: String,
    /// Optimiser steps.
    pub steps: u64,
    /// Passes over the examples.
    pub epochs: u32,
    /// Examples of a pass.
    pub examples: usize,
    /// Examples that were left out because they are longer than `sft.max_tokens`.
    pub dropped: usize,
    /// Data-parallel ranks.
    pub world: u32,
    /// Mean cross-entropy of an answer token in the first step.
    pub first_loss: f64,
    /// The same over the last pass.
    pub last_loss: f64,
    /// Share of answer tokens that were the most probable ones, over the last pass.
    pub last_accuracy: f64,
    /// Tokens that were computed, prompts too.
    pub tokens: u64,
    /// Seconds of training in the last incarnation of the process.
    pub seconds: f64,
    /// Tokens a second, in the last incarnation of the process.
    pub tokens_per_second: f64,
    /// Hash over all trained tensors.
    pub weights: String,
    /// The trained pipeline folder, relative to this file.
    pub model: String,
}

/// Works until the stage is over.
///
/// # Errors
/// [`Failure`] with the exit code.
pub fn run(args: &SftArgs) -> Result<(), Failure> {
    shutdown::exit_with_parent();
    let environment = duet_config::environment();
    let config = Config::load(&args.config, &environment, &args.set)?;
    let (Some(sft), Some(path)) = (config.sft.clone(), config.sft_data_path()) else {
        let reason = format!("{} has no [sft] section", args.config.display());
        return Err(Failure::Config(reason));
    };
    let torch = duet_torch::init(config.workers.threads).map_err(TrainError::from)?;
    let flags = PlaceArgs { rank: Some(args.rank), local_rank: args.local_rank, id: None };
    let place = Place::find(&flags, &environment)?;
    let device = translate::device(&config, torch.gpus, place)?;
    let worked = data::read(&path).map_err(|error| Failure::Config(error.to_string()))?;
    let settings = settings(&config, device, sft)?;
    let stage = stage(&settings, &config, &path)?;
    let folder = config.sft_folder();
    if finished(&folder, &stage)? {
        tracing::info!(folder = %folder.display(), "this stage is finished");
        return Ok(());
    }
    let mut tuner = Tuner::load(settings, &worked)?;
    let group = group(args, &config)?;
    let checkpoints = Checkpoints::new(
        folder.join("checkpoints"),
        stage.clone(),
        config.checkpoint.keep as usize,
    );
    let start = checkpoints.restore(&mut tuner, &*group)?;
    if args.rank == 0 && tuner.dropped() > 0 {
        let (dropped, all) = (tuner.dropped(), worked.len());
        tracing::warn!(dropped, all, "examples longer than sft.max_tokens are left out");
    }
    let every = u64::from(config.sft.as_ref().map_or(1, |sft| sft.checkpoint_every));
    let mut record = (args.rank == 0).then(|| Record::open(&folder, start)).transpose()?;
    let began = Instant::now();
    while tuner.step() < tuner.steps() {
        let done = tuner.advance(&*group)?;
        if let Some(record) = &mut record {
            record.line(&done)?;
            if done.step % every == 0 || done.step == tuner.steps() {
                checkpoints.write(&tuner)?;
            }
        }
    }
    if let Some(record) = record {
        let seconds = began.elapsed().as_secs_f64();
        record.finish(&tuner, (stage, &config, seconds, start), &folder)?;
    }
    // Nobody leaves before rank 0 is done: a launcher takes an early end for a failure.
    group.barrier().map_err(TrainError::from)?;
    Ok(())
}

fn settings(config: &Config, device: tch::Device, sft: Sft) -> Result<Settings, Failure> {
    let model = config.model_path();
    let instruction = match &config.rollout.instruction {
        Some(path) => std::fs::read_to_string(path)
            .map_err(|error| Failure::Io(format!("cannot read {}: {error}", path.display())))?,
        None => Defaults::read(&model).map_err(TrainError::from)?.instruction,
    };
    Ok(Settings {
        model,
        load: translate::load(config, device),
        instruction,
        seed: Seed::root(config.run.seed),
        sft,
        max_grad_norm: config.trainer.max_grad_norm,
        // Ranks hold the whole state, of which rank 0 writes the checkpoints, and how many rows they
        // pack their examples into is their own affair.
        sharing: Sharing {
            zero: 0,
            each_micro_batch: false,
            ..translate::sharing(&config.trainer)
        },
    })
}

/// What decides the result of the stage, as a hash: checkpoints of another one are not taken up.
fn stage(settings: &Settings, config: &Config, data: &Path) -> Result<String, Failure> {
    let read = |path: &Path| {
        std::fs::read(path)
            .map_err(|error| Failure::Io(format!("cannot read {}: {error}", path.display())))
    };
    let mut sft = settings.sft.clone();
    // The examples count by their contents, and how often they are saved does not.
    (sft.data, sft.checkpoint_every) = (None, 0);
    // Which GPU it was counts no more than that.
    let device = match settings.load.device {
        tch::Device::Cuda(_) => tch::Device::Cuda(0),
        other => other,
    };
    let load = LoadOptions { device, ..settings.load };
    let index = settings.model.join("text_encoder/config.json");
    let parts = [
        Digest::of(&read(data)?).to_string(),
        Digest::of(&read(&index)?).to_string(),
        format!("{sft:?}"),
        format!("{load:?}"),
        settings.instruction.clone(),
        format!("{} {}", config.run.seed, settings.max_grad_norm),
    ];
    Ok(Digest::of(parts.join("\n").as_bytes()).to_string())
}

/// Whether the folder holds the result of this very stage.
fn finished(folder: &Path, stage: &str) -> Result<bool, Failure> {
    let path = folder.join("summary.json");
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(false) };
    match serde_json::from_str::<Summary>(&text) {
        Ok(summary) if summary.stage == stage => Ok(true),
        _ => Err(Failure::Config(format!(
            "{} tells of a fine-tuning with other examples, another model or other values of \
             [sft]: take another run.name, or remove the folder",
            path.display()
        ))),
    }
}

/// Finds the other ranks.
fn group(args: &SftArgs, config: &Config) -> Result<Box<dyn Collective>, Failure> {
    let world = config.trainer.world_size;
    if args.rank >= world {
        let reason = format!("--rank {} but trainer.world_size is {world}", args.rank);
        return Err(Failure::Config(reason));
    }
    if world == 1 {
        return Ok(Box::new(Solo::new()));
    }
    let deadline = Duration::from_millis(config.trainer.collective_timeout_ms);
    let store = match (&args.join, args.rank) {
        (None, 0) => Store::serve(&args.host, deadline),
        (Some(address), 1..) => Store::connect(address, deadline),
        (None, _) => {
            return Err(Failure::Config("a rank other than 0 needs --join ADDRESS".to_owned()));
        }
        (Some(_), _) => {
            return Err(Failure::Config("rank 0 is joined; leave out --join".to_owned()));
        }
    };
    let store = store.map_err(TrainError::from)?;
    if let Some(path) = args.ready_file.as_ref().filter(|_| args.rank == 0) {
        whole(path, store.address().as_bytes())?;
    }
    let options = GroupOptions {
        rank: args.rank,
        world,
        group: "sft".to_owned(),
        host: args.host.clone(),
        deadline,
        threads: 1,
    };
    let gloo = Gloo::connect(Arc::new(store), options, AbortHandle::default());
    Ok(Box::new(gloo.map_err(TrainError::from)?))
}

/// `metrics.jsonl`, and what the summary adds up.
struct Record {
    file: std::fs::File,
    path: PathBuf,
    lines: Vec<StepDone>,
}

impl Record {
    /// Opens the file; lines after step `start` are of a run that ended before its checkpoint, and go.
    fn open(folder: &Path, start: u64) -> Result<Record, Failure> {
        let path = folder.join("metrics.jsonl");
        let io = |error| Failure::Io(format!("cannot use {}: {error}", path.display()));
        std::fs::create_dir_all(folder).map_err(io)?;
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let lines: Vec<StepDone> = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .filter(|done: &StepDone| done.step <= start)
            .collect();
        let text: String = lines.iter().map(|done| json(done) + "\n").collect();
        whole(&path, text.as_bytes())?;
        let file = std::fs::OpenOptions::new().append(true).open(&path).map_err(io)?;
        Ok(Record { file, path, lines })
    }

    fn line(&mut self, done: &StepDone) -> Result<(), Failure> {
        let text = json(done) + "\n";
        let written = self.file.write_all(text.as_bytes());
        written.map_err(|error| Failure::Io(format!("{}: {error}", self.path.display())))?;
        self.lines.push(done.clone());
        Ok(())
    }

    /// Writes the trained folder, then the summary.
    fn finish(
        self,
        tuner: &Tuner,
        (stage, config, seconds, start): (String, &Config, f64, u64),
        folder: &Path,
    ) -> Result<(), Failure> {
        let model = folder.join("model");
        tuner.pipeline().publish(&config.model_path(), &model).map_err(TrainError::from)?;
        let last = self.lines.last().map_or(0, |done| done.epoch);
        let of_last = || self.lines.iter().filter(|done| done.epoch == last);
        let answers: u64 = of_last().map(|done| done.answer_tokens).sum();
        let mean = |value: fn(&StepDone) -> f64| {
            let sum: f64 = of_last().map(|done| value(done) * done.answer_tokens as f64).sum();
            sum / answers.max(1) as f64
        };
        let now: u64 =
            self.lines.iter().filter(|done| done.step > start).map(|done| done.tokens).sum();
        let summary = Summary {
            stage,
            steps: tuner.step(),
            epochs: config.sft.as_ref().map_or(0, |sft| sft.epochs),
            examples: tuner.examples(),
            dropped: tuner.dropped(),
            world: config.trainer.world_size,
            first_loss: self.lines.first().map_or(0.0, |done| done.loss),
            last_loss: mean(|done| done.loss),
            last_accuracy: mean(|done| done.accuracy),
            tokens: self.lines.iter().map(|done| done.tokens).sum(),
            seconds,
            tokens_per_second: now as f64 / seconds.max(1e-9),
            weights: tuner.digest()?.to_string(),
            model: "model".to_owned(),
        };
        let text = serde_json::to_string_pretty(&summary).unwrap_or_default() + "\n";
        whole(&folder.join("summary.json"), text.as_bytes())
    }
}

fn json(done: &StepDone) -> String {
    serde_json::to_string(done).unwrap_or_default()
}

/// Writes a file beside its place, then moves it there.
fn whole(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let partial = path.with_extension("partial");
    let moved = std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, path));
    moved.map_err(|error| Failure::Io(format!("cannot write {}: {error}", path.display())))
}
