//! Every key of a run's store. Other programs depend on them, so they are written nowhere else.
//!
//! ```text
//! run.json                                        whose run this is; created once, first
//! config.toml                                     its configuration, without secrets
//! journal/generations/00000001                    who took the journal over; never deleted
//! journal/segments/000000000001                   numbered, created once; the first of those it holds
//! journal/snapshots/000000000042                  the state after that segment
//! artifacts/i000012/t0003/j2/think-a1.safetensors
//! artifacts/i000012/t0003/j2/render-a1.safetensors
//! weights/v00000042/{llm,dit}-e3.safetensors      of one trainer epoch
//! checkpoints/step-00000042/...                   shards; manifest.json last
//! lineage/traces/iteration=000042/part-0.parquet
//! ```

use duet_core::{Attempt, PolicyVersion, Rank, SubtreeId, TrainerEpoch, TreeId};

/// Whose run the store holds: created once, before anything else.
pub const RUN: &str = "run.json";
/// The configuration that the run was begun with, without secrets.
pub const CONFIG: &str = "config.toml";
/// Prefix of the run's journal.
pub const JOURNAL: &str = "journal";
/// Prefix of sampled traces and rendered images.
pub const ARTIFACTS: &str = "artifacts";
/// Prefix of published weights.
pub const WEIGHTS: &str = "weights";
/// Prefix of checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";
/// Prefix of the tables.
pub const LINEAGE: &str = "lineage";
/// File name that makes a checkpoint complete.
pub const MANIFEST: &str = "manifest.json";

/// A branch of the policy, as weight files are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Branch {
    /// The LLM encoder.
    Llm,
    /// The DiT.
    Dit,
}

impl Branch {
    /// `llm` or `dit`.
    pub fn as_str(self) -> &'static str {
        match self {
            Branch::Llm => "llm",
            Branch::Dit => "dit",
        }
    }
}

/// Folder of a tree's artifacts.
pub fn tree(tree: TreeId) -> String {
    format!("{ARTIFACTS}/i{:06}/t{:04}", tree.iteration, tree.index)
}

/// Folder of an iteration's artifacts.
pub fn iteration(iteration: u32) -> String {
    format!("{ARTIFACTS}/i{iteration:06}")
}

/// A trace: tokens, log-probs, embeddings.
pub fn think(trace: SubtreeId, attempt: Attempt) -> String {
    format!("{}/j{}/think-a{}.safetensors", tree(trace.tree), trace.trace, attempt.0)
}

/// The K leaves of a trace: latents of the window, log-probs, images.
pub fn render(subtree: SubtreeId, attempt: Attempt) -> String {
    format!("{}/j{}/render-a{}.safetensors", tree(subtree.tree), subtree.trace, attempt.0)
}

/// Published weights of a branch, as the trainer group `epoch` computed them.
pub fn weights(version: PolicyVersion, branch: Branch, epoch: TrainerEpoch) -> String {
    format!("{WEIGHTS}/v{:08}/{}-e{}.safetensors", version.0, branch.as_str(), epoch.0)
}

/// The version that a weight file's key belongs to.
pub fn weights_version(key: &str) -> Option<PolicyVersion> {
    let (number, _) = key.strip_prefix(WEIGHTS)?.strip_prefix("/v")?.split_once('/')?;
    (number.len() == 8).then(|| number.parse().ok()).flatten().map(PolicyVersion)
}

/// Folder of a checkpoint.
pub fn checkpoint(version: PolicyVersion) -> String {
    format!("{CHECKPOINTS}/step-{:08}", version.0)
}

/// What a trainer rank keeps of a checkpoint, written by the trainer group `epoch`.
pub fn shard(version: PolicyVersion, rank: Rank, world: u32, epoch: TrainerEpoch) -> String {
    let folder = checkpoint(version);
    format!("{folder}/trainer-{:05}-of-{world:05}-e{}.safetensors", rank.0, epoch.0)
}

/// The scheduler's durable state that a checkpoint holds, named by its content since a coordinator
/// that was restarted may write it again with other journal positions.
pub fn scheduler_state(version: PolicyVersion, digest: duet_core::Digest) -> String {
    format!("{}/scheduler-{}.json", checkpoint(version), digest.short())
}

/// What makes a checkpoint complete.
pub fn manifest(version: PolicyVersion) -> String {
    format!("{}/{MANIFEST}", checkpoint(version))
}

