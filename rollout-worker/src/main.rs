//! `duet-rollout-worker`.
#![forbid(unsafe_code)]

use clap::Parser;
use duet_core::Role;
use duet_rollout_worker::args::{Cli, Command};
use duet_rollout_worker::failure::Failure;
use duet_rollout_worker::{evaluate, export, run, sample};
use duet_service::{exit, telemetry};
use std::process::ExitCode;

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
        Ok(()) => ExitCode::from(exit::OK),
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn carry_out(command: &Command) -> Result<(), Failure> {
    let say = |line: &str| eprintln!("{line}");
    match command {
        Command::Run(args) => {
            let who = args.place.worker(Role::Rollout, &duet_config::environment())?;
            telemetry::init(&who.id);
            who.announce();
            run::run(args, &who)
        }
        Command::Eval(args) => {
            duet_torch::init(args.sampling.threads)?;
            evaluate::command::run(args, say)?;
            Ok(())
        }
        Command::Export(args) => {
            duet_torch::init(1)?;
            export::export(args)?;
            say(&format!("wrote {}", args.out.display()));
            Ok(())
        }
        Command::Sample(args) => {
            duet_torch::init(args.sampling.threads)?;
            Ok(sample::sample(args)?)
        }
    }
}
