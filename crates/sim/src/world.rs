//! The clock, the queue, the network and the faults.

use crate::coordinator::Coordinator;
use crate::dice::Dice;
use crate::options::Options;
use crate::oracle::Oracle;
use crate::worker::{Alarm, Call, Process};
use duet_core::scheduler::{Command, Event, Verdict};
use duet_core::work::{Assignment, LeaseId};
use duet_core::{ArtifactRef, Digest, PolicyVersion, TrainerEpoch};
use std::collections::{BTreeMap, BTreeSet};

/// Something that will happen.
#[derive(Clone, Debug)]
pub enum Happening {
    /// A worker's message arrives. Request zero expects no answer that matters.
    Up { from: usize, session: u64, request: u64, call: Call },
    /// The coordinator's answer arrives.
    Down { to: usize, session: u64, request: u64, reply: Reply },
    /// A worker's own clock rings.
    Alarm { worker: usize, session: u64, alarm: Alarm },
    /// The coordinator's deadline.
    Tick { generation: u64 },
    /// A poll was held for long enough.
    PollExpires { worker: usize, session: u64, request: u64 },
    /// A manifest is in the store, or could not be put there.
    Manifest { generation: u64, version: PolicyVersion, digest: Digest, ok: bool },
    /// The coordinator starts.
    CoordinatorStarts,
    /// A worker process starts.
    WorkerStarts { worker: usize },
    /// Something goes wrong.
    Fault(Fault),
    /// The faults end.
    Heal,
}

/// What the coordinator answers.
#[derive(Clone, Debug)]
pub enum Reply {
    /// How an event was taken, and for a heartbeat the group that is over.
    Verdict(Verdict, Option<TrainerEpoch>),
    /// Work.
    Assignment(Assignment),
    /// Nothing to do: ask again.
    Nothing,
}

/// What goes wrong, again and again, at random intervals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A worker process dies.
    Death,
    /// A worker is cut off from the network.
    Cut,
    /// A process stands still.
    Stop,
    /// An operator commands something.
    Command,
    /// A liar speaks.
    Lie,
}

/// Everything.
pub struct World {
    /// What the seed decided.
    pub options: Options,
    /// What it still decides.
    pub dice: Dice,
    /// The time, in milliseconds.
    pub now: u64,
    /// Whether the faults are over.
    pub healed: bool,
    /// Whether an operator stopped the run once.
    pub stopped: bool,
    /// True lies that trainers have told.
    pub true_lies: u32,
    /// The coordinator.
    pub coordinator: Coordinator,
    /// The workers.
    pub processes: Vec<Process>,
    /// Trainer groups by epoch: rank, process and session.
    pub groups: BTreeMap<u64, BTreeMap<u32, (usize, u64)>>,
    /// Whether a group goes on from what one of its ranks holds, by epoch.
    pub agreed: BTreeMap<u64, bool>,
    /// How many did.
    pub handed_on: u64,
    /// Shards of checkpoints that lie in the store.
    pub durable: BTreeSet<ArtifactRef>,
    /// Shards that could not be written.
    pub failed_shards: u32,
    /// Shards that were begun, for the numbers of their requests.
    pub save_requests: u64,
    /// Leases that were ever given out: what liars talk about.
    pub issued: Vec<LeaseId>,
    /// Failures by kind, as the coordinator counts them.
    pub failures: BTreeMap<String, u64>,
    /// The independent reader of the journal.
    pub oracle: Oracle,
    /// A hash over everything that happened.
    pub hash: blake3::Hasher,
    /// The first thing that was wrong.
    pub broken: Option<String>,
    queue: BTreeMap<(u64, u64), Happening>,
    sequence: u64,
}

impl World {
    /// A world in which everything is about to start.
    pub fn new(options: Options) -> World {
        let mut world = World {
            dice: Dice::new(options.seed, 2),
            now: 0,
            healed: false,
            stopped: false,
            true_lies: 0,
            coordinator: Coordinator::new(options.prompts),
            processes: Process::all(&options),
            groups: BTreeMap::new(),
            agreed: BTreeMap::new(),
            handed_on: 0,
            durable: BTreeSet::new(),
            failed_shards: 0,
            save_requests: 0,
            issued: Vec::new(),
            failures: BTreeMap::new(),
            oracle: Oracle::new(&options),
            hash: blake3::Hasher::new(),
            broken: None,
            queue: BTreeMap::new(),
            sequence: 0,
            options,
        };
        world.at(0, Happening::CoordinatorStarts);
        for worker in 0..world.processes.len() {
            let start = world.dice.between(0, 500);
            world.at(start, Happening::WorkerStarts { worker });
        }
        world.at(world.options.faulty_for, Happening::Heal);
        let faults = world.options.faults.clone();
        let lies = if faults.liars { 300 } else { 0 };
        for (fault, mean) in [
            (Fault::Death, faults.worker_deaths),
            (Fault::Cut, faults.cuts),
            (Fault::Stop, faults.stops),
            (Fault::Command, faults.commands),
            (Fault::Lie, lies),
        ] {
            world.fault_later(fault, mean);
        }
        world
    }

    /// Puts something into the queue.
    pub fn at(&mut self, time: u64, happening: Happening) {
        self.sequence += 1;
        self.queue.insert((time.max(self.now), self.sequence), happening);
    }

    /// The first wrong thing ends the run.
    pub fn break_off(&mut self, text: String) {
        self.broken.get_or_insert(text);
    }

