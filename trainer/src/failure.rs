//! What ends the process, and the exit code it ends with.

use crate::error::TrainError;
use duet_config::ConfigError;
use duet_miniworld::WorldError;
use duet_models::ModelError;
use duet_service::exit;
use duet_service::place::PlaceError;
use duet_service::worker::SessionError;

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
    /// The models cannot be loaded or trained.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The base model cannot be made.
    #[error(transparent)]
    World(#[from] WorldError),
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::Read { .. } => Failure::Io(error.to_string()),
            error => Failure::Config(error.to_string()),
        }
    }
}

impl Failure {
    /// The exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Config(_) => exit::CONFIG,
            Failure::Io(_) => exit::IO,
            Failure::Place(error) => error.exit_code(),
            Failure::Session(error) => error.exit_code(),
            Failure::Train(error) => train(error),
            Failure::World(WorldError::Io { .. }) => exit::IO,
            Failure::World(_) => exit::OTHER,
        }
    }
}

fn train(error: &TrainError) -> u8 {
    match error {
        TrainError::Model(ModelError::Io { .. }) => exit::IO,
        TrainError::Model(ModelError::NotFinite { .. } | ModelError::Torch(_)) => exit::OTHER,
        TrainError::Model(_) => exit::CONFIG,
        TrainError::File(_) | TrainError::Store(_) => exit::IO,
        TrainError::Collective(_) => exit::RETRY,
        _ => exit::OTHER,
    }
}
