//! The command line of a rank.

use clap::Args;
use duet_service::place::PlaceArgs;
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
    /// Who this is.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// This machine's address, as the other ranks reach it. Default: the one that leads to the
    /// coordinator.
    #[arg(long)]
    pub host: Option<String>,
}
