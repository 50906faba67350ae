//! The command line.

use clap::{Args, Parser, Subcommand};
use duet_service::access::Role;
use std::path::PathBuf;

/// Trains think-then-generate image models by Dual-GRPO.
#[derive(Debug, Parser)]
#[command(name = "duet", version, about, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the small base model, measure it, train it, measure it again, and show the difference.
    Demo(DemoArgs),
    /// Start a coordinator and local workers, and show how the run goes.
    Launch(LaunchWithSftArgs),
    /// Fine-tune the language model on worked examples.
    Sft(LaunchArgs),
    /// Show a run.
    Status(StatusArgs),
    /// Give out no new work until `resume`.
    Pause(AddressArgs),
    /// Go on after `pause`.
    Resume(AddressArgs),
    /// Write a checkpoint and end the run; `launch --resume` goes on.
    Stop(AddressArgs),
    /// Send one worker home once it has finished what it holds.
    Drain(DrainArgs),
    /// Say what a configuration needs on each GPU, what an iteration costs, and whether it fits.
    Plan(PlanArgs),
    /// Print the hash of a model folder, by which pictures and caches name it.
    Digest(DigestArgs),
    /// Think, refine and draw one prompt or a file of prompts (passes its arguments to the rollout
    /// worker).
    #[command(disable_help_flag = true)]
    Sample(PassedArgs),
    /// Compute an iteration of a run again and say whether it is the same bit for bit (passes its
    /// arguments to the trainer).
    #[command(disable_help_flag = true)]
    Replay(PassedArgs),
    /// Draw a suite of prompts, have the images scored, and add up by category.
    Eval(EvalArgs),
    /// Repeat an experiment of the paper in the small world.
    #[command(subcommand)]
    Experiment(Experiment),
    /// Account for every tree of a run, from its journal and tables alone.
    Audit(AuditArgs),
    /// Check a configuration and print it in full.
    Config(ConfigArgs),
    /// Make a private authority and a certificate for each role.
    Certs(CertsArgs),
    /// Find out what something can be trusted with.
    #[command(subcommand)]
    Doctor(Doctor),
    /// List, verify, export or prune the checkpoints of a run.
    #[command(subcommand)]
    Checkpoints(Checkpoints),
}

/// `plan`.
#[derive(Clone, Debug, Args)]
pub struct PlanArgs {
    /// The configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Memory of a GPU, such as 80GiB; the exit code is 1 where a role does not fit.
    #[arg(long, value_name = "SIZE", value_parser = crate::plan::memory)]
    pub gpu_memory: Option<u64>,
    /// Where the model folder is not there, take the sizes of Qwen/Qwen-Image.
    #[arg(long)]
    pub published: bool,
    /// Tokens of a question, and of a refined prompt. Default: 128.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=32_768))]
    pub prompt_tokens: Option<u64>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// `digest`.
#[derive(Clone, Debug, Args)]
pub struct DigestArgs {
    /// The folder.
    pub folder: PathBuf,
    /// Write `B3SUMS` into it, the hash of each file: a folder on an object store needs it.
    #[arg(long)]
    pub write: bool,
}

/// `certs`.
#[derive(Clone, Debug, Args)]
pub struct CertsArgs {
    /// The folder; an authority that is in it is used again.
    #[arg(long, value_name = "DIR", default_value = "tls")]
    pub out: PathBuf,
    /// A name or address that others reach the coordinator at, besides `localhost`; may be repeated.
    #[arg(long, value_name = "HOST")]
    pub host: Vec<String>,
    /// For how many days certificates hold.
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub days: u32,
    /// Only this role; may be repeated. Default: all.
    #[arg(long, value_name = "ROLE", value_parser = role)]
    pub role: Vec<Role>,
}

fn role(name: &str) -> Result<Role, String> {
    let known = || Role::ALL.map(Role::as_str).join(", ");
    Role::named(name).ok_or_else(|| format!("there are {}", known()))
}

/// What to examine.
#[derive(Debug, Subcommand)]
pub enum Doctor {
    /// Race writers against an object store: does it keep what checkpoints and journal rely on?
    Storage {
        /// A folder, or a URL.
        url: String,
    },
}

/// What to do with the checkpoints of a run.
#[derive(Debug, Subcommand)]
pub enum Checkpoints {
    /// Show all: version, time, size, whether complete, and which is the newest.
    List(RunArgs),
    /// Read every byte and compare hashes; names each file that is not right.
    Verify(VerifyArgs),
    /// Write a folder as diffusers reads it: the base model with the checkpoint's weights put on.
    Export(ExportArgs),
    /// Delete all but the newest; never what a checkpoint that is kept names.
    Prune(PruneArgs),
}

/// A run that need not be running.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// The run's folder, such as `runs/demo`, or the URL of its store.
    pub run: String,
}

/// `checkpoints verify`.
#[derive(Clone, Debug, Args)]
pub struct VerifyArgs {
    /// The run's folder, such as `runs/demo`, or the URL of its store.
    pub run: String,
    /// Only this version, or `newest`.
    pub version: Option<String>,
}

/// `checkpoints export`.
#[derive(Clone, Debug, Args)]
pub struct ExportArgs {
    /// The run's folder, such as `runs/demo`, or the URL of its store.
    pub run: String,
    /// Which version, or `newest`.
    pub version: String,
    /// Pipeline folder of the base model that the run started from.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The folder to write; one of that name is replaced.
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
}

