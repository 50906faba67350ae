//! What a checkpoint consists of.

use bytes::Bytes;
use duet_core::work::Weights;
use duet_core::{ArtifactRef, Digest, Generation, PolicyVersion};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What manifests call themselves.
pub const FORMAT: &str = "duet-checkpoint/1";
/// Largest manifest that is read.
pub const MAX_MANIFEST_BYTES: u64 = 64 << 20;

/// A checkpoint: both models, both optimisers and the scheduler at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: String,
    /// Optimiser steps committed.
    pub version: PolicyVersion,
    /// Trainer ranks that wrote it. A run may go on with another number.
    pub world: u32,
    /// What each rank wrote, in rank order: trained parameters and optimiser state.
    pub shards: Vec<Vec<ArtifactRef>>,
    /// The policy, as rollout workers load it.
    pub weights: Weights,
    /// The scheduler's durable state; `None` when the journal alone holds it.
    pub scheduler: Option<ArtifactRef>,
    /// The newest journal segment when it was made.
    pub journal_position: u64,
    /// The coordinator's generation.
    pub generation: Generation,
    /// Name of the run.
    pub run: String,
    /// Hash over the configuration that decides results.
    pub config: Digest,
    /// When it was made, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// Anything else that is worth knowing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub notes: BTreeMap<String, String>,
}

/// The file: a manifest and the hash of its compact JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    manifest: Manifest,
    blake3: Digest,
}

impl Manifest {
    /// Every object that the checkpoint consists of, but the manifest.
    pub fn objects(&self) -> Vec<ArtifactRef> {
        let shards = self.shards.iter().flatten();
        let weights = [&self.weights.llm, &self.weights.dit].into_iter().flatten();
        shards.chain(weights).chain(&self.scheduler).cloned().collect()
    }

    /// Bytes of all objects together.
    pub fn bytes(&self) -> u64 {
        self.objects().iter().map(|object| object.bytes).sum()
    }

    /// Whether this restores to the same state as `other`: version, weights and configuration.
    pub fn same_state(&self, other: &Manifest) -> bool {
        self.version == other.version
            && self.weights.digest == other.weights.digest
            && self.config == other.config
    }

    /// The file's contents.
    ///
    /// # Errors
    /// Why it cannot be written.
    pub fn to_bytes(&self) -> Result<Bytes, String> {
        let compact = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        let sealed = Sealed { manifest: self.clone(), blake3: Digest::of(&compact) };
        let mut text = serde_json::to_vec_pretty(&sealed).map_err(|error| error.to_string())?;
        text.push(b'\n');
        Ok(text.into())
    }

    /// Reads a file's contents.
    ///
    /// # Errors
    /// Why they are no manifest.
    pub fn from_bytes(bytes: &[u8]) -> Result<Manifest, String> {
        let sealed: Sealed = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if sealed.manifest.format != FORMAT {
            return Err(format!("its format is `{}`, not `{FORMAT}`", sealed.manifest.format));
        }
        let compact = serde_json::to_vec(&sealed.manifest).map_err(|error| error.to_string())?;
        if Digest::of(&compact) != sealed.blake3 {
            return Err("its hash does not match its contents".to_owned());
        }
        Ok(sealed.manifest)
    }
}
