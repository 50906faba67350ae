//! What every process of Duet has in common: its server or channel, its logs, how it is told to
//! stop, its exit codes, and, for workers, the session with the coordinator.
//!
//! The core's types are what callers see; messages of `duet.v1` stay inside.
#![forbid(unsafe_code)]

mod accept;
pub mod access;
pub mod certificate;
pub mod channel;
pub mod exit;
pub mod metrics;
pub mod observe;
pub mod place;
pub mod server;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
pub mod traces;
pub mod worker;

pub use channel::channel;
pub use server::server;

use std::time::Duration;

/// Largest message taken or sent, in bytes: 16 MiB. Tensors and images never travel in messages.
pub const MESSAGE_LIMIT: usize = 16 << 20;

/// How often an idle connection is probed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// How long a probe may stay unanswered before the connection counts as dead.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