/// `checkpoints prune`.
#[derive(Clone, Debug, Args)]
pub struct PruneArgs {
    /// The run's folder, such as `runs/demo`, or the URL of its store.
    pub run: String,
    /// Keep the newest so many, at least one.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep: u32,
    /// Besides, keep each version divisible by this; 0: none.
    #[arg(long, value_name = "M", default_value_t = 0)]
    pub keep_every: u64,
    /// Only say what would be deleted.
    #[arg(long)]
    pub dry_run: bool,
}

/// A configuration file with overrides.
#[derive(Clone, Debug, Args)]
pub struct ConfigArgs {
    /// The configuration, a TOML file.
    pub config: PathBuf,
    /// Overrides a key, as `section.key=value`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// `launch`.
#[derive(Clone, Debug, Args)]
pub struct LaunchArgs {
    /// The configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Go on with the run that is in the store.
    #[arg(long)]
    pub resume: bool,
}

/// `launch` with what it alone has.
#[derive(Clone, Debug, Args)]
pub struct LaunchWithSftArgs {
    /// As `sft`.
    #[command(flatten)]
    pub launch: LaunchArgs,
    /// Leave the `[sft]` stage out: the model has been through it.
    #[arg(long)]
    pub skip_sft: bool,
}

/// `demo`.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// The configuration.
    #[arg(long, default_value = "configs/demo.toml")]
    pub config: PathBuf,
    /// Overrides a key, as `section.key=value`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Name of the run; it goes to `runs/NAME`.
    #[arg(long, default_value = "demo")]
    pub name: String,
    /// The one number everything random is derived from.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Go on with a demo that was interrupted.
    #[arg(long)]
    pub resume: bool,
    /// Size of the base model and of its training: `demo`, or `test` for a quick, poor one.
    #[arg(long, default_value = "demo")]
    pub profile: String,
}

/// Which coordinator.
#[derive(Clone, Debug, Args)]
pub struct AddressArgs {
    /// `http://HOST:PORT`, or a run's folder; without it, the newest run below `runs/`.
    pub address: Option<String>,
}

/// `status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Which coordinator.
    #[command(flatten)]
    pub address: AddressArgs,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Keep it on the screen until the run is over.
    #[arg(long)]
    pub watch: bool,
}

/// `audit`.
#[derive(Clone, Debug, Args)]
pub struct AuditArgs {
    /// The run's store: a folder such as `runs/demo`, or a URL.
    pub run: String,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// `drain`.
#[derive(Clone, Debug, Args)]
pub struct DrainArgs {
    /// The worker's name: `rollout-0`.
    pub worker: String,
    /// Which coordinator.
    #[command(flatten)]
    pub address: AddressArgs,
}

/// `eval`.
#[derive(Clone, Debug, Args)]
pub struct EvalArgs {
    /// Pipeline folder.
    pub model: PathBuf,
    /// A file of the suite: WISE's or T2I-ReasonBench's own JSON, or a prompt file; may be repeated.
    #[arg(long, required = true, value_name = "FILE")]
    pub suite: Vec<PathBuf>,
    /// What the files are, where their contents do not tell.
    #[arg(long)]
    pub format: Option<crate::suite::Format>,
    /// T2I-ReasonBench's questions to a file of prompts, for the scorer; may be repeated.
    #[arg(long, value_name = "FILE")]
    pub questions: Vec<PathBuf>,
    /// Where everything goes. Default: `runs/eval/MODEL-SUITE`.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// A configuration whose [reward] says who scores. Default: the small world's scorers, where the
    /// model has them.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Overrides a key of it, as `section.key=value`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    pub set: Vec<String>,
    /// Folder with the small world's scorers, where it is not the model's own.
    #[arg(long)]
    pub scorers: Option<PathBuf>,
    /// Which component plays a part in the suite's score, as `consistency=semantic`; may be repeated.
    #[arg(long, value_name = "ROLE=COMPONENT")]
    pub role: Vec<String>,
    /// Images of each prompt.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub images_per_prompt: u32,
    /// Only the first prompts.
    #[arg(long)]
    pub limit: Option<usize>,
    /// Seed of all noise.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Score the images that are there again, without making any.
    #[arg(long)]
    pub rescore: bool,
    /// How to sample, after `--`: `-- --steps 20 --no-think` (`duet sample --help` lists it).
    #[arg(last = true)]
    pub sampling: Vec<String>,
}

/// `experiment`.
#[derive(Clone, Debug, Subcommand)]
pub enum Experiment {
    /// The rows of the paper's tables 1, 4 and 5: base, thinking, SFT, GRPO in its variants.
    Paper(PaperArgs),
}

/// `experiment paper`.
#[derive(Clone, Debug, Args)]
pub struct PaperArgs {
    /// How many seeds, from 1.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=32))]
    pub seeds: u32,
    /// Only these rows; may be repeated. Default: all.
    #[arg(long, value_name = "ROW")]
    pub row: Vec<String>,
    /// The form that tests run: hardly trained models, one seed, three iterations.
    #[arg(long)]
    pub small: bool,
    /// The configuration of the reinforcement learning.
    #[arg(long, default_value = "configs/experiment-paper.toml")]
    pub config: PathBuf,
    /// Where runs go. What is finished there is not done again.
    /// Default: `runs/paper`.
    #[arg(long)]
    pub folder: Option<PathBuf>,
    /// Where the table, the curves and the raw numbers go.
    /// Default: `docs/results`; of the small form, `results` beside its runs.
    #[arg(long)]
    pub out: Option<PathBuf>,
}

/// Arguments for another program.
#[derive(Clone, Debug, Args)]
pub struct PassedArgs {
    /// Passed as they are; `--help` lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub rest: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
