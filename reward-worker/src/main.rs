//! `duet-reward-worker`.
#![forbid(unsafe_code)]

use clap::Parser;
use duet_reward_worker::args::{Cli, Command};
use duet_reward_worker::run;
use duet_service::{exit, telemetry};
use std::process::ExitCode;

fn main() -> ExitCode {
    let Command::Run(args) = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => {
            let asked = !error.use_stderr();
            // A closed pipe is no reason to fail at this point.
            let _ = error.print();
            return ExitCode::from(if asked { exit::OK } else { exit::USAGE });
        }
    };
    telemetry::init(&args.id);
    match run::run(&args) {
        Ok(()) => ExitCode::from(exit::OK),
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}
