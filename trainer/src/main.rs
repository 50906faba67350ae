//! `duet-trainer`.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use duet_core::Role;
use duet_service::{exit, telemetry};
use duet_trainer::args::RunArgs;
use duet_trainer::bootstrap::{self, BootstrapArgs};
use duet_trainer::failure::Failure;
use duet_trainer::replay::{self, ReplayArgs};
use duet_trainer::run;
use duet_trainer::sft::{self, SftArgs};
use std::process::ExitCode;

/// Trains: a data-parallel rank of a run, or the small world's base model.
#[derive(Debug, Parser)]
#[command(name = "duet-trainer", version, about)]
struct Cli {
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
enum Command {
    /// Work for a run until its coordinator says that it is over.
    Run(RunArgs),
    /// Fine-tune the language model on worked examples, as one rank of several.
    Sft(SftArgs),
    /// Compute an iteration's optimiser step again, and say whether it is the same bit for bit.
    Replay(ReplayArgs),
    /// Make the small world's base model, prompts, scorers and judge.
    Bootstrap(BootstrapArgs),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let asked = !error.use_stderr();
            // A closed pipe is no reason to fail at this point.
            let _ = error.print();
            return ExitCode::from(if asked { exit::OK } else { exit::USAGE });
        }
    };
    match carry_out(&cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

/// The exit code.
fn carry_out(command: &Command) -> Result<u8, Failure> {
    match command {
        Command::Run(args) => {
            let who = args.place.worker(Role::Trainer, &duet_config::environment())?;
            telemetry::init(&who.id);
            who.announce();
            run::run(args, &who)?;
        }
        Command::Sft(args) => {
            telemetry::init(&format!("sft-{}", args.rank));
            sft::run(args)?;
        }
        Command::Replay(args) => {
            telemetry::init("replay");
            let same = replay::run(args)?;
            return Ok(if same { exit::OK } else { exit::OTHER });
        }
        Command::Bootstrap(args) => bootstrap::run(args)?,
    }
    Ok(exit::OK)
}
