//! `duet-reward-worker`.
#![forbid(unsafe_code)]

use clap::Parser;
use duet_core::Role;
use duet_reward_worker::args::{Cli, Command, RunArgs};
use duet_reward_worker::failure::Failure;
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
        Command::Run(args) => work(&args),
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

fn work(args: &RunArgs) -> Result<(), Failure> {
    let who = args.place.worker(Role::Reward, &duet_config::environment())?;
    telemetry::init(&who.id);
    who.announce();
    run::run(args, &who)
}
