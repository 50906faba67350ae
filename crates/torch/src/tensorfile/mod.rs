//! safetensors files: read lazily through a memory map, written so that equal content gives equal
//! bytes, split over several files with an index where that is asked for, or into pieces that
//! several writers hold.
//!
//! Format: <https://github.com/huggingface/safetensors>; index files as in the Hugging Face hub
//! (`*.safetensors.index.json`, `weight_map`).

mod dtype;
mod error;
mod pieces;
mod read;
mod shards;
mod write;

pub use dtype::{dtype_of, kind_of};
pub use error::TensorFileError;
pub use pieces::{Assembly, Piece, lay_pieces};
pub use read::{Place, Spec, TensorFile, TensorSource};
pub use safetensors::Dtype;
pub use shards::{INDEX_SUFFIX, ShardedFile, write_sharded};
pub use write::{Content, Metadata, encode, encode_contents, encode_into, write, write_bytes};
