//! `duet-coordinator`: schedules a run. Exit codes: 0 the run is complete or was stopped in order,
//! 64 wrong command line, 74 files, ports or store, 75 try again, 78 wrong configuration, 1 the run
//! failed.
#![forbid(unsafe_code)]

use clap::Parser;
use duet_config::Config;
use duet_coordinator::{CoordinatorError, Options, Service};
use duet_core::scheduler::FinishReason;
use duet_service::{exit, shutdown, telemetry};
use std::path::PathBuf;
use std::process::ExitCode;

/// Schedules a Duet run: gives out work to rollout, reward and trainer workers and keeps its journal.
#[derive(Parser)]
#[command(name = "duet-coordinator", version)]
struct Arguments {
    /// Configuration of the run, TOML.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Overrides a key of it; may be repeated.
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Listens here instead of at `coordinator.listen`; port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// A file that gets the address (`http://HOST:PORT`) once requests are taken.
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// Goes on with the run that the store holds; begins it when it holds none.
    #[arg(long)]
    resume: bool,
    /// Prints the whole configuration as it would be used, without secrets, and exits.
    #[arg(long)]
    print_config: bool,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let code = if error.use_stderr() { exit::USAGE } else { exit::OK };
            // A closed terminal is no reason to fail differently.
            drop(error.print());
            return code.into();
        }
    };
    telemetry::init("coordinator");
    match run(arguments) {
        Ok(()) => exit::OK.into(),
        Err(error) => {
            tracing::error!("{error}");
            error.exit_code().into()
        }
    }
}

fn run(arguments: Arguments) -> Result<(), CoordinatorError> {
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    // An override like any other, so that it is checked like any other.
    let listen = arguments.listen.map(|listen| format!("coordinator.listen={listen}"));
    let set: Vec<String> = arguments.set.into_iter().chain(listen).collect();
    let config = Config::load(&arguments.config, &environment, &set)?;
    if arguments.print_config {
        print!("{}", config.to_toml());
        return Ok(());
    }
    let mut options = Options::new(&config)?;
    options.resume = arguments.resume;
    options.ready_file = arguments.ready_file;
    // One thread: whatever a lease takes is less than waking another thread for it. What takes longer
    // (tables, files) has threads of its own.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(CoordinatorError::Runtime)?;
    runtime.block_on(async {
        let shutdown = shutdown::token().map_err(CoordinatorError::Runtime)?;
        match Service::build(options).await?.run(shutdown).await? {
            FinishReason::Completed => tracing::info!("the run is complete"),
            _ => tracing::info!("the run is stopped; --resume goes on with it"),
        }
        Ok(())
    })
}
