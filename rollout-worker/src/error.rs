//! Why work failed, and the class it is counted under.

use duet_core::{Digest, PolicyVersion};
use duet_models::ModelError;
use duet_models::artifact::ArtifactError;
use duet_torch::NonFinite;
use duet_torch::device::DeviceError;
use duet_torch::tensorfile::TensorFileError;

/// A lease or a publication that could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// The models refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An artifact is not what it should be.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// A weights file is not what it should be.
    #[error(transparent)]
    Weights(#[from] TensorFileError),
    /// A weights file has numbers that are not finite.
    #[error("weights of {version}: {source}")]
    BadWeights {
        /// Which version.
        version: PolicyVersion,
        /// Which tensor.
        source: NonFinite,
    },
    /// A lease asks for a policy that this worker does not hold.
    #[error("{0} is not held by this worker")]
    NotHeld(PolicyVersion),
    /// Two policies claim the same version.
    #[error("{version} is held with digest {}, the lease asks for {}", held.short(), asked.short())]
    OtherPolicy {
        /// The version.
        version: PolicyVersion,
        /// What is held.
        held: Digest,
        /// What was asked for.
        asked: Digest,
    },
    /// The device thread did not answer.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The artifact store refused.
    #[error("{0}")]
    Store(String),
    /// A lease that is none for this worker.
    #[error("{0}")]
    Refused(String),
}

impl WorkError {
    /// The class of failures it is counted under.
    pub fn kind(&self) -> &'static str {
        match self {
            WorkError::Model(ModelError::NotFinite { .. })
            | WorkError::Artifact(ArtifactError::NotFinite { .. })
            | WorkError::BadWeights { .. } => "non-finite",
            WorkError::Artifact(_) | WorkError::Weights(_) | WorkError::Store(_) => "artifact",
            WorkError::Model(_) | WorkError::Device(_) => "model",
            WorkError::NotHeld(_) | WorkError::OtherPolicy { .. } => "policy",
            WorkError::Refused(_) => "protocol",
        }
    }
}
