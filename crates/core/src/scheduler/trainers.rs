//! Trainer groups: formed, restored, stepped, given up.
//!
//! ```text
//! None --world trainers wait--> Forming --all TrainerReady--> Ready(version) --batch ready--> Stepping
//!   ^                              |                             ^    |                          |
//!   +---- lost rank, failure, deadline (AbortTrainers) ----------+----+ <----- all StepDone -----+
//! ```
//! Every new group restores the newest checkpoint and repeats the committed steps since then from
//! their stored trees. The digest must come out as journaled; nothing is sampled twice.

use super::api::{Effect, FinishReason};
use super::batch;
use super::lineage::{IterationLineage, TraceLineage, TreeLineage};
use super::record::{Fate, Record};
use super::state::{Tree, Tries, iteration_range};
use super::{Scheduler, Verdict};
use crate::work::{Assignment, Gates, Rendezvous, Step, StepDone, Window};
use crate::{ArtifactRef, Digest, Millis, PolicyVersion, Rank, Role, TrainerEpoch, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// A trainer group.
#[derive(Clone, Debug)]
pub(super) enum Group {
    None,
    Forming {
        members: Vec<WorkerId>,
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

impl Group {
    pub(super) fn members(&self) -> &[WorkerId] {
        match self {
            Group::None => &[],
            Group::Forming { members, .. }
            | Group::Ready { members, .. }
            | Group::Stepping { members, .. } => members,
        }
    }

    pub(super) fn deadline(&self) -> Option<Millis> {
        match self {
            Group::Forming { deadline, .. } | Group::Stepping { deadline, .. } => Some(*deadline),
            Group::None | Group::Ready { .. } => None,
        }
    }

    fn rank_of(&self, worker: &WorkerId) -> Option<u32> {
        self.members().iter().position(|m| m == worker).map(|rank| rank as u32)
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
        if matches!(self.group, Group::None) {
            self.form_group();
        }
        if let Group::Ready { version, .. } = self.group {
            self.next_step(version);
        }
        self.tell_ranks();
    }

    fn form_group(&mut self) {
        let able = |id: &&WorkerId| {
            self.workers.get(id).is_some_and(|w| !w.draining && !w.quarantined && !w.leaving)
        };
        let world = self.spec.world as usize;
        let members: Vec<WorkerId> =
            self.workers.waiting(Role::Trainer).filter(able).take(world).cloned().collect();
        if members.len() < world {
            return;
        }
        self.commit(Record::EpochStarted { epoch: TrainerEpoch(self.state.epoch.0 + 1) });
        let deadline = self.now.after(self.spec.timing.rendezvous);
        let (told, ready) = (BTreeSet::new(), BTreeSet::new());
        self.group = Group::Forming { members, told, store: None, ready, deadline };
    }

    /// Tells each waiting rank its part, once.
    fn tell_ranks(&mut self) {
        let epoch = self.state.epoch;
        let restore = self.state.checkpoint.as_ref().map(|(_, manifest)| manifest.clone());
        let waits = |id: &WorkerId| self.workers.get(id).is_some_and(|w| w.waiting);
        let mut messages: Vec<(WorkerId, Assignment)> = Vec::new();
        match &mut self.group {
            Group::Forming { members, told, store, .. } => {
                for (rank, member) in (0u32..).zip(members.iter()) {
                    let may = rank == 0 || store.is_some();
                    if may && waits(member) && told.insert(rank) {
                        let rendezvous = Rendezvous {
                            epoch,
                            rank: Rank(rank),
                            world: members.len() as u32,
                            store: if rank == 0 { None } else { store.clone() },
                            restore: restore.clone(),
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

    /// What a group at `version` does next: repeat a committed step, take a new one, write the last
    /// checkpoint, or nothing yet.
    fn next_step(&mut self, version: PolicyVersion) {
        let iteration = version.0 as u32;
        if version < self.state.version {
            return self.start_step(iteration, true, false, false);
        }
        let saved = self.state.checkpoint.as_ref().map_or(PolicyVersion(0), |(v, _)| *v);
        let over = version.0 >= u64::from(self.spec.iterations);
        if over || self.stopping {
            if saved == version || (version.0 == 0 && self.stopping) {
                self.finish(if over { FinishReason::Completed } else { FinishReason::Stopped });
            } else if self.writing.is_none() {
                self.start_step(iteration, false, false, true);
            }
            return;
        }
        let settled = self.state.admitted > iteration
            && self.unsettled.get(&iteration).copied().unwrap_or(0) == 0;
        if settled && !self.is_paused() {
            let next = iteration + 1;
            let checkpoint =
                next.is_multiple_of(self.spec.checkpoint_every) || next == self.spec.iterations;
            self.start_step(iteration, true, true, checkpoint);
        }
    }

    fn start_step(&mut self, iteration: u32, update: bool, publish: bool, checkpoint: bool) {
        let trees = if update {
            batch::batch(&self.state, &self.spec, &self.prompts, iteration)
        } else {
            Vec::new()
        };
        let gates =
            if update { self.spec.schedule.gates(iteration) } else { Gates { llm: 0.0, dit: 0.0 } };
        let step = Step {
            epoch: self.state.epoch,
            iteration,
            gates,
            window: if update { self.window(iteration) } else { Window::default() },
            trees,
            update,
            publish,
            checkpoint,
        };
        self.group = Group::Stepping {
            members: self.group.members().to_vec(),
            step: Box::new(step),
            told: BTreeSet::new(),
            done: BTreeMap::new(),
            deadline: self.now.after(self.spec.timing.step),
        };
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
            Group::Forming { store, .. } => {
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
        let expected = self.state.checkpoint.as_ref().map_or(PolicyVersion(0), |(v, _)| *v);
        if version != expected {
            self.abort_group("restore", &format!("{worker} restored {version}, not {expected}"));
            return Verdict::Refused(format!("restored {version} instead of {expected}"));
        }
        let committed = self.state.weights(version).filter(|w| w.version.0 > 0);
        if let Some(weights) = committed.filter(|weights| weights.digest != digest) {
            let text = format!(
                "{worker} restored {version} with digest {digest}, but it was committed with {}",
                weights.digest
            );
            self.fail("divergence", text.clone());
            self.finish(FinishReason::Failed(text.clone()));
            return Verdict::Refused(text);
        }
        let Group::Forming { members, ready, .. } = &mut self.group else {
            return Verdict::Duplicate;
        };
        ready.insert(rank.0);
        if ready.len() == members.len() {
            self.group = Group::Ready { members: members.clone(), version };
        }
        Verdict::Accepted
    }

    pub(super) fn step_done(&mut self, worker: &WorkerId, report: StepDone) -> Verdict {
        if report.epoch != self.state.epoch || self.group.rank_of(worker) != Some(report.rank.0) {
            return Verdict::Stale;
        }
        let Group::Stepping { members, step, done, .. } = &mut self.group else {
            return Verdict::Duplicate;
        };
        if report.iteration != step.iteration {
            return Verdict::Stale;
        }
        if done.insert(report.rank.0, report).is_some() {
            return Verdict::Duplicate;
        }
        if done.len() == members.len() {
            let (members, step, done) = (members.clone(), step.clone(), std::mem::take(done));
            self.all_stepped(members, *step, done);
        }
        Verdict::Accepted
    }

    fn all_stepped(&mut self, members: Vec<WorkerId>, step: Step, done: BTreeMap<u32, StepDone>) {
        let Some(first) = done.get(&0).cloned() else { return };
        if let Some(other) = done.values().find(|d| d.weights.digest != first.weights.digest) {
            let text = format!(
                "iteration {}: rank 0 has weights {}, {} has {}",
                step.iteration, first.weights.digest, other.rank, other.weights.digest
            );
            self.fail("divergence", text.clone());
            self.finish(FinishReason::Failed(text));
            return;
        }
        let mut version = PolicyVersion(u64::from(step.iteration));
        if step.update {
            version.0 += 1;
            if version > self.state.version {
                self.commit_step(&step, &first);
            } else if let Some(text) = self.replay_differs(version, &first) {
                self.fail("divergence", text.clone());
                self.finish(FinishReason::Failed(text));
                return;
            }
        }
        self.group = Group::Ready { members, version };
        if step.checkpoint && self.writing.is_none() {
            let shards: Vec<Vec<ArtifactRef>> = done.into_values().map(|d| d.shards).collect();
            self.writing = Some(version);
            self.output.effects.push(Effect::WriteCheckpoint {
                version,
                shards,
                weights: self.state.weights(version).unwrap_or(first.weights),
                snapshot: Box::new(self.state.clone()),
            });
        }
    }

    fn commit_step(&mut self, step: &Step, first: &StepDone) {
        let mut weights = first.weights.clone();
        weights.version = PolicyVersion(u64::from(step.iteration) + 1);
        let metrics = first.metrics.clone();
        self.commit(Record::StepCommitted { iteration: step.iteration, weights, metrics });
        self.unsettled.remove(&step.iteration);
        self.emit_lineage(step.iteration);
    }

    fn replay_differs(&self, version: PolicyVersion, first: &StepDone) -> Option<String> {
        let committed = self.state.weights(version)?;
        (committed.digest != first.weights.digest).then(|| {
            format!(
                "repeating the step to {version} gave weights {}, but {} was committed",
                first.weights.digest, committed.digest
            )
        })
    }

    pub(super) fn checkpointed(&mut self, version: PolicyVersion, manifest: ArtifactRef) {
        let newer = self.state.checkpoint.as_ref().is_none_or(|(old, _)| version > *old);
        if !newer {
            return;
        }
        let before = self.artifacts();
        self.commit(Record::Checkpointed { version, manifest });
        let after = self.artifacts();
        let unneeded: Vec<ArtifactRef> = before.difference(&after).cloned().collect();
        if !unneeded.is_empty() {
            self.output.effects.push(Effect::Collect(unneeded));
        }
    }

    /// Every artifact that the durable state still names.
    fn artifacts(&self) -> BTreeSet<ArtifactRef> {
        let trees = self.state.trees.values().flat_map(|tree| &tree.subtrees);
        let weights = self.state.steps.values().flat_map(|s| [&s.weights.llm, &s.weights.dit]);
        trees
            .flat_map(|s| [Some(s.trace.artifact.clone()), s.render.clone()])
            .chain(weights.cloned())
            .flatten()
            .collect()
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
        self.blame(worker);
        self.abort_group(kind, &format!("{worker} ({rank}): {reason}"));
        Verdict::Accepted
    }

    pub(super) fn trainer_lost(&mut self, worker: &WorkerId, kind: &str, reason: &str) {
        if self.finished.is_some() {
            self.group = Group::None;
        } else if self.group.rank_of(worker).is_some() {
            self.abort_group(kind, &format!("{worker}: {reason}"));
        }
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

    fn abort_group(&mut self, kind: &str, reason: &str) {
        let workers = self.group.members().to_vec();
        let epoch = self.state.epoch;
        self.group = Group::None;
        let reason = format!("trainer group of {epoch}: {kind}: {reason}");
        self.fail(kind, reason.clone());
        self.output.effects.push(Effect::AbortTrainers { epoch, workers, reason });
    }

    pub(super) fn emit_lineage(&mut self, iteration: u32) {
        let Some(step) = self.state.steps.get(&iteration).cloned() else { return };
        let judged = batch::judge(&self.state, &self.spec, iteration);
        let trees = self.state.trees.range(iteration_range(iteration)).map(|(id, tree)| {
            let fate = tree.fate.clone().unwrap_or(Fate::ZeroSpread);
            let (fate, reason) = match fate {
                Fate::Trained => ("trained", String::new()),
                Fate::ZeroSpread => ("zero-spread", String::new()),
                Fate::Failed(reason) => ("failed", reason),
            };
            TreeLineage {
                id: *id,
                row: tree.row as u64,
                prompt: self.prompts.get(tree.row).map(|p| p.text.clone()).unwrap_or_default(),
                fate: fate.to_owned(),
                reason,
                seed: self.tree_seed(*id),
                traces: trace_rows(tree, judged.get(id)),
            }
        });
        let lineage = IterationLineage {
            iteration,
            sampled_with: self.sampling_version(iteration),
            gates: self.spec.schedule.gates(iteration),
            window: self.window(iteration),
            weights: step.weights,
            metrics: step.metrics,
            trees: trees.collect(),
        };
        self.output.effects.push(Effect::WriteLineage(Box::new(lineage)));
    }
}

fn absent(members: &[WorkerId], present: impl Fn(u32) -> bool) -> String {
    let names = (0u32..).zip(members).filter(|(rank, _)| !present(*rank));
    names.map(|(rank, id)| format!("{id} (rank {rank})")).collect::<Vec<_>>().join(", ")
}

fn trace_rows(tree: &Tree, judged: Option<&batch::Judged>) -> Vec<TraceLineage> {
    let who = |tries: &Tries| tries.worker.clone().unwrap_or_else(|| WorkerId(String::new()));
    let rows = tree.subtrees.iter().enumerate().map(|(j, s)| TraceLineage {
        trace: j as u32,
        think_worker: who(&tree.think_tries),
        think_attempt: tree.think_tries.given,
        render_worker: who(&s.render_tries),
        render_attempt: s.render_tries.given,
        score_worker: who(&s.score_tries),
        score_attempt: s.score_tries.given,
        text: s.trace.text.clone(),
        refined_prompt: s.trace.refined_prompt.clone(),
        well_formed: s.trace.well_formed,
        tokens: s.trace.tokens,
        finish: s.trace.finish,
        trace_artifact: s.trace.artifact.key.clone(),
        render_artifact: s.render.as_ref().map(|r| r.key.clone()).unwrap_or_default(),
        reward: judged.and_then(|t| t.llm_rewards[j]),
        advantage: judged.and_then(|t| t.llm[j]),
        scores: s.scores.clone().unwrap_or_default(),
        leaf_rewards: judged.map(|t| t.dit_rewards[j].clone()).unwrap_or_default(),
        leaf_advantages: judged.map(|t| t.dit[j].clone()).unwrap_or_default(),
    });
    rows.collect()
}
