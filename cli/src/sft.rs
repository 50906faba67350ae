//! `duet sft`: supervised fine-tuning by data-parallel ranks on this machine.
//!
//! ```text
//! start rank 0 --its address--> start the other ranks --metrics.jsonl--> show ... until all have ended
//!      |  one fails: all are ended, and started again from the newest checkpoint
//!      +------------------------------ at most RESTARTS times ---------------------+
//! ```

use crate::CliError;
use crate::args::LaunchArgs;
use crate::children::{Logged, Memory, program};
use crate::launch;
use crate::show::{bold, dim, span};
use duet_config::Config;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often the ranks may be started again before the stage gives up.
const RESTARTS: u32 = 5;
/// How long rank 0 may take until it can be joined: it loads the model and the examples first.
const READY: Duration = Duration::from_secs(600);
/// How often files and children are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Exit codes after which starting again is no use: usage, configuration.
const HOPELESS: [u8; 2] = [64, 78];

/// A line of `metrics.jsonl`, as far as it is shown.
#[derive(Clone, Debug, Deserialize)]
struct Done {
    step: u64,
    steps: u64,
    loss: f64,
    lr: f64,
    tokens: u64,
}

/// `sft/summary.json`, as far as it is shown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Optimiser steps.
    pub steps: u64,
    /// Examples of a pass.
    pub examples: usize,
    /// Examples that were left out for their length.
    pub dropped: usize,
    /// Mean cross-entropy of an answer token in the first step.
    pub first_loss: f64,
    /// The same over the last pass.
    pub last_loss: f64,
    /// Seconds of training.
    pub seconds: f64,
    /// Tokens a second.
    pub tokens_per_second: f64,
}

/// `duet sft`.
///
/// # Errors
/// The configuration is wrong, or the ranks cannot be kept alive.
pub async fn run(args: LaunchArgs) -> Result<u8, CliError> {
    let memory = Memory::start();
    let config = launch::load(&args.config.config, &args.config.set)?;
    let again = format!("duet sft {} --resume", args.config.config.display());
    if let Some(model) = stage(&config, &args, &again, &memory).await? {
        eprintln!("  model        {}", model.display());
        eprintln!("  numbers      {}", config.sft_folder().join("summary.json").display());
        eprintln!("  peak memory  {:.0} MiB, all processes", memory.peak_mib());
    }
    Ok(0)
}

/// Fine-tunes as `[sft]` says, unless that is done already; the folder of the result, or nothing when a
/// person interrupted it.
///
/// # Errors
/// There is no `[sft]`, an unfinished stage lies there and `--resume` was not given, or the ranks cannot
/// be kept alive.
pub async fn stage(
    config: &Config,
    args: &LaunchArgs,
    again: &str,
    memory: &Memory,
) -> Result<Option<PathBuf>, CliError> {
    let path = args.config.config.display();
    if config.sft.is_none() {
        return Err(CliError::Usage(format!(
            "{path} has no [sft] section: add one, for instance `[sft]` with `data = \"examples.jsonl\"`"
        )));
    }
    let folder = config.sft_folder();
    let finished = folder.join("summary.json").is_file();
    if !args.resume && !finished && folder.join("checkpoints").exists() {
        return Err(CliError::Usage(format!(
            "{} holds an unfinished fine-tuning: go on with `{again}`, or take another run.name",
            folder.display()
        )));
    }
    let logs = launch::folder(config)?.join("logs");
    let mut ranks =
        Ranks { config, args, logs, folder: folder.clone(), memory, restarts: 0, shown: None };
    if !ranks.work().await? {
        eprintln!("{} in the middle of fine-tuning", bold("stopped"));
        eprintln!("  go on with: {again}");
        return Ok(None);
    }
    let summary = read_summary(&folder)?;
    let words = if finished { "fine-tuned before:" } else { "fine-tuned" };
    let Summary { steps, examples, first_loss, last_loss, seconds, tokens_per_second, .. } =
        summary;
    eprintln!(
        "{} {examples} examples, {steps} steps, loss {first_loss:.3} to {last_loss:.3} {}",
        bold(words),
        dim(&format!("({}, {tokens_per_second:.0} tokens a second)", span(seconds)))
    );
    if summary.dropped > 0 {
        eprintln!("  {} longer than sft.max_tokens were left out", summary.dropped);
    }
    Ok(Some(folder.join("model")))
}

fn read_summary(folder: &Path) -> Result<Summary, CliError> {
    let path = folder.join("summary.json");
    let bytes = std::fs::read(&path).map_err(|e| CliError::io("read", &path, e))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| CliError::Usage(format!("{} is not what it should be: {e}", path.display())))
}

/// The processes of a stage.
struct Ranks<'a> {
    config: &'a Config,
    args: &'a LaunchArgs,
    folder: PathBuf,
    logs: PathBuf,
    memory: &'a Memory,
    restarts: u32,
    shown: Option<(Instant, u64)>,
}

