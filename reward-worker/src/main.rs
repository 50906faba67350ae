//! `duet-reward-worker`.
#![forbid(unsafe_code)]

use clap::Parser;
use duet_reward_worker::args::{Cli, Command};
use duet_reward_worker::{run, score};
use duet_service::{exit, telemetry};
use std::process::ExitCode;

fn main() -> ExitCode {
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => {
            let asked = !error.use_stderr();
            // A closed pipe is no reason to fail at this point.
            let _ = error.print();
            return ExitCode::from(if asked { exit::OK } else { exit::USAGE });
        }
    };
    let done = match command {
        Command::Run(args) => {
            telemetry::init(&args.id);
            run::run(&args)
        }
        Command::Score(args) => score::score(&args, |line| eprintln!("{line}")),
    };
    match done {
        Ok(()) => ExitCode::from(exit::OK),
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}
