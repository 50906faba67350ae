//! Checkpoints on their way: the ranks write their shards while the next steps run.
//!
//! ```text
//! step with a checkpoint starts --> expected --ShardDone of every rank, in any order--\
//!                                       \---- the step is committed ------------------+--> WriteCheckpoint
//! group given up, or no word in time --> forgotten: that version gets no checkpoint
//! ```
//! Nothing of this is durable: after a restart the group forms anew from the newest complete
//! checkpoint, and shards of a version without a manifest are nobody's.

use super::api::{Effect, FinishReason};
use super::state::State;
use super::{Scheduler, Verdict};
use crate::mutation::Mutation;
use crate::work::{ShardDone, Weights};
use crate::{ArtifactRef, Millis, PolicyVersion, WorkerId};
use std::collections::BTreeMap;

/// A checkpoint that the present group was told to write.
#[derive(Clone, Debug)]
pub(super) struct Saving {
    /// Ranks that write a shard.
    world: u32,
    /// What each rank has written and made durable.
    shards: BTreeMap<u32, Vec<ArtifactRef>>,
    /// Once the step is through: the policy and the durable state after it.
    taken: Option<(Weights, Box<State>)>,
    /// The last shard must be there by then; counted anew when the step is through.
    deadline: Millis,
}

impl Saving {
    fn is_complete(&self) -> bool {
        let enough = self.shards.len() == self.world as usize
            || Mutation::ManifestEarly.on() && !self.shards.is_empty();
        self.taken.is_some() && enough
    }
}

impl Scheduler {
    /// A step that ends in a checkpoint begins.
    pub(super) fn expect_shards(&mut self, version: PolicyVersion, world: u32) {
        let deadline = self.now.after(self.spec.timing.step);
        let saving = Saving { world, shards: BTreeMap::new(), taken: None, deadline };
        self.saving.insert(version, saving);
    }

    /// The step is through, and committed if it was an update.
    pub(super) fn step_saved(&mut self, version: PolicyVersion, weights: Weights) {
        let deadline = self.now.after(self.spec.timing.step);
        if let Some(saving) = self.saving.get_mut(&version) {
            saving.deadline = deadline;
            saving.taken = Some((weights, Box::new(self.state.clone())));
        }
    }

    pub(super) fn shard_done(&mut self, worker: &WorkerId, report: ShardDone) -> Verdict {
        if report.epoch != self.state.epoch || self.group.rank_of(worker) != Some(report.rank.0) {
            return Verdict::Stale;
        }
        match self.saving.get_mut(&report.version) {
            None => Verdict::Stale,
            Some(saving) if saving.shards.contains_key(&report.rank.0) => Verdict::Duplicate,
            Some(saving) => {
                saving.shards.insert(report.rank.0, report.shards);
                Verdict::Accepted
            }
        }
    }

    /// Asks for the manifest of the oldest complete checkpoint; one at a time.
    pub(super) fn write_checkpoint(&mut self) {
        if self.writing.is_some() || self.halted {
            return;
        }
        let complete = self.saving.iter().find(|(_, saving)| saving.is_complete());
        let Some(version) = complete.map(|(version, _)| *version) else { return };
        let Some(Saving { shards, taken: Some((weights, snapshot)), .. }) =
            self.saving.remove(&version)
        else {
            return;
        };
        self.writing = Some(version);
        let shards = shards.into_values().collect();
        self.output.effects.push(Effect::WriteCheckpoint { version, shards, weights, snapshot });
    }

    /// The group is given up: what its ranks have not written by now will not come.
    pub(super) fn forget_shards(&mut self) {
        self.saving.retain(|_, saving| saving.is_complete());
    }

    pub(super) fn next_saving_deadline(&self) -> Option<Millis> {
        let open = self.saving.values().filter(|saving| !saving.is_complete());
        open.filter(|saving| saving.taken.is_some()).map(|saving| saving.deadline).min()
    }

    /// A rank's shard cannot be had. The run goes on from the checkpoint before, but not for ever: a
    /// store that takes no checkpoints is found out before the end of the run.
    pub(super) fn shard_failed(&mut self, kind: &str, text: &str) {
        self.saving_failures += 1;
        self.abort_group(kind, text);
        let failures = self.saving_failures;
        if failures >= self.spec.max_attempts {
            let text = format!("{failures} checkpoints in a row could not be written; {text}");
            self.finish(FinishReason::Failed(text));
        }
    }

    /// A rank that cannot write its shard says so; one that says nothing is as good as lost.
    pub(super) fn expire_saving(&mut self) {
        if self.next_saving_deadline().is_none_or(|deadline| deadline > self.now) {
            return;
        }
        let late = self.saving.iter().find(|(_, saving)| {
            saving.taken.is_some() && !saving.is_complete() && saving.deadline <= self.now
        });
        let Some((version, saving)) = late else { return };
        let missing =
            super::trainers::absent(self.group.members(), |rank| saving.shards.contains_key(&rank));
        let text = format!("no shard of the checkpoint of {version} from {missing}");
        self.abort_group("checkpoint-deadline", &text);
    }
}
