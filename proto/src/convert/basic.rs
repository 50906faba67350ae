//! Names, digests, numbers, weights: what both directions share.

use super::DecodeError;
use crate::v1 as wire;
use duet_core::work::{Gates, LeaseId, PromptRow, Unit, Weights, Window};
use duet_core::{
    ArtifactRef, Attempt, Digest, Generation, PolicyVersion, Role, Seed, TreeId, WorkerId,
};

/// Longest name (worker, component, metric, kind of failure) in bytes.
pub const MAX_NAME: usize = 128;
/// Longest artifact key or network address in bytes.
pub const MAX_KEY: usize = 1024;
/// Longest prompt, metadata or response text in bytes.
pub const MAX_TEXT: usize = 256 * 1024;
/// Longest reason for a person, in bytes; longer ones are cut by the sender.
pub const MAX_REASON: usize = 8 * 1024;
/// Longest description of a build in bytes.
pub const MAX_BUILD: usize = 256;

/// Who sent a message, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sender {
    /// Its name.
    pub worker: WorkerId,
    /// Which process.
    pub session: u64,
    /// The coordinator generation it registered with; zero when registering.
    pub generation: Generation,
}

impl TryFrom<Option<wire::Caller>> for Sender {
    type Error = DecodeError;

    fn try_from(from: Option<wire::Caller>) -> Result<Sender, DecodeError> {
        let caller = required("caller", from)?;
        let worker = name("caller.worker_id", caller.worker_id)?;
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if !worker.chars().all(allowed) {
            return Err(DecodeError::BadName { field: "caller.worker_id", name: worker });
        }
        Ok(Sender {
            worker: WorkerId(worker),
            session: caller.session,
            generation: Generation(caller.generation),
        })
    }
}

impl From<&Sender> for wire::Caller {
    fn from(from: &Sender) -> Self {
        wire::Caller {
            worker_id: from.worker.0.clone(),
            session: from.session,
            generation: from.generation.0,
        }
    }
}

/// A field that must be there.
pub(super) fn required<T>(field: &'static str, value: Option<T>) -> Result<T, DecodeError> {
    value.ok_or(DecodeError::Missing(field))
}

/// A text of at most `bound` bytes.
pub(super) fn text(
    field: &'static str,
    value: String,
    bound: usize,
) -> Result<String, DecodeError> {
    match value.len() {
        length if length > bound => Err(DecodeError::TooLong { field, length, bound }),
        _ => Ok(value),
    }
}

/// A name: not empty, no control characters, at most [`MAX_NAME`] bytes.
pub(super) fn name(field: &'static str, value: String) -> Result<String, DecodeError> {
    let value = text(field, value, MAX_NAME)?;
    if value.is_empty() || value.chars().any(char::is_control) {
        return Err(DecodeError::BadName { field, name: value.escape_debug().to_string() });
    }
    Ok(value)
}

/// A list of at most `bound` elements.
pub(super) fn list<T>(
    field: &'static str,
    value: Vec<T>,
    bound: usize,
) -> Result<Vec<T>, DecodeError> {
    match value.len() {
        count if count > bound => Err(DecodeError::TooMany { field, count, bound }),
        _ => Ok(value),
    }
}

/// Every element of a bounded list, decoded.
pub(super) fn decode_all<W, C: TryFrom<W, Error = DecodeError>>(
    field: &'static str,
    value: Vec<W>,
    bound: usize,
) -> Result<Vec<C>, DecodeError> {
    list(field, value, bound)?.into_iter().map(C::try_from).collect()
}

/// A number that is neither NaN nor infinite.
pub(super) fn finite(field: &'static str, value: f64) -> Result<f64, DecodeError> {
    if value.is_finite() { Ok(value) } else { Err(DecodeError::NonFinite(field)) }
}

fn thirty_two(field: &'static str, value: &[u8]) -> Result<[u8; 32], DecodeError> {
    value.try_into().map_err(|_| DecodeError::NotThirtyTwo { field, length: value.len() })
}

/// A digest from its 32 bytes.
///
/// # Errors
/// [`DecodeError::NotThirtyTwo`], naming `field`.
pub fn decode_digest(field: &'static str, value: &[u8]) -> Result<Digest, DecodeError> {
    thirty_two(field, value).map(Digest)
}

pub(super) fn decode_seed(field: &'static str, value: &[u8]) -> Result<Seed, DecodeError> {
    thirty_two(field, value).map(Seed)
}

/// `reason` cut, at a character, to what a message may hold.
pub fn clip_reason(reason: &str) -> String {
    let fits = (0..=reason.len().min(MAX_REASON)).rev().find(|end| reason.is_char_boundary(*end));
    reason[..fits.unwrap_or(0)].to_owned()
}

/// A role from the number on the wire.
///
/// # Errors
/// [`DecodeError::Unknown`] for zero and for numbers of newer builds.
pub fn decode_role(value: i32) -> Result<Role, DecodeError> {
    match wire::Role::try_from(value) {
        Ok(wire::Role::Rollout) => Ok(Role::Rollout),
        Ok(wire::Role::Reward) => Ok(Role::Reward),
        Ok(wire::Role::Trainer) => Ok(Role::Trainer),
        Ok(wire::Role::Unspecified) | Err(_) => Err(DecodeError::Unknown { field: "role", value }),
    }
}

