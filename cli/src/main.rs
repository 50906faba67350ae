//! `duet`: starts, watches and reports on runs.
#![forbid(unsafe_code)]

use clap::Parser;
use duet_cli::args::{Cli, Command, Doctor, Experiment};
use duet_cli::{
    CliError, audit, certs, checkpoints, children, control, demo, eval, experiment, launch, plan,
    sft, show, status,
};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime =
        match tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build() {
            Ok(runtime) => runtime,
            Err(error) => {
                eprintln!("duet: cannot start: {error}");
                return ExitCode::FAILURE;
            }
        };
    match runtime.block_on(run(cli.command)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{} {error}", show::red("error:"));
            ExitCode::from(error.code())
        }
    }
}

async fn run(command: Command) -> Result<u8, CliError> {
    match command {
        Command::Demo(args) => demo::run(args).await,
        Command::Launch(args) => launch::run(args).await,
        Command::Sft(args) => sft::run(args).await,
        Command::Status(args) => status::run(args).await.map(|()| 0),
        Command::Pause(args) => control::pause(&args).await.map(|()| 0),
        Command::Resume(args) => control::resume(&args).await.map(|()| 0),
        Command::Stop(args) => control::stop(&args).await.map(|()| 0),
        Command::Drain(args) => control::drain(&args).await.map(|()| 0),
        Command::Plan(args) => plan::run(&args),
        Command::Digest(args) => show::digest(&args).map(|()| 0),
        Command::Sample(args) => children::pass("duet-rollout-worker", "sample", &args.rest).await,
        Command::Replay(args) => children::pass("duet-trainer", "replay", &args.rest).await,
        Command::Eval(args) => eval::run(args).await,
        Command::Experiment(Experiment::Paper(args)) => experiment::run(args).await,
        Command::Audit(args) => audit::run(&args).await,
        Command::Config(args) => show::config(&args).map(|()| 0),
        Command::Certs(args) => certs::run(&args).map(|()| 0),
        Command::Checkpoints(command) => checkpoints::run(command).await,
        Command::Doctor(Doctor::Storage { url }) => show::storage(&url).await,
    }
}
