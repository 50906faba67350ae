//! The command line.

use clap::{Args, Parser, Subcommand};
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
    Launch(LaunchArgs),
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
    /// Think, refine and draw one prompt (passes its arguments to the rollout worker).
    #[command(disable_help_flag = true)]
    Sample(PassedArgs),
    /// Draw and judge a file of prompts (passes its arguments to the rollout worker).
    #[command(disable_help_flag = true)]
    Eval(PassedArgs),
    /// Check a configuration and print it in full.
    Config(ConfigArgs),
    /// Find out what something can be trusted with.
    #[command(subcommand)]
    Doctor(Doctor),
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

/// `drain`.
#[derive(Clone, Debug, Args)]
pub struct DrainArgs {
    /// The worker's name: `rollout-0`.
    pub worker: String,
    /// Which coordinator.
    #[command(flatten)]
    pub address: AddressArgs,
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
