//! What can go wrong with models, their files and their inputs.

use std::path::PathBuf;

/// An error of this crate. Every message names the file, tensor or key, and where there is one the
/// fix.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{path}: {reason}")]
    BadFile {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor of the model is not in the checkpoint.
    #[error("{origin}: tensor `{name}` is missing (shape {shape:?} expected)")]
    MissingTensor {
        /// File or folder it was sought in.
        origin: String,
        /// Its name.
        name: String,
        /// The shape its config calls for.
        shape: Vec<i64>,
    },
    /// A tensor has another shape than its config calls for.
    #[error("{origin}: tensor `{name}` has shape {got:?}, its config.json calls for {want:?}")]
    WrongShape {
        /// File or folder it came from.
        origin: String,
        /// Its name.
        name: String,
        /// The shape found.
        got: Vec<i64>,
        /// The shape expected.
        want: Vec<i64>,
    },
    /// A tensor has a dtype that cannot be used.
    #[error("{origin}: tensor `{name}` has dtype {got}; float32, float16 or bfloat16 expected")]
    WrongKind {
        /// File or folder it came from.
        origin: String,
        /// Its name.
        name: String,
        /// The dtype found.
        got: String,
    },
    /// A config holds a value that this implementation cannot run, or that contradicts another.
    #[error("{origin}: `{key}`: {reason}")]
    BadConfig {
        /// File it came from.
        origin: String,
        /// The key.
        key: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// An argument does not fit the model.
    #[error("{0}")]
    BadInput(String),
    /// A number is not finite where it must be.
    #[error("{what} is not finite{place}")]
    NotFinite {
        /// Which quantity.
        what: &'static str,
        /// Where, if known (leading space included).
        place: String,
    },
    /// The tokenizer refused.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template could not be rendered.
    #[error("chat template: {0}")]
    Template(String),
    /// A safetensors file could not be read or written.
    #[error(transparent)]
    TensorFile(#[from] duet_torch::tensorfile::TensorFileError),
    /// libtorch refused.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

impl ModelError {
    /// An I/O error with the path that it belongs to.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        ModelError::Io { path: path.into(), source }
    }

    /// A file that is not what it should be.
    pub fn bad_file(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        ModelError::BadFile { path: path.into(), reason: reason.into() }
    }

    /// A config value that cannot be.
    pub fn bad_config(
        origin: impl Into<String>,
        key: impl Into<String>,
        reason: impl Into<String>,
    ) -> Self {
        ModelError::BadConfig { origin: origin.into(), key: key.into(), reason: reason.into() }
    }
}

/// Result of this crate.
pub type Result<T, E = ModelError> = std::result::Result<T, E>;
