//! Trainer groups: formed, restored, given up.
//!
//! ```text
//! None --world trainers wait--> Forming --all TrainerReady--> Ready(version) --batch ready--> Stepping
//!   ^                              |                             ^    |                          |
//!   +---- lost rank, failure, deadline (AbortTrainers) ----------+----+ <----- all StepDone -----+
//! ```
//! A group in `Ready` or `Stepping` may still be writing the checkpoint of an earlier step: see
//! `saving`.
//!
//! A new group goes on from the newest committed version where one of its ranks still holds that and
//! can give it to the others. Else it restores the newest checkpoint and repeats the committed steps
//! since then from their stored trees. The digest must come out as journaled; nothing is sampled
//! twice. A group of another size, where the run allows one, cannot repeat the bits: what comes out is
//! journaled anew.

use super::api::{Effect, FinishReason};
use super::record::Record;
use super::{Scheduler, Verdict};
use crate::mutation::Mutation;
use crate::work::{Assignment, Held, Rendezvous, Step, StepDone};
use crate::{ArtifactRef, Digest, Millis, PolicyVersion, Rank, Role, TrainerEpoch, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// A trainer group.
#[derive(Clone, Debug)]
pub(super) enum Group {
    None,
    Forming {
        members: Vec<WorkerId>,
        /// What its ranks restore: the same for all of them, whatever is written meanwhile.
        restore: Option<(PolicyVersion, ArtifactRef)>,
        /// What its ranks may go on from instead, if one of them holds it.
        newest: Option<Held>,
        /// Which of the two it is, once a rank has said so.
        version: Option<PolicyVersion>,
        told: BTreeSet<u32>,
        store: Option<String>,
        ready: BTreeSet<u32>,
        deadline: Millis,
    },
    Ready {
        members: Vec<WorkerId>,
        version: PolicyVersion,
    },
    Stepping {
        members: Vec<WorkerId>,
        step: Box<Step>,
        told: BTreeSet<u32>,
        done: BTreeMap<u32, StepDone>,
        deadline: Millis,
    },
}

/// Groups that came to nothing since the last commit: all of them, and those in which a rank said
/// that it cannot do what it was told, which trying again may never cure.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GroupFailures {
    all: u32,
    own: u32,
    /// No new group before this moment.
    not_before: Millis,
}

/// What a rank says when it could not write its part of a checkpoint.
pub const SHARD: &str = "shard";

/// Groups that may be lost between two commits, for every failure that is allowed.
const LOST_FACTOR: u32 = 20;

impl Group {
    pub(super) fn members(&self) -> &[WorkerId] {
        match self {
            Group::None => &[],
            Group::Forming { members, .. }
            | Group::Ready { members, .. }
            | Group::Stepping { members, .. } => members,
        }
    }

    fn deadline(&self) -> Option<Millis> {
        match self {
            Group::Forming { deadline, .. } | Group::Stepping { deadline, .. } => Some(*deadline),
            Group::None | Group::Ready { .. } => None,
        }
    }

    pub(super) fn rank_of(&self, worker: &WorkerId) -> Option<u32> {
        self.members().iter().position(|m| m == worker).map(|rank| rank as u32)
    }

    /// The version its ranks hold, or will at least when they are restored.
    pub(super) fn version(&self) -> Option<PolicyVersion> {
        match self {
            Group::None => None,
            Group::Forming { restore, .. } => {
                Some(restore.as_ref().map_or(PolicyVersion(0), |(version, _)| *version))
            }
            Group::Ready { version, .. } => Some(*version),
            Group::Stepping { step, .. } => Some(PolicyVersion(u64::from(step.iteration))),
        }
    }
}

impl Scheduler {
    /// A rank that asks again has lost what it was told: it is told again.
    pub(super) fn trainer_polled(&mut self, worker: &WorkerId) {
        let Some(rank) = self.group.rank_of(worker) else { return };
        match &mut self.group {
            Group::Forming { told, ready, .. } if !ready.contains(&rank) => {
                told.remove(&rank);
            }
            Group::Stepping { told, done, .. } if !done.contains_key(&rank) => {
                told.remove(&rank);
            }
            _ => {}
        }
    }

    /// Forms a group, tells its ranks what to do, starts the next step.
    pub(super) fn drive_trainers(&mut self) {
        if matches!(self.group, Group::None | Group::Forming { .. }) && self.stopping {
            // Every committed step is in the journal; there is nothing that a group could save.
            self.finish(FinishReason::Stopped);
            return;
        }
        let ready = |group: &Group| match group {
            Group::Ready { version, .. } => Some(*version),
            _ => None,
        };
        let waits = ready(&self.group).is_some_and(|version| self.grow_group(version));
        if matches!(self.group, Group::None) {
            self.form_group();
        }
        if let Some(version) = ready(&self.group).filter(|_| !waits) {
            self.next_step(version);
        }
        self.tell_ranks();
    }