impl From<Role> for wire::Role {
    fn from(from: Role) -> Self {
        match from {
            Role::Rollout => wire::Role::Rollout,
            Role::Reward => wire::Role::Reward,
            Role::Trainer => wire::Role::Trainer,
        }
    }
}

impl From<&ArtifactRef> for wire::ArtifactRef {
    fn from(from: &ArtifactRef) -> Self {
        let digest = from.digest.0.to_vec();
        wire::ArtifactRef { key: from.key.clone(), digest, bytes: from.bytes }
    }
}

impl TryFrom<wire::ArtifactRef> for ArtifactRef {
    type Error = DecodeError;

    fn try_from(from: wire::ArtifactRef) -> Result<Self, DecodeError> {
        if from.key.is_empty() {
            return Err(DecodeError::Missing("artifact.key"));
        }
        Ok(ArtifactRef {
            key: text("artifact.key", from.key, MAX_KEY)?,
            digest: decode_digest("artifact.digest", &from.digest)?,
            bytes: from.bytes,
        })
    }
}

impl From<&Weights> for wire::Weights {
    fn from(from: &Weights) -> Self {
        wire::Weights {
            version: from.version.0,
            llm: from.llm.as_ref().map(Into::into),
            dit: from.dit.as_ref().map(Into::into),
            digest: from.digest.0.to_vec(),
        }
    }
}

impl TryFrom<wire::Weights> for Weights {
    type Error = DecodeError;

    fn try_from(from: wire::Weights) -> Result<Self, DecodeError> {
        Ok(Weights {
            version: PolicyVersion(from.version),
            llm: from.llm.map(ArtifactRef::try_from).transpose()?,
            dit: from.dit.map(ArtifactRef::try_from).transpose()?,
            digest: decode_digest("weights.digest", &from.digest)?,
        })
    }
}

impl From<&PromptRow> for wire::PromptRow {
    fn from(from: &PromptRow) -> Self {
        wire::PromptRow { row: from.row, text: from.text.clone(), meta: from.meta.clone() }
    }
}

impl TryFrom<wire::PromptRow> for PromptRow {
    type Error = DecodeError;

    fn try_from(from: wire::PromptRow) -> Result<Self, DecodeError> {
        Ok(PromptRow {
            row: from.row,
            text: text("prompt.text", from.text, MAX_TEXT)?,
            meta: text("prompt.meta", from.meta, MAX_TEXT)?,
        })
    }
}

impl From<TreeId> for wire::TreeId {
    fn from(from: TreeId) -> Self {
        wire::TreeId { iteration: from.iteration, index: from.index }
    }
}

impl From<wire::TreeId> for TreeId {
    fn from(from: wire::TreeId) -> Self {
        TreeId { iteration: from.iteration, index: from.index }
    }
}

impl From<Window> for wire::Window {
    fn from(from: Window) -> Self {
        wire::Window { start: from.start, len: from.len }
    }
}

impl TryFrom<wire::Window> for Window {
    type Error = DecodeError;

    fn try_from(from: wire::Window) -> Result<Self, DecodeError> {
        let why = "its end is beyond any step";
        let end = from.start.checked_add(from.len);
        end.ok_or(DecodeError::Contradiction { field: "window", why })?;
        Ok(Window { start: from.start, len: from.len })
    }
}

impl From<Gates> for wire::Gates {
    fn from(from: Gates) -> Self {
        wire::Gates { llm: from.llm, dit: from.dit }
    }
}

impl TryFrom<wire::Gates> for Gates {
    type Error = DecodeError;

    fn try_from(from: wire::Gates) -> Result<Self, DecodeError> {
        Ok(Gates { llm: finite("gates.llm", from.llm)?, dit: finite("gates.dit", from.dit)? })
    }
}

impl From<LeaseId> for wire::LeaseId {
    fn from(from: LeaseId) -> Self {
        let (trace, stage) = match from.unit {
            Unit::Think(_) => (None, wire::Stage::Think),
            Unit::Render(subtree) => (Some(subtree.trace), wire::Stage::Render),
            Unit::Score(subtree) => (Some(subtree.trace), wire::Stage::Score),
        };
        let tree = Some(from.unit.tree().into());
        wire::LeaseId { tree, trace, stage: stage.into(), attempt: from.attempt.0 }
    }
}

impl TryFrom<wire::LeaseId> for LeaseId {
    type Error = DecodeError;

    fn try_from(from: wire::LeaseId) -> Result<Self, DecodeError> {
        let tree = TreeId::from(required("lease.tree", from.tree)?);
        let subtree = || required("lease.trace", from.trace).map(|trace| tree.subtree(trace));
        let unit = match wire::Stage::try_from(from.stage) {
            Ok(wire::Stage::Think) if from.trace.is_some() => {
                let why = "a think lease is for a tree, not for one trace";
                return Err(DecodeError::Contradiction { field: "lease.trace", why });
            }
            Ok(wire::Stage::Think) => Unit::Think(tree),
            Ok(wire::Stage::Render) => Unit::Render(subtree()?),
            Ok(wire::Stage::Score) => Unit::Score(subtree()?),
            Ok(wire::Stage::Unspecified) | Err(_) => {
                return Err(DecodeError::Unknown { field: "lease.stage", value: from.stage });
            }
        };
        if from.attempt == 0 {
            let why = "attempts count from one";
            return Err(DecodeError::Contradiction { field: "lease.attempt", why });
        }
        Ok(LeaseId { unit, attempt: Attempt(from.attempt) })
    }
}
