//! What can go wrong in the small world.

use duet_models::ModelError;
use duet_torch::optim::OptimError;
use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// A model refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An optimiser step failed.
    #[error(transparent)]
    Optim(#[from] OptimError),
    /// libtorch refused.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{path}: {reason}")]
    BadFile {
        /// Which.
        path: PathBuf,
        /// What is wrong, and the fix.
        reason: String,
    },
    /// The digits that are compiled in cannot be read.
    #[error("the built-in digits cannot be read: {0}")]
    Digits(String),
    /// A prompt of another data set: this world's scorers know only their own.
    #[error("prompt {row} has no target that the small world's scorers know: {reason}")]
    Target {
        /// Row of the prompt.
        row: u64,
        /// What its `meta` lacks.
        reason: String,
    },
    /// An argument does not fit.
    #[error("{0}")]
    BadInput(String),
    /// A loss is not finite.
    #[error("the loss of {phase} is not finite at step {step}")]
    NotFinite {
        /// Phase of the bootstrap.
        phase: &'static str,
        /// Step of the phase.
        step: usize,
    },
    /// A thread of the bootstrap panicked.
    #[error("{0} stopped unexpectedly")]
    Stopped(&'static str),
}

impl WorldError {
    /// An I/O error with its path.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        WorldError::Io { path: path.into(), source }
    }
}

/// Result of this crate.
pub type Result<T, E = WorldError> = std::result::Result<T, E>;
