//! The command line of a rank.

use clap::Args;
use std::path::PathBuf;

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
    /// This worker's name, unique in the run.
    #[arg(long)]
    pub id: String,
    /// This machine's address, as the other ranks reach it. Default: the one that leads to the
    /// coordinator.
    #[arg(long)]
    pub host: Option<String>,
}
