//! What takes bytes from outside - the network, the store, files of users - as functions of any bytes.
//!
//! A target must come back: with a value or with an error, never a panic, an overflow or memory out
//! of proportion to its input. What it accepts must survive being written and read again.
#![forbid(unsafe_code)]

pub mod files;
pub mod journal;
pub mod wire;

/// A decoder and examples of what it accepts, from which a search starts.
pub struct Target {
    /// Its name, as `make fuzz TARGET=` takes it.
    pub name: &'static str,
    /// Feeds it.
    pub run: fn(&[u8]),
    /// Inputs that it accepts.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: [Target; 8] = [
    Target { name: "proto", run: wire::run, seeds: wire::seeds },
    Target { name: "journal", run: journal::segment, seeds: journal::segments },
    Target { name: "records", run: journal::record, seeds: journal::records },
    Target { name: "manifest", run: files::manifest, seeds: files::manifests },
    Target { name: "config", run: files::config, seeds: files::configs },
    Target { name: "prompts", run: files::prompts, seeds: files::prompt_files },
    Target { name: "sums", run: files::sums, seeds: files::sum_files },
    Target { name: "safetensors", run: files::tensors, seeds: files::tensor_files },
];

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