impl Ranks<'_> {
    /// Works until the stage is over; whether it is, or a person interrupted it.
    async fn work(&mut self) -> Result<bool, CliError> {
        let bar = bar();
        loop {
            let mut ranks = Vec::new();
            let ended = tokio::select! {
                ended = self.incarnation(&mut ranks, &bar) => ended,
                _ = tokio::signal::ctrl_c() => Ok(None),
            };
            for rank in &mut ranks {
                rank.kill().await;
            }
            let failure = match ended {
                Ok(Some(())) => {
                    bar.finish_and_clear();
                    return Ok(true);
                }
                Ok(None) => {
                    bar.finish_and_clear();
                    return Ok(false);
                }
                Err(failure) => failure,
            };
            self.restarts += 1;
            if self.restarts > RESTARTS || HOPELESS.contains(&failure.code()) {
                bar.finish_and_clear();
                return Err(failure);
            }
            bar.suspend(|| eprintln!("a rank failed; starting again from the last checkpoint"));
            tracing::warn!(%failure, "starting the ranks again");
        }
    }

    /// Starts all ranks and waits for their end.
    async fn incarnation(
        &mut self,
        ranks: &mut Vec<Logged>,
        bar: &ProgressBar,
    ) -> Result<Option<()>, CliError> {
        let world = self.config.trainer.world_size;
        let ready = self.logs.join("sft.addr");
        if let Err(e) = std::fs::remove_file(&ready)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            return Err(CliError::io("remove", &ready, e));
        }
        ranks.push(self.start(0, &["--ready-file", &ready.display().to_string()])?);
        let until = Instant::now() + READY;
        while world > 1 && !ready.is_file() {
            match ranks[0].ended() {
                // Nothing was left to do.
                Some(status) if status.success() => return Ok(Some(())),
                Some(status) => return Err(ranks[0].failure(status)),
                None if Instant::now() > until => {
                    return Err(CliError::Usage(format!(
                        "rank 0 could not be joined within {} s; see {}",
                        READY.as_secs(),
                        ranks[0].log.display()
                    )));
                }
                None => tokio::time::sleep(LOOK).await,
            }
        }
        if world > 1 {
            let address = std::fs::read_to_string(&ready);
            let address = address.map_err(|e| CliError::io("read", &ready, e))?;
            for rank in 1..world {
                ranks.push(self.start(rank, &["--join", &address])?);
            }
        }
        let mut working: Vec<bool> = vec![true; ranks.len()];
        while working.iter().any(|working| *working) {
            for (rank, working) in ranks.iter_mut().zip(&mut working) {
                match rank.ended() {
                    Some(status) if !status.success() => return Err(rank.failure(status)),
                    Some(_) => *working = false,
                    None => {}
                }
            }
            self.show(bar);
            tokio::time::sleep(LOOK).await;
        }
        Ok(Some(()))
    }

    fn start(&self, rank: u32, more: &[&str]) -> Result<Logged, CliError> {
        let mut args = vec!["sft".to_owned(), "--rank".to_owned(), rank.to_string()];
        args.extend(["--local-rank".to_owned(), rank.to_string()]);
        args.extend(["--config".to_owned(), self.args.config.config.display().to_string()]);
        for set in &self.args.config.set {
            args.extend(["--set".to_owned(), set.clone()]);
        }
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        let name = format!("sft-{rank}");
        let log = self.logs.join(format!("{name}.log"));
        Logged::start(&name, &program("duet-trainer")?, &args, log, self.memory)
    }

    /// Shows how far it is: a bar on a terminal, ten lines elsewhere.
    fn show(&mut self, bar: &ProgressBar) {
        let text = std::fs::read_to_string(self.folder.join("metrics.jsonl")).unwrap_or_default();
        let lines: Vec<Done> =
            text.lines().rev().take(64).filter_map(|l| serde_json::from_str(l).ok()).collect();
        let Some(last) = lines.first() else { return };
        // After a failure it goes back to the last checkpoint.
        let (began, from) = match self.shown {
            Some((began, from)) if from <= last.step => (began, from),
            _ => *self.shown.insert((Instant::now(), last.step)),
        };
        let steps = lines.iter().filter(|done| done.step > from);
        let tokens: u64 = steps.clone().map(|done| done.tokens).sum();
        let mean = tokens as f64 / (steps.count().max(1)) as f64;
        let speed = mean * (last.step - from) as f64 / began.elapsed().as_secs_f64().max(0.1);
        let text = format!("loss {:.4}  lr {:.2e}  {speed:.0} tokens a second", last.loss, last.lr);
        if !bar.is_hidden() {
            bar.set_length(last.steps);
            bar.set_position(last.step);
            bar.set_message(text);
        } else if !std::io::stderr().is_terminal() {
            let tenth = last.steps.div_ceil(10).max(1);
            if bar.position() / tenth != last.step / tenth {
                eprintln!("  sft step {}/{}  {text}", last.step, last.steps);
            }
            bar.set_position(last.step);
        }
    }
}

fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template = "  fine-tuning {bar:36.cyan/dim} {pos:>4}/{len:<4} {elapsed_precise} {msg}";
    let style = ProgressStyle::with_template(template);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━─");
    ProgressBar::new(1).with_style(style)
}
