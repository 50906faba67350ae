//! `duet pause`, `resume`, `stop`, `drain`.

use crate::CliError;
use crate::args::{AddressArgs, DrainArgs};
use crate::client::{Client, Wish, environment_tls, environment_trusts, resolve};

async fn tell(args: &AddressArgs, wish: Wish<'_>, done: &str) -> Result<(), CliError> {
    let address = resolve(args.address.as_deref())?;
    Client::connect(&address, environment_tls().as_ref(), environment_trusts())
        .await?
        .control(wish)
        .await?;
    println!("{done}");
    Ok(())
}

/// `duet pause`.
///
/// # Errors
/// No coordinator answers.
pub async fn pause(args: &AddressArgs) -> Result<(), CliError> {
    tell(args, Wish::Pause, "paused: what runs finishes, nothing new is given out").await
}

/// `duet resume`.
///
/// # Errors
/// No coordinator answers.
pub async fn resume(args: &AddressArgs) -> Result<(), CliError> {
    tell(args, Wish::Resume, "resumed").await
}

/// `duet stop`.
///
/// # Errors
/// No coordinator answers.
pub async fn stop(args: &AddressArgs) -> Result<(), CliError> {
    tell(args, Wish::Stop("duet stop"), "stopping: a checkpoint is written, then the run ends")
        .await
}

/// `duet drain`.
///
/// # Errors
/// No coordinator answers, or it knows no such worker.
pub async fn drain(args: &DrainArgs) -> Result<(), CliError> {
    let done = format!("{} leaves once it has finished what it holds", args.worker);
    tell(&args.address, Wish::Drain(&args.worker), &done).await
}
