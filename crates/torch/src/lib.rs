//! The one door to libtorch: process-wide set-up, the device thread, collectives, safetensors,
//! seeded noise, digests, GELU and AdamW.
//!
//! All unsafe code and all C++ of the workspace are here; everything public is safe. Tensor
//! functions of `tch` without an `f_` prefix panic when libtorch refuses; [`device::DeviceThread`]
//! turns such a panic into an error.

mod activation;
mod backward;
pub mod bytes;
pub mod collective;
pub mod decode;
pub mod device;
mod digest;
mod ffi;
mod finite;
mod init;
pub mod memory;
pub mod optim;
mod panels;
mod random;
mod recompute;
pub mod tensorfile;

pub use activation::gelu;
pub use backward::backward;
pub use digest::digest_tensors;
pub use finite::{NonFinite, all_finite, require_finite};
pub use init::{InitError, Runtime, init};
pub use panels::Panels;
pub use random::{normal_tensor, uniform_tensor};
pub use recompute::recompute;

/// Tensors by checkpoint name, in name order: the order of every digest, file and bucket.
pub type Tensors = std::collections::BTreeMap<String, tch::Tensor>;
