//! How a session ends early.

use crate::channel::BadAddress;
use crate::exit;
use duet_proto::DecodeError;
use std::time::Duration;

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The coordinator's address is not one.
    #[error(transparent)]
    Address(#[from] BadAddress),
    /// The coordinator does not want this worker: another configuration, a role it may not have.
    #[error("the coordinator refuses this worker: {0}")]
    Refused(String),
    /// The coordinator stayed away for too long.
    #[error(
        "no answer from the coordinator at {coordinator} for {} s ({last}): is it running? \
         start the worker again when it is",
        waited.as_secs()
    )]
    Lost {
        /// Its address.
        coordinator: String,
        /// For how long.
        waited: Duration,
        /// The newest failure.
        last: String,
    },
    /// The process was told to stop.
    #[error("stopped by a signal")]
    Stopped,
    /// A message, ours or the coordinator's, that breaks the rules of the wire format.
    #[error("bad message: {0}")]
    Message(#[from] DecodeError),
    /// The coordinator says that the report cannot be.
    #[error("the coordinator refuses the report: {0}")]
    ReportRefused(String),
    /// The coordinator answered with a verdict this build does not know.
    #[error("verdict {0} is not known to this build: are worker and coordinator of one build?")]
    Verdict(i32),
    /// An answer that trying again cannot mend.
    #[error("the coordinator answered with {code}: {message}")]
    Protocol {
        /// The gRPC code's name.
        code: String,
        /// What it said.
        message: String,
    },
}

impl SessionError {
    /// What the process should exit with.
    pub fn exit_code(&self) -> u8 {
        match self {
            SessionError::Stopped => exit::OK,
            SessionError::Address(_) => exit::USAGE,
            SessionError::Refused(_) => exit::CONFIG,
            SessionError::Lost { .. } => exit::RETRY,
            SessionError::Message(_)
            | SessionError::ReportRefused(_)
            | SessionError::Verdict(_)
            | SessionError::Protocol { .. } => exit::OTHER,
        }
    }
}