/// The version of a manifest's key.
pub fn manifest_version(key: &str) -> Option<PolicyVersion> {
    let middle = key.strip_prefix(CHECKPOINTS)?.strip_prefix("/step-")?;
    let number = middle.strip_suffix(MANIFEST)?.strip_suffix('/')?;
    (number.len() == 8).then(|| number.parse().ok()).flatten().map(PolicyVersion)
}

/// The version of a checkpoint that a key lies in, manifest or not.
pub fn checkpoint_version(key: &str) -> Option<PolicyVersion> {
    let rest = key.strip_prefix(CHECKPOINTS)?.strip_prefix("/step-")?;
    let (number, _) = rest.split_once('/')?;
    (number.len() == 8).then(|| number.parse().ok()).flatten().map(PolicyVersion)
}

/// A claim of a journal generation.
pub(crate) fn generation(journal: &str, generation: u64) -> String {
    format!("{}/{generation:08}", generations(journal))
}

/// Folder of the generations.
pub(crate) fn generations(journal: &str) -> String {
    format!("{journal}/generations")
}

/// A journal segment.
pub(crate) fn segment(journal: &str, number: u64) -> String {
    format!("{}/{number:012}", segments(journal))
}

/// Folder of the segments.
pub(crate) fn segments(journal: &str) -> String {
    format!("{journal}/segments")
}

/// The state after a segment.
pub(crate) fn snapshot(journal: &str, number: u64) -> String {
    format!("{}/{number:012}", snapshots(journal))
}

/// Folder of the snapshots.
pub(crate) fn snapshots(journal: &str) -> String {
    format!("{journal}/snapshots")
}

/// The number at the end of a journal's key.
pub(crate) fn number(key: &str) -> Option<u64> {
    let (_, last) = key.rsplit_once('/')?;
    last.bytes().all(|byte| byte.is_ascii_digit()).then(|| last.parse().ok()).flatten()
}

/// An iteration's rows of a table.
pub fn table(table: &str, iteration: u32) -> String {
    format!("{LINEAGE}/{table}/iteration={iteration:06}/part-0.parquet")
}

/// The iteration of a table file's key.
pub fn table_iteration(table: &str, key: &str) -> Option<u32> {
    let rest = key.strip_prefix(LINEAGE)?.strip_prefix('/')?.strip_prefix(table)?;
    let rest = rest.strip_prefix("/iteration=")?.strip_suffix("/part-0.parquet")?;
    rest.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        let subtree = TreeId { iteration: 12, index: 3 }.subtree(2);
        assert_eq!(think(subtree, Attempt(1)), "artifacts/i000012/t0003/j2/think-a1.safetensors");
        assert_eq!(render(subtree, Attempt(2)), "artifacts/i000012/t0003/j2/render-a2.safetensors");
        let version = PolicyVersion(42);
        assert_eq!(
            weights(version, Branch::Dit, TrainerEpoch(3)),
            "weights/v00000042/dit-e3.safetensors"
        );
        assert_eq!(manifest(version), "checkpoints/step-00000042/manifest.json");
        assert_eq!(
            shard(version, Rank(1), 2, TrainerEpoch(3)),
            "checkpoints/step-00000042/trainer-00001-of-00002-e3.safetensors"
        );
        assert_eq!(table("traces", 42), "lineage/traces/iteration=000042/part-0.parquet");
    }

    #[test]
    fn keys_are_read_back() {
        let version = PolicyVersion(7);
        assert_eq!(manifest_version(&manifest(version)), Some(version));
        assert_eq!(checkpoint_version(&shard(version, Rank(0), 1, TrainerEpoch(1))), Some(version));
        assert_eq!(manifest_version("checkpoints/step-0000000x/manifest.json"), None);
        assert_eq!(manifest_version(&shard(version, Rank(0), 1, TrainerEpoch(1))), None);
        let weights = weights(version, Branch::Llm, TrainerEpoch(1));
        assert_eq!(weights_version(&weights), Some(version));
        assert_eq!(weights_version(&manifest(version)), None);
        assert_eq!(table_iteration("leaves", &table("leaves", 9)), Some(9));
        assert_eq!(number(&segment(JOURNAL, 77)), Some(77));
        assert_eq!(number("journal/segments/x1"), None);
    }
}