    /// Forms a group of the idle trainers that failed least, in name order: ranks are shares of
    /// work, and which process has which does not change the result.
    fn form_group(&mut self) {
        if self.now < self.group_failures.not_before {
            return;
        }
        let mut members: Vec<WorkerId> = self.workers.idle(Role::Trainer).cloned().collect();
        let Some(world) = self.possible_world(members.len()) else { return };
        let failed = |id: &WorkerId| self.workers.get(id).map_or(0, |worker| worker.failed);
        members.sort_by_key(failed);
        members.truncate(world);
        members.sort();
        let (epoch, world) = (TrainerEpoch(self.state.epoch.0 + 1), members.len() as u32);
        self.commit(Record::EpochStarted { epoch, world });
        self.short_since = None;
        self.group = Group::Forming {
            members,
            restore: self.state.checkpoint.clone(),
            newest: self.state.newest_held(),
            version: None,
            told: BTreeSet::new(),
            store: None,
            ready: BTreeSet::new(),
            deadline: self.now.after(self.spec.timing.rendezvous),
        };
    }

    /// How many of `idle` trainers form a group now: all that are wanted, or, when those did not come
    /// for a while, as many as there are, if the run allows it. A checkpoint on its way is waited for,
    /// since it holds what a smaller group would repeat to other bits.
    fn possible_world(&mut self, idle: usize) -> Option<usize> {
        let full = self.spec.world as usize;
        if idle >= full {
            return Some(full);
        }
        let least = self.spec.min_world as usize;
        let saves = self.writing.is_some() || !self.saving.is_empty();
        if least == 0 || idle < least || saves {
            self.short_since = None;
            return None;
        }
        let since = *self.short_since.get_or_insert(self.now);
        (self.now >= since.after(self.patience())).then_some(idle)
    }

    /// How long a group waits for its last ranks: for the first start, or for a process to come back.
    fn patience(&self) -> Millis {
        let timing = &self.spec.timing;
        if self.state.epoch.0 == 0 { timing.rendezvous } else { timing.heartbeat_timeout }
    }

    /// A group that is smaller than wanted ends when more ranks are there and a new one would have
    /// nothing to repeat. True: it takes no step before the checkpoint of its version is there, which is
    /// on its way, so that this moment comes.
    fn grow_group(&mut self, version: PolicyVersion) -> bool {
        if self.stopping || version.0 >= u64::from(self.spec.iterations) {
            return false;
        }
        let saved = self.state.checkpoint.as_ref().map_or(PolicyVersion(0), |(v, _)| *v);
        let members = self.group.members().to_vec();
        let idle = self.workers.idle(Role::Trainer).filter(|id| !members.contains(id)).count();
        let short = members.len() < self.spec.world as usize;
        if !short || idle == 0 {
            return false;
        }
        if self.saving.contains_key(&version) || self.writing == Some(version) {
            return true;
        }
        if saved != version {
            return false;
        }
        let reason = format!("{idle} more trainers are there");
        let epoch = self.state.epoch;
        self.group = Group::None;
        self.output.effects.push(Effect::AbortTrainers { epoch, workers: members, reason });
        false
    }

    /// Tells each waiting rank its part, once.
    fn tell_ranks(&mut self) {
        let epoch = self.state.epoch;
        let waits = |id: &WorkerId| self.workers.get(id).is_some_and(|w| w.waiting);
        let mut messages: Vec<(WorkerId, Assignment)> = Vec::new();
        match &mut self.group {
            Group::Forming { members, restore, newest, told, store, .. } => {
                for (rank, member) in (0u32..).zip(members.iter()) {
                    let may = rank == 0 || store.is_some();
                    if may && waits(member) && told.insert(rank) {
                        let rendezvous = Rendezvous {
                            epoch,
                            rank: Rank(rank),
                            world: members.len() as u32,
                            store: if rank == 0 { None } else { store.clone() },
                            restore: restore.as_ref().map(|(_, manifest)| manifest.clone()),
                            newest: *newest,
                        };
                        messages.push((member.clone(), Assignment::Rendezvous(rendezvous)));
                    }
                }
            }
            Group::Stepping { members, step, told, .. } => {
                for (rank, member) in (0u32..).zip(members.iter()) {
                    if waits(member) && told.insert(rank) {
                        messages.push((member.clone(), Assignment::Step((**step).clone())));
                    }
                }
            }
            Group::None | Group::Ready { .. } => {}
        }
        for (worker, assignment) in messages {
            self.send(&worker, assignment);
        }
    }

    pub(super) fn store_ready(
        &mut self,
        worker: &WorkerId,
        epoch: TrainerEpoch,
        address: String,
    ) -> Verdict {
        if epoch != self.state.epoch || self.group.rank_of(worker) != Some(0) {
            return Verdict::Stale;
        }
        match &mut self.group {
            Group::Forming { store, .. } if store.is_none() => {
                *store = Some(address);
                Verdict::Accepted
            }
            _ => Verdict::Duplicate,
        }
    }

