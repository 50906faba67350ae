use std::path::PathBuf;
use tch::Kind;

/// What is wrong with a tensor file. Every variant names the file.
#[derive(Debug, thiserror::Error)]
pub enum TensorFileError {
    /// The system refused.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// Shorter than its header says.
    #[error("{file} is truncated: {found} bytes, its header promises {expected}")]
    Truncated {
        /// The file.
        file: String,
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },
    /// Not a safetensors file, or one whose header contradicts itself.
    #[error("{file} is not a valid safetensors file: {reason}")]
    Header {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// No such tensor.
    #[error("{file} has no tensor `{name}`")]
    Missing {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
    },
    /// An element type that libtorch cannot hold.
    #[error("{file}: tensor `{name}` has elements of type {dtype}, which cannot be computed with")]
    Unsupported {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// Another element type than was asked for.
    #[error("{file}: tensor `{name}` is {found:?}, expected {expected:?}")]
    Kind {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
        /// What it is.
        found: Kind,
        /// What was asked for.
        expected: Kind,
    },
    /// Another shape than was asked for.
    #[error("{file}: tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
        /// What it is.
        found: Vec<i64>,
        /// What was asked for.
        expected: Vec<i64>,
    },
    /// Pieces that do not make up one tensor.
    #[error("tensor `{name}` cannot be put together from its pieces: {reason}")]
    Pieces {
        /// The tensor.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// libtorch refused.
    #[error("{file}: tensor `{name}`: libtorch: {reason}")]
    Torch {
        /// The file.
        file: String,
        /// The tensor.
        name: String,
        /// Its words.
        reason: String,
    },
}
