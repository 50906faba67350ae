//! `duet-trainer bootstrap`: makes the small world's base model.

use clap::{Args, ValueEnum};
use duet_miniworld::WorldError;
use duet_miniworld::bootstrap::{Notice, Profile, Stage, run_to};
use std::path::PathBuf;
use std::time::Instant;

/// What to make, and where.
#[derive(Args, Debug)]
pub struct BootstrapArgs {
    /// Folder to make; one that already holds the same model is used again.
    #[arg(long)]
    pub out: PathBuf,
    /// Seed of everything random.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How much work goes into it.
    #[arg(long, value_enum, default_value_t = Effort::Demo)]
    pub profile: Effort,
    /// Stop after pre-training: the base model that SFT starts from.
    #[arg(long)]
    pub without_sft: bool,
}

/// The profiles, as they are written on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Effort {
    /// Minutes: a model that reinforcement learning makes good.
    Demo,
    /// Seconds: the same parts, hardly trained, for tests.
    Test,
}

/// Makes the model and says, on standard error, how far it is.
///
/// # Errors
/// The folder holds something else, the system refuses, or training fails.
pub fn run(args: &BootstrapArgs) -> Result<(), WorldError> {
    let start = Instant::now();
    let profile = match args.profile {
        Effort::Demo => Profile::Demo,
        Effort::Test => Profile::Test,
    };
    let say = |notice: Notice| {
        let Notice { phase, step, steps, loss } = notice;
        // Ten lines for each phase.
        if step == steps || step % (steps / 10).max(1) == 0 {
            let seconds = start.elapsed().as_secs_f64();
            eprintln!("{seconds:6.1}s  {phase:<15} {step:>5}/{steps}  loss {loss:.4}");
        }
    };
    let stage = if args.without_sft { Stage::Pretrained } else { Stage::Sft };
    let manifest = run_to(&args.out, (args.seed, profile, stage), &say)?;
    let measured = manifest.measured;
    eprintln!(
        "{:6.1}s  {}: traces right {:.2}, images right {:.2} (scorer {:.2}, judge {:.2}); content {}",
        start.elapsed().as_secs_f64(),
        args.out.display(),
        measured.trace_accuracy,
        measured.render_accuracy,
        measured.recogniser_accuracy,
        measured.judge_accuracy,
        &manifest.content[..16.min(manifest.content.len())],
    );
    Ok(())
}