    /// Lets the next thing happen; false when nothing is left.
    pub fn step(&mut self) -> bool {
        let Some(((time, sequence), happening)) = self.queue.pop_first() else { return false };
        self.now = time;
        self.hash.update(&time.to_le_bytes());
        self.hash.update(&sequence.to_le_bytes());
        match happening {
            Happening::Up { from, session, request, call } => {
                self.arrive(from, session, request, call);
            }
            Happening::Down { to, session, request, reply } => {
                if let Some(later) = self.stands_still(to) {
                    self.at(later, Happening::Down { to, session, request, reply });
                } else if self.processes[to].is(session) {
                    self.answered(to, request, reply);
                }
            }
            Happening::Alarm { worker, session, alarm } => {
                if let Some(later) = self.stands_still(worker) {
                    self.at(later, Happening::Alarm { worker, session, alarm });
                } else if self.processes[worker].is(session) {
                    self.alarm(worker, alarm);
                }
            }
            Happening::Tick { generation } => self.tick(generation),
            Happening::PollExpires { worker, session, request } => {
                self.poll_expires(worker, session, request);
            }
            Happening::Manifest { generation, version, digest, ok } => {
                self.manifest(generation, version, digest, ok);
            }
            Happening::CoordinatorStarts => self.start_coordinator(),
            Happening::WorkerStarts { worker } => self.start_worker(worker),
            Happening::Fault(fault) => self.fault(fault),
            Happening::Heal => self.heal(),
        }
        true
    }

    fn stands_still(&self, worker: usize) -> Option<u64> {
        let until = self.processes[worker].stopped_until;
        (until > self.now).then_some(until)
    }

    /// A worker's message enters the network.
    pub fn up(&mut self, from: usize, request: u64, call: Call) {
        let session = self.processes[from].session;
        for delay in self.passages(from) {
            let call = call.clone();
            self.at(self.now + delay, Happening::Up { from, session, request, call });
        }
    }

    /// The coordinator's answer enters the network.
    pub fn down(&mut self, to: usize, session: u64, request: u64, reply: Reply) {
        for delay in self.passages(to) {
            let reply = reply.clone();
            self.at(self.now + delay, Happening::Down { to, session, request, reply });
        }
    }

    /// How often a message arrives, and how late each time.
    fn passages(&mut self, worker: usize) -> Vec<u64> {
        if self.healed {
            return vec![1];
        }
        let (loss, double) = (self.options.faults.loss, self.options.faults.double);
        let longest = self.options.faults.delay;
        if self.processes[worker].cut_until > self.now || self.dice.permille(loss) {
            return Vec::new();
        }
        let copies = if self.dice.permille(double) { 2 } else { 1 };
        (0..copies).map(|_| 1 + self.dice.between(0, longest)).collect()
    }

    /// A worker's message reaches the coordinator.
    fn arrive(&mut self, from: usize, session: u64, request: u64, call: Call) {
        let (worker, role) = (self.processes[from].id.clone(), self.processes[from].role);
        let event = match call {
            Call::Poll => return self.polled(from, session, request),
            Call::Register => Event::Registered { worker, role, session },
            Call::Heartbeat => {
                let abort = self.abort_for(&worker);
                if let Some(verdict) = self.tell(Event::Heartbeat { worker, session }) {
                    self.down(from, session, request, Reply::Verdict(verdict, abort));
                }
                return;
            }
            Call::Report(report) => Event::Reported { worker, session, report },
            Call::HangUp => {
                self.tell(Event::Disconnected { worker, session });
                return;
            }
            Call::Leave => Event::Left { worker, session, reason: "told to".to_owned() },
        };
        if let Some(verdict) = self.tell(event) {
            self.down(from, session, request, Reply::Verdict(verdict, None));
        }
    }

    fn fault_later(&mut self, fault: Fault, mean: u64) {
        if mean > 0 {
            let pause = self.dice.between(1, 2 * mean);
            self.at(self.now + pause, Happening::Fault(fault));
        }
    }

    fn fault(&mut self, fault: Fault) {
        if self.healed {
            return;
        }
        let faults = self.options.faults.clone();
        let index = self.dice.next() as usize % self.processes.len();
        match fault {
            Fault::Death => {
                self.kill(index);
                self.fault_later(fault, faults.worker_deaths);
            }
            Fault::Cut => {
                self.processes[index].cut_until = self.now + self.dice.between(100, 4_000);
                self.hang_up(index);
                self.fault_later(fault, faults.cuts);
            }
            Fault::Stop => {
                self.processes[index].stopped_until = self.now + self.dice.between(100, 5_000);
                self.fault_later(fault, faults.stops);
            }
            Fault::Command => {
                self.command(index);
                self.fault_later(fault, faults.commands);
            }
            Fault::Lie => {
                self.lie(index);
                self.fault_later(fault, 300);
            }
        }
    }

    fn command(&mut self, index: usize) {
        let command = match self.dice.between(0, 9) {
            0..=2 => Command::Pause,
            3..=5 => Command::Resume,
            6 if !self.stopped => {
                self.stopped = true;
                Command::Stop
            }
            _ => Command::Drain(self.processes[index].id.clone()),
        };
        self.tell(Event::Control(command));
    }

    /// The faults end: everybody is up, honest, connected and of the usual speed.
    fn heal(&mut self) {
        self.healed = true;
        for worker in 0..self.processes.len() {
            let process = &mut self.processes[worker];
            process.cut_until = 0;
            process.stopped_until = process.stopped_until.min(self.now);
            process.slow = 1;
            process.broken = false;
            process.liar = false;
            if !process.up {
                self.at(self.now, Happening::WorkerStarts { worker });
            }
        }
        self.start_coordinator();
        self.tell(Event::Control(Command::Resume));
    }
}
