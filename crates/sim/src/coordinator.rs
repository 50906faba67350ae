//! The coordinator: the scheduler, its journal, its long polls and the store of manifests. It can
//! die at any record of an output, and comes back from what was durable by then.

use crate::model;
use crate::world::{Happening, Reply, World};
use duet_core::scheduler::{
    Effect, Event, FinishReason, Output, Record, Scheduler, State, Verdict,
};
use duet_core::work::{Assignment, PromptRow};
use duet_core::{
    ArtifactRef, Digest, Generation, Millis, PolicyVersion, Rank, TrainerEpoch, WorkerId,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How long a poll is held open.
const POLL: u64 = 1_000;

/// A poll that waits for its answer.
#[derive(Clone, Copy, Debug)]
struct Poll {
    worker: usize,
    session: u64,
    request: u64,
}

/// The coordinator and what survives it.
pub struct Coordinator {
    scheduler: Option<Scheduler>,
    prompts: Arc<[PromptRow]>,
    generation: u64,
    journal: Vec<Record>,
    /// Snapshots as they would lie in the store, with their position in the journal.
    snapshots: Vec<(usize, Vec<u8>)>,
    polls: BTreeMap<WorkerId, Poll>,
    aborts: BTreeMap<WorkerId, TrainerEpoch>,
    tick: Option<u64>,
    /// Complete checkpoints by key: the version and the weights' digest.
    pub manifests: BTreeMap<String, (PolicyVersion, Digest)>,
    /// How the run ended.
    pub finished: Option<FinishReason>,
}

impl Coordinator {
    /// One that has not begun.
    pub fn new(prompts: usize) -> Coordinator {
        let row = |row| PromptRow { row, text: format!("prompt {row}"), meta: String::new() };
        Coordinator {
            scheduler: None,
            prompts: (0..prompts as u64).map(row).collect(),
            generation: 0,
            journal: Vec::new(),
            snapshots: Vec::new(),
            polls: BTreeMap::new(),
            aborts: BTreeMap::new(),
            tick: None,
            manifests: BTreeMap::new(),
            finished: None,
        }
    }

    /// Whether it is up.
    pub fn is_up(&self) -> bool {
        self.scheduler.is_some()
    }

    /// The scheduler's view, for reports.
    pub fn describe(&self, now: u64) -> String {
        match &self.scheduler {
            Some(scheduler) => format!("{:#?}", scheduler.status(Millis(now))),
            None => "down".to_owned(),
        }
    }
}

impl World {
    /// The coordinator starts, from the journal alone or from a snapshot and what came after it.
    pub fn start_coordinator(&mut self) {
        if self.coordinator.is_up() {
            return;
        }
        let c = &mut self.coordinator;
        c.generation += 1;
        c.finished = None;
        c.polls.clear();
        c.aborts.clear();
        c.tick = None;
        let at = self.dice.between(0, c.snapshots.len() as u64) as usize;
        match self.restored(at) {
            Ok(scheduler) => {
                self.coordinator.scheduler = Some(scheduler);
                self.drain();
                self.reconcile();
                self.tick_later();
            }
            Err(text) => self.break_off(text),
        }
    }

    /// The scheduler as the journal has it, from snapshot number `at`, or from the beginning.
    fn restored(&self, at: usize) -> Result<Scheduler, String> {
        let c = &self.coordinator;
        let (position, snapshot) = match c.snapshots.get(at) {
            Some((position, bytes)) => (*position, Some(decode::<State>(bytes)?)),
            None => (0, None),
        };
        let records = c.journal[position..].iter().cloned();
        let prompts = c.prompts.clone();
        let spec = self.options.spec.clone();
        Scheduler::restore(spec, prompts, Generation(c.generation), snapshot, records)
            .map_err(|error| format!("DU-11: the journal cannot be restored: {error}"))
    }

    /// DU-11: what the journal says is what is.
    pub fn compare_with_journal(&mut self) {
        let at = self.dice.between(0, self.coordinator.snapshots.len() as u64) as usize;
        let Some(live) = self.coordinator.scheduler.as_ref().map(|s| s.state().clone()) else {
            return;
        };
        match self.restored(at) {
            Ok(scheduler) if *scheduler.state() == live => {}
            Ok(scheduler) => {
                let restored = scheduler.state();
                let text = format!("DU-11: the journal restores {restored:?}, not {live:?}");
                self.break_off(text);
            }
            Err(text) => self.break_off(text),
        }
    }

    /// A manifest that was written by the coordinator's last life may be found by the next.
    fn reconcile(&mut self) {
        let newest = { self.coordinator.manifests.iter() }
            .max_by_key(|(_, (version, _))| *version)
            .map(|(key, (version, _))| (key.clone(), *version));
        if let Some((key, version)) = newest.filter(|_| self.dice.permille(500)) {
            let manifest = manifest(key);
            self.tell(Event::CheckpointWritten { version, manifest });
        }
    }

    /// Something happens to the coordinator; `None` when it is down, or dies of it.
    pub fn tell(&mut self, event: Event) -> Option<Verdict> {
        let scheduler = self.coordinator.scheduler.as_mut()?;
        let verdict = scheduler.handle(Millis(self.now), event);
        self.drain();
        self.look();
        self.tick_later();
        self.coordinator.is_up().then_some(verdict)
    }

    /// The coordinator's deadline has come.
    pub fn tick(&mut self, generation: u64) {
        if generation != self.coordinator.generation {
            return;
        }
        self.coordinator.tick = None;
        if let Some(scheduler) = &mut self.coordinator.scheduler {
            scheduler.handle_timeout(Millis(self.now));
            self.drain();
            self.tick_later();
        }
    }

    fn tick_later(&mut self) {
        let c = &mut self.coordinator;
        let Some(due) = c.scheduler.as_ref().and_then(Scheduler::poll_timeout) else { return };
        let due = due.0.max(self.now + 1);
        if c.tick.is_none_or(|tick| due < tick) {
            c.tick = Some(due);
            let generation = c.generation;
            self.at(due, Happening::Tick { generation });
        }
    }

    /// Checks what can be checked at any moment.
    fn look(&mut self) {
        if self.dice.permille(50) {
            let check = self.coordinator.scheduler.as_ref().map_or(Ok(()), Scheduler::check);
            if let Err(violation) = check {
                self.break_off(violation.to_string());
            }
        }
        if self.dice.permille(4) {
            self.compare_with_journal();
        }
        if self.dice.permille(10) {
            self.take_snapshot();
        }
    }

    fn take_snapshot(&mut self) {
        let c = &mut self.coordinator;
        let Some(scheduler) = &c.scheduler else { return };
        match serde_json::to_vec(scheduler.state()) {
            Ok(bytes) => c.snapshots.push((c.journal.len(), bytes)),
            Err(error) => self.break_off(format!("a snapshot cannot be written: {error}")),
        }
    }

    /// Makes outputs durable and carries them out, unless the coordinator dies in between.
    fn drain(&mut self) {
        while let Some(output) =
            self.coordinator.scheduler.as_mut().and_then(Scheduler::poll_output)
        {
            let deadly = self.options.faults.coordinator_deaths;
            if !self.healed && !output.records.is_empty() && self.dice.permille(deadly) {
                let kept = self.dice.between(0, output.records.len() as u64) as usize;
                self.persist(&output.records[..kept]);
                self.kill_coordinator();
                return;
            }
            let Output { records, effects } = output;
            self.persist(&records);
            effects.into_iter().for_each(|effect| self.carry_out(effect));
        }
    }

    fn persist(&mut self, records: &[Record]) {
        for record in records {
            let bytes = serde_json::to_vec(record).unwrap_or_default();
            self.hash.update(&bytes);
            match decode::<Record>(&bytes) {
                Ok(back) if back == *record => {}
                Ok(back) => self.break_off(format!("{record:?} came back as {back:?}")),
                Err(text) => self.break_off(text),
            }
            if let Err(text) = self.oracle.record(self.now, record) {
                self.break_off(text);
            }
            self.coordinator.journal.push(record.clone());
        }
    }

    /// The coordinator dies: everything but the journal and the store is gone.
    pub fn kill_coordinator(&mut self) {
        if self.coordinator.scheduler.take().is_some() {
            self.hash.update(b"coordinator dies");
            let pause = self.dice.between(10, 3_000);
            self.at(self.now + pause, Happening::CoordinatorStarts);
        }
    }

    /// The coordinator leaves in order, if it does not die at that.
    pub fn close_coordinator(&mut self) {
        if let Some(scheduler) = &mut self.coordinator.scheduler {
            scheduler.close(Millis(self.now));
            self.drain();
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Assign { worker, session, assignment } => {
                self.assign(&worker, session, assignment);
            }
            Effect::AbortTrainers { epoch, workers, .. } => {
                for worker in workers {
                    self.coordinator.aborts.insert(worker, epoch);
                }
            }
            Effect::WriteCheckpoint { version, shards, weights, snapshot } => {
                self.check_shards(version, &shards);
                if snapshot.version != version {
                    self.break_off(format!("a checkpoint of {version} at {}", snapshot.version));
                }
                let last = version.0 == u64::from(self.options.spec.iterations);
                let fails = !self.healed && !last && !self.stopped;
                let ok = !(fails && self.dice.permille(self.options.faults.manifests));
                let generation = self.coordinator.generation;
                let delay = self.dice.between(5, 300);
                let digest = weights.digest;
                self.at(self.now + delay, Happening::Manifest { generation, version, digest, ok });
            }
            Effect::Failed(failure) => {
                *self.failures.entry(failure.kind).or_default() += 1;
            }
            Effect::Finished(reason) => self.coordinator.finished = Some(reason),
            Effect::WriteLineage(_) | Effect::Collect(_) => {}
        }
    }

    /// A manifest names one shard of each rank, all of this version and one group, all in the store.
    fn check_shards(&mut self, version: PolicyVersion, shards: &[Vec<ArtifactRef>]) {
        let group = self.groups.iter().find(|(epoch, ranks)| {
            let own = |rank: &u32| vec![model::shard(version, TrainerEpoch(**epoch), Rank(*rank))];
            shards.iter().eq(ranks.keys().map(own).collect::<Vec<_>>().iter())
        });
        let lost = shards.iter().flatten().find(|shard| !self.durable.contains(shard));
        if group.is_none() || lost.is_some() {
            self.break_off(format!("DU-9: the manifest of {version} names {shards:?}; {lost:?}"));
        }
    }

    /// A manifest was created, or not. One that was asked for before a death may appear after it.
    pub fn manifest(&mut self, generation: u64, version: PolicyVersion, digest: Digest, ok: bool) {
        let alive = self.coordinator.is_up() && self.coordinator.generation == generation;
        if !ok {
            let reason = "the store is full".to_owned();
            if alive {
                self.tell(Event::CheckpointFailed { version, reason });
            }
            return;
        }
        if !alive && self.dice.permille(500) {
            return;
        }
        let key = format!("checkpoints/{}/manifest.json", version.0);
        let known = self.coordinator.manifests.insert(key.clone(), (version, digest));
        if known.is_some_and(|(_, other)| other != digest) {
            self.break_off(format!("DU-9: the manifest of {version} was written twice"));
        }
        if alive {
            self.tell(Event::CheckpointWritten { version, manifest: manifest(key) });
        }
    }

    fn assign(&mut self, worker: &WorkerId, session: u64, assignment: Assignment) {
        if let Err(text) = self.oracle.assigned(worker, &assignment) {
            self.break_off(text);
        }
        let waits = self.coordinator.polls.get(worker).filter(|poll| poll.session == session);
        if let Some(poll) = waits.copied() {
            self.coordinator.polls.remove(worker);
            self.down(poll.worker, session, poll.request, Reply::Assignment(assignment));
        }
    }

    /// A worker asks for work.
    pub fn polled(&mut self, index: usize, session: u64, request: u64) {
        let worker = self.processes[index].id.clone();
        let event = Event::Polled { worker: worker.clone(), session };
        // The answer may come while the event is handled, so the poll is entered first.
        let poll = Poll { worker: index, session, request };
        let before = self.coordinator.polls.insert(worker.clone(), poll);
        let verdict = self.tell(event);
        if let Some(old) = before.filter(|old| old.request != request) {
            self.down(old.worker, old.session, old.request, Reply::Nothing);
        }
        match verdict {
            Some(Verdict::Accepted) => {
                let due = self.now + POLL;
                self.at(due, Happening::PollExpires { worker: index, session, request });
            }
            Some(verdict) => {
                self.coordinator.polls.remove(&worker);
                self.down(index, session, request, Reply::Verdict(verdict, None));
            }
            None => {}
        }
    }

    /// Nobody had work for a poll in time.
    pub fn poll_expires(&mut self, index: usize, session: u64, request: u64) {
        let worker = self.processes[index].id.clone();
        let waits = self.coordinator.polls.get(&worker);
        if waits.is_some_and(|poll| poll.session == session && poll.request == request) {
            self.coordinator.polls.remove(&worker);
            self.tell(Event::PollExpired { worker, session });
            self.down(index, session, request, Reply::Nothing);
        }
    }

    /// What a heartbeat's answer carries for a trainer.
    pub fn abort_for(&self, worker: &WorkerId) -> Option<TrainerEpoch> {
        self.coordinator.aborts.get(worker).copied()
    }
}

fn manifest(key: String) -> ArtifactRef {
    ArtifactRef { digest: Digest::of(key.as_bytes()), bytes: 1, key }
}

fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("DU-11: not readable: {error}"))
}
