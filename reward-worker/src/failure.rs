//! What ends the process, and the exit code it ends with.

use crate::http::HttpError;
use crate::scorer::Twice;
use duet_config::ConfigError;
use duet_miniworld::WorldError;
use duet_service::exit;
use duet_service::place::PlaceError;
use duet_service::worker::SessionError;
use duet_torch::device::DeviceError;

/// A failure of the whole process.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(String),
    /// The store or the system refused.
    #[error("{0}")]
    Io(String),
    /// Nothing says who this process is, or it has no GPU.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The session with the coordinator ended early.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The small world's scorers cannot be loaded.
    #[error("reward.scorers: `miniworld`: {0}")]
    World(#[from] WorldError),
    /// The scorer behind HTTP cannot be set up.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// Two scorers score the same component.
    #[error(transparent)]
    Twice(#[from] Twice),
    /// The device thread cannot be started.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// libtorch cannot be set up.
    #[error(transparent)]
    Torch(#[from] duet_torch::InitError),
}

impl Failure {
    /// The exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Config(_) | Failure::Twice(_) | Failure::Http(_) => exit::CONFIG,
            Failure::Io(_) | Failure::World(WorldError::Io { .. }) => exit::IO,
            Failure::World(WorldError::BadFile { .. }) => exit::CONFIG,
            Failure::Place(error) => error.exit_code(),
            Failure::Session(error) => error.exit_code(),
            Failure::World(_) | Failure::Device(_) | Failure::Torch(_) => exit::OTHER,
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::Read { .. } => Failure::Io(error.to_string()),
            error => Failure::Config(error.to_string()),
        }
    }
}
