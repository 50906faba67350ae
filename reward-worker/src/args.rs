//! The command line.

use clap::{Args, Parser, Subcommand};
use duet_service::place::PlaceArgs;
use std::path::PathBuf;

/// Scores images for a run.
#[derive(Debug, Parser)]
#[command(name = "duet-reward-worker", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Work for a run until its coordinator says that it is over.
    Run(RunArgs),
    /// Score the images that `duet eval` made.
    Score(ScoreArgs),
}

/// `score`.
#[derive(Debug, Args)]
pub struct ScoreArgs {
    /// Folder with `eval.json` and `images/`; `scores.jsonl` is written there.
    #[arg(long)]
    pub eval: PathBuf,
    /// The prompts that the images were made of, one JSON object a line.
    #[arg(long)]
    pub prompts: PathBuf,
    /// A configuration whose `[reward]` says who scores.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Overrides a key, as `section.key=value`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// The folder with the small world's scorers. Without a configuration they are the ones asked.
    #[arg(long)]
    pub scorers: Option<PathBuf>,
}

/// `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The run's configuration.
    #[arg(long)]
    pub config: PathBuf,
    /// Overrides a key, as `section.key=value`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Where the coordinator listens, as `http://HOST:PORT`.
    #[arg(long)]
    pub coordinator: String,
    /// Who this is.
    #[command(flatten)]
    pub place: PlaceArgs,
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