    pub(super) fn trainer_ready(
        &mut self,
        worker: &WorkerId,
        epoch: TrainerEpoch,
        rank: Rank,
        version: PolicyVersion,
        digest: Digest,
    ) -> Verdict {
        if epoch != self.state.epoch || self.group.rank_of(worker) != Some(rank.0) {
            return Verdict::Stale;
        }
        let Group::Forming { members, restore, newest, version: agreed, ready, .. } =
            &mut self.group
        else {
            return Verdict::Duplicate;
        };
        let saved = restore.as_ref().map_or(PolicyVersion(0), |(version, _)| *version);
        let held = newest.map(|held| held.version);
        let expected = agreed.unwrap_or_else(|| held.filter(|h| *h == version).unwrap_or(saved));
        let committed = self.state.trained_digest(version);
        let differs = committed.filter(|committed| *committed != digest);
        if version != expected {
            let text = format!("{worker} restored {version} instead of {expected}");
            self.fail_group(worker, "restore", &text);
            return Verdict::Refused(text);
        }
        *agreed = Some(version);
        if let Some(committed) = differs.filter(|_| !Mutation::SkipDigest.on()) {
            let text = format!(
                "{worker} restored {version} with digest {digest}, but it was committed with \
                 {committed}"
            );
            self.fail_group(worker, "divergence", &text);
            return Verdict::Refused(text);
        }
        if !ready.insert(rank.0) {
            return Verdict::Duplicate;
        }
        if ready.len() == members.len() {
            self.group = Group::Ready { members: members.clone(), version };
        }
        Verdict::Accepted
    }

    pub(super) fn trainer_failed(
        &mut self,
        worker: &WorkerId,
        epoch: TrainerEpoch,
        rank: Rank,
        kind: &str,
        reason: &str,
    ) -> Verdict {
        if epoch != self.state.epoch || self.group.rank_of(worker) != Some(rank.0) {
            return Verdict::Stale;
        }
        let text = format!("{worker} ({rank}): {reason}");
        if kind == "collective" {
            // What a rank says when another one went away.
            self.abort_group(kind, &text);
        } else if kind == SHARD {
            self.workers.change(worker, |worker| worker.failed += 1);
            self.shard_failed(kind, &text);
        } else {
            self.fail_group(worker, kind, &text);
        }
        Verdict::Accepted
    }

    pub(super) fn trainer_lost(&mut self, worker: &WorkerId, kind: &str, reason: &str) {
        if self.finished.is_some() {
            self.group = Group::None;
            self.saving.clear();
        } else if self.group.rank_of(worker).is_some() {
            self.abort_group(kind, &format!("{worker}: {reason}"));
        }
    }

    pub(super) fn next_group_deadline(&self) -> Option<Millis> {
        if !matches!(self.group, Group::None) {
            return self.group.deadline();
        }
        let backoff = self.group_failures.not_before;
        let backoff = (backoff > self.now).then_some(backoff);
        let smaller = self.short_since.map(|since| since.after(self.patience()));
        backoff.into_iter().chain(smaller.filter(|at| *at > self.now)).min()
    }

    pub(super) fn expire_group(&mut self) {
        if self.group.deadline().is_none_or(|deadline| deadline > self.now) {
            return;
        }
        let (what, missing) = match &self.group {
            Group::Forming { members, ready, .. } => {
                ("rendezvous", absent(members, |r| ready.contains(&r)))
            }
            Group::Stepping { members, done, .. } => {
                ("step", absent(members, |r| done.contains_key(&r)))
            }
            Group::None | Group::Ready { .. } => return,
        };
        self.abort_group(&format!("{what}-deadline"), &format!("no word from {missing}"));
    }

    /// A rank could not do what it was told. Tried again in a new group, a few times.
    pub(super) fn fail_group(&mut self, worker: &WorkerId, kind: &str, reason: &str) {
        self.workers.change(worker, |worker| worker.failed += 1);
        self.group_failures.own += 1;
        self.abort_group(kind, reason);
    }

    pub(super) fn abort_group(&mut self, kind: &str, reason: &str) {
        let workers = self.group.members().to_vec();
        let epoch = self.state.epoch;
        self.group = Group::None;
        self.forget_shards();
        let reason = format!("trainer group of {epoch}: {kind}: {reason}");
        self.fail(kind, reason.clone());
        self.output.effects.push(Effect::AbortTrainers { epoch, workers, reason: reason.clone() });
        self.group_failures.all += 1;
        let GroupFailures { all, own, .. } = self.group_failures;
        self.group_failures.not_before = self.now.after(self.backoff(all - 1));
        let limit = self.spec.max_attempts;
        if own >= limit || all >= limit.saturating_mul(LOST_FACTOR) {
            let version = self.state.version;
            let text =
                format!("{all} trainer groups in a row got no further than {version}; {reason}");
            self.finish(FinishReason::Failed(text));
        }
    }

    /// A step was committed: whatever failed before is forgotten.
    pub(super) fn group_succeeded(&mut self) {
        self.group_failures = GroupFailures::default();
    }
}

pub(super) fn absent(members: &[WorkerId], present: impl Fn(u32) -> bool) -> String {
    let names = (0u32..).zip(members).filter(|(rank, _)| !present(*rank));
    names.map(|(rank, id)| format!("{id} (rank {rank})")).collect::<Vec<_>>().join(", ")
}
