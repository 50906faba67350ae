//! Why a rank could not go on, and the class it is counted under.

use duet_models::ModelError;
use duet_models::artifact::ArtifactError;
use duet_torch::InitError;
use duet_torch::collective::CollectiveError;
use duet_torch::device::DeviceError;
use duet_torch::optim::OptimError;
use duet_torch::tensorfile::TensorFileError;

/// A rendezvous, a restore or a step that could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The models refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An artifact of a rollout is not what it should be.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// A weights or checkpoint file is not what it should be.
    #[error(transparent)]
    File(#[from] TensorFileError),
    /// The optimiser refused.
    #[error(transparent)]
    Optim(#[from] OptimError),
    /// The ranks could not work together.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The device thread did not answer.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// libtorch could not be set up.
    #[error(transparent)]
    Init(#[from] InitError),
    /// libtorch refused.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// A loss or gradient is not finite; nothing was changed.
    #[error("{what} is not finite in iteration {iteration}: {place}")]
    NonFinite {
        /// Which quantity.
        what: String,
        /// The iteration.
        iteration: u32,
        /// The trees or tensors it was found in.
        place: String,
    },
    /// Another rank could not do its part of a step; nothing was changed.
    #[error("rank {rank}: {reason}")]
    Peer {
        /// Which rank.
        rank: u32,
        /// The class of its failure.
        kind: String,
        /// What it said.
        reason: String,
    },
    /// The coordinator asked for something that this rank cannot do.
    #[error("{0}")]
    Protocol(String),
    /// The store refused, or has something else than it should.
    #[error("{0}")]
    Store(String),
    /// A checkpoint that does not fit this run.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
}

impl TrainError {
    /// The class of failures it is counted under.
    pub fn kind(&self) -> &str {
        match self {
            TrainError::NonFinite { .. }
            | TrainError::Model(ModelError::NotFinite { .. })
            | TrainError::Artifact(ArtifactError::NotFinite { .. }) => "non-finite",
            TrainError::Collective(_) => "collective",
            TrainError::Artifact(_) | TrainError::File(_) | TrainError::Store(_) => "artifact",
            TrainError::Checkpoint(_) => "checkpoint",
            TrainError::Peer { kind, .. } => kind,
            TrainError::Protocol(_) => "protocol",
            _ => "model",
        }
    }
}
