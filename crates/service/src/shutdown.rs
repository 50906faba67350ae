//! How a process is told to stop.

use crate::exit;
use std::io::Read;
use tokio::signal::unix::{Signal, SignalKind, signal};
pub use tokio_util::sync::CancellationToken;

/// Environment variable a launcher sets for its children: end when standard input does.
pub const EXIT_WITH_PARENT: &str = "DUET_EXIT_WITH_PARENT";

/// Ends the process when its launcher ends, however that happens: the launcher holds the other end
/// of standard input, which the kernel closes with it. Without [`EXIT_WITH_PARENT`], does nothing.
///
/// Ending at once is safe everywhere: whatever matters is durable before it is acted on.
pub fn exit_with_parent() {
    if std::env::var_os(EXIT_WITH_PARENT).is_none() {
        return;
    }
    std::thread::spawn(|| {
        let mut input = std::io::stdin();
        let mut byte = [0];
        while matches!(input.read(&mut byte), Ok(1)) {}
        std::process::exit(i32::from(exit::RETRY));
    });
}

/// A token that is cancelled by the first SIGINT or SIGTERM; a second one ends the process at once
/// with [`exit::INTERRUPTED`].
///
/// # Errors
/// When the signal handlers cannot be installed.
///
/// # Panics
/// Outside a tokio runtime, as `tokio::spawn` does.
pub fn token() -> std::io::Result<CancellationToken> {
    exit_with_parent();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let token = CancellationToken::new();
    let told = token.clone();
    tokio::spawn(async move {
        either(&mut interrupt, &mut terminate).await;
        tracing::info!("stopping; a second signal ends the process at once");
        told.cancel();
        either(&mut interrupt, &mut terminate).await;
        std::process::exit(i32::from(exit::INTERRUPTED));
    });
    Ok(token)
}

async fn either(interrupt: &mut Signal, terminate: &mut Signal) {
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
