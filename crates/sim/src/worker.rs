//! A worker process of any role: registers, polls, works, reports until it is heard, sends
//! heartbeats; and, when it is a liar, says what is not so.

use crate::dice::Dice;
use crate::model;
use crate::options::Options;
use crate::world::{Happening, Reply, World};
use duet_core::scheduler::Verdict;
use duet_core::work::{
    Assignment, Done, Held, Lease, LeaseId, Outcome, Report, Score, ShardDone, Step, StepDone,
    Weights, Work,
};
use duet_core::{Attempt, Digest, Millis, PolicyVersion, Rank, Role, TrainerEpoch, WorkerId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

mod trainer;

const HEARTBEAT: u64 = 400;
const PATIENCE: u64 = 400;
const POLL_PATIENCE: u64 = 1_600;
/// Requests from here on tell of shards that were written beside whatever else the process did.
const SAVES: u64 = 1 << 40;

/// What a worker says.
#[derive(Clone, Debug)]
pub enum Call {
    /// Here I am.
    Register,
    /// Give me work.
    Poll,
    /// I am alive.
    Heartbeat,
    /// This is what came out.
    Report(Report),
    /// Its connection closed.
    HangUp,
    /// I am going.
    Leave,
}

/// What a worker's own clock rings for.
#[derive(Clone, Copy, Debug)]
pub enum Alarm {
    /// Time for a heartbeat.
    Heartbeat,
    /// No answer to this request.
    NoAnswer(u64),
    /// This task's next report is due.
    Due(u64),
    /// The shard of this request is written, or was not heard of yet.
    Saved(u64),
}

/// A rank's place and state.
#[derive(Clone, Copy, Debug)]
struct Seat {
    epoch: TrainerEpoch,
    rank: Rank,
    version: PolicyVersion,
    digest: Digest,
}

/// A process. What is not named in [`Process::restart`] survives its death.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its name.
    pub id: WorkerId,
    /// What it can do.
    pub role: Role,
    /// Which life this is.
    pub session: u64,
    /// Whether it runs.
    pub up: bool,
    /// Cut off from the network until then.
    pub cut_until: u64,
    /// Standing still until then.
    pub stopped_until: u64,
    /// How many times slower than usual.
    pub slow: u64,
    /// Fails everything.
    pub broken: bool,
    /// Lies.
    pub liar: bool,
    /// Its clock's rate, in a thousandth.
    drift: u64,
    request: u64,
    call: Option<Call>,
    resume: Option<Call>,
    reports: VecDeque<(u64, Report)>,
    /// The step it takes, and how long that lasts; its report is known when it is over.
    step: Option<(u64, Step)>,
    task: u64,
    versions: BTreeSet<PolicyVersion>,
    seat: Option<Seat>,
    /// What its models and optimisers are at, in a group or not.
    state: Option<Held>,
    /// Shards that are being written or told of, by request: at most one.
    saves: BTreeMap<u64, Report>,
}

impl Process {
    /// All processes of a run.
    pub fn all(options: &Options) -> Vec<Process> {
        let mut dice = Dice::new(options.seed, 3);
        let faults = &options.faults;
        let mut all = Vec::new();
        let roles = [Role::Rollout, Role::Reward, Role::Trainer];
        for (role, count) in roles.into_iter().zip(options.workers) {
            let liar = dice.next() as usize % count;
            for index in 0..count {
                let drift = 1_000 - faults.drift / 2 + dice.between(0, faults.drift);
                all.push(Process {
                    id: WorkerId(format!("{role}-{index}")),
                    role,
                    session: all.len() as u64 * 1_000_000,
                    up: false,
                    cut_until: 0,
                    stopped_until: 0,
                    slow: if faults.slow && index == 0 { 10 } else { 1 },
                    broken: false,
                    liar: faults.liars && index == liar,
                    drift,
                    request: 0,
                    call: None,
                    resume: None,
                    reports: VecDeque::new(),
                    step: None,
                    task: 0,
                    versions: BTreeSet::new(),
                    seat: None,
                    state: None,
                    saves: BTreeMap::new(),
                });
            }
        }
        if faults.broken {
            let at = dice.next() as usize % (options.workers[0] + options.workers[1]);
            all[at].broken = true;
        }
        all
    }

    /// Whether this life of it runs.
    pub fn is(&self, session: u64) -> bool {
        self.up && self.session == session
    }

    fn restart(&mut self) {
        self.session += 1;
        self.up = true;
        self.request = 0;
        self.call = None;
        self.resume = None;
        self.reports.clear();
        self.step = None;
        self.versions = BTreeSet::from([PolicyVersion(0)]);
        self.seat = None;
        self.state = None;
        self.saves.clear();
    }
}

impl World {
    /// A process starts.
    pub fn start_worker(&mut self, worker: usize) {
        if self.processes[worker].up {
            return;
        }
        self.processes[worker].restart();
        self.ring(worker, HEARTBEAT, Alarm::Heartbeat);
        self.call(worker, Call::Register);
    }

    /// A process dies, and starts again after a while.
    pub fn kill(&mut self, worker: usize) {
        if self.processes[worker].up {
            self.processes[worker].up = false;
            self.hang_up(worker);
            let pause = self.dice.between(50, 3_000);
            self.at(self.now + pause, Happening::WorkerStarts { worker });
        }
    }

    /// The coordinator may see that a connection has closed, sooner or later, or not at all.
    pub fn hang_up(&mut self, worker: usize) {
        if self.dice.permille(600) {
            let session = self.processes[worker].session;
            let seen = self.now + self.dice.between(1, 400);
            let call = Call::HangUp;
            self.at(seen, Happening::Up { from: worker, session, request: 0, call });
        }
    }

    fn ring(&mut self, worker: usize, after: u64, alarm: Alarm) {
        let process = &self.processes[worker];
        let (session, due) = (process.session, self.now + (after * process.drift / 1_000).max(1));
        self.at(due, Happening::Alarm { worker, session, alarm });
    }

    fn call(&mut self, worker: usize, call: Call) {
        let process = &mut self.processes[worker];
        process.request += 1;
        process.call = Some(call.clone());
        let request = process.request;
        let patience = if matches!(call, Call::Poll) { POLL_PATIENCE } else { PATIENCE };
        self.up(worker, request, call);
        self.ring(worker, patience + self.options.faults.delay, Alarm::NoAnswer(request));
    }

    /// A worker's clock rings.
    pub fn alarm(&mut self, worker: usize, alarm: Alarm) {
        match alarm {
            Alarm::Heartbeat => {
                self.up(worker, 0, Call::Heartbeat);
                self.ring(worker, HEARTBEAT, Alarm::Heartbeat);
            }
            Alarm::NoAnswer(request) => {
                let process = &mut self.processes[worker];
                if let Some(call) = process.call.clone().filter(|_| process.request == request) {
                    self.call(worker, call);
                }
            }
            Alarm::Due(task) => {
                if self.processes[worker].task == task {
                    self.due(worker, task);
                }
            }
            Alarm::Saved(request) => {
                if let Some(report) = self.processes[worker].saves.get(&request).cloned() {
                    if let Report::ShardDone(done) = &report {
                        self.durable.extend(done.shards.iter().cloned());
                    }
                    self.up(worker, request, Call::Report(report));
                    let patience = PATIENCE + self.options.faults.delay;
                    self.ring(worker, patience, Alarm::Saved(request));
                }
            }
        }
    }

    /// An answer reaches a worker.
    pub fn answered(&mut self, worker: usize, request: u64, reply: Reply) {
        if request == 0 {
            return self.heartbeat_answered(worker, reply);
        }
        let process = &mut self.processes[worker];
        if request >= SAVES {
            match reply {
                Reply::Verdict(Verdict::Unknown, _) => self.up(worker, 0, Call::Register),
                _ => drop(process.saves.remove(&request)),
            }
            return;
        }
        if process.request != request {
            return;
        }
        let Some(call) = process.call.take() else { return };
        match (call, reply) {
            (Call::Register, Reply::Verdict(Verdict::Refused(why), _)) => {
                self.break_off(format!("{} was refused: {why}", self.processes[worker].id));
            }
            (Call::Register, _) => match self.processes[worker].resume.take() {
                Some(call) => self.call(worker, call),
                None => self.go_on(worker),
            },
            (call, Reply::Verdict(Verdict::Unknown, _)) => {
                self.processes[worker].resume = Some(call);
                self.call(worker, Call::Register);
            }
            (Call::Poll, Reply::Assignment(assignment)) => self.take(worker, assignment),
            (Call::Poll, _) => self.call(worker, Call::Poll),
            (Call::Leave, _) => self.gone(worker),
            (Call::Report(_) | Call::Heartbeat | Call::HangUp, _) => self.go_on(worker),
        }
    }

    fn heartbeat_answered(&mut self, worker: usize, reply: Reply) {
        let Reply::Verdict(verdict, abort) = reply else { return };
        if verdict == Verdict::Unknown {
            self.up(worker, 0, Call::Register);
        }
        let process = &mut self.processes[worker];
        let over = process.seat.zip(abort).is_some_and(|(seat, abort)| seat.epoch <= abort);
        if over {
            process.seat = None;
            process.step = None;
            process.reports.clear();
            process.task += 1;
            if process.call.is_none() {
                self.call(worker, Call::Poll);
            }
        }
    }

    /// The next report of the task, or the next task.
    fn go_on(&mut self, worker: usize) {
        let process = &mut self.processes[worker];
        process.task += 1;
        let task = process.task;
        let step = process.step.as_ref().map(|(span, _)| *span);
        match step.or_else(|| process.reports.front().map(|(span, _)| *span)) {
            Some(span) => {
                let after = span * process.slow;
                self.ring(worker, after, Alarm::Due(task));
            }
            None => self.call(worker, Call::Poll),
        }
    }

    fn due(&mut self, worker: usize, task: u64) {
        let writes = !self.processes[worker].saves.is_empty();
        if writes && self.processes[worker].step.as_ref().is_some_and(|(_, s)| s.checkpoint) {
            // One at a time: the next copy waits for the one before.
            return self.ring(worker, 20, Alarm::Due(task));
        }
        if let Some((_, step)) = self.processes[worker].step.take() {
            let report = self.stepped(worker, &step);
            return self.call(worker, Call::Report(report));
        }
        if let Some((_, report)) = self.processes[worker].reports.pop_front() {
            if let Report::PublishAck { version } = report {
                let versions = &mut self.processes[worker].versions;
                versions.insert(version);
                while versions.len() > 3 {
                    let second = versions.iter().nth(1).copied().unwrap_or_default();
                    versions.remove(&second);
                }
            }
            self.call(worker, Call::Report(report));
        }
    }

    fn gone(&mut self, worker: usize) {
        self.processes[worker].up = false;
        let pause = self.dice.between(100, 3_000);
        self.at(self.now + pause, Happening::WorkerStarts { worker });
    }

    fn take(&mut self, worker: usize, assignment: Assignment) {
        match assignment {
            Assignment::Lease(lease) => self.lease(worker, &lease),
            Assignment::Publish(weights) => {
                let version = weights.version;
                let fails = !self.healed && self.dice.permille(20);
                let report = if fails {
                    let reason = "the file is not there yet".to_owned();
                    Report::PublishFailed { version, reason }
                } else {
                    Report::PublishAck { version }
                };
                let span = self.dice.between(5, 50);
                self.processes[worker].reports.push_back((span, report));
            }
            Assignment::Rendezvous(rendezvous) => self.sit_down(worker, &rendezvous),
            Assignment::Step(step) => {
                let span = self.dice.between(20, 200);
                self.processes[worker].step = Some((span, step));
            }
            Assignment::Leave { .. } => return self.call(worker, Call::Leave),
        }
        self.go_on(worker);
    }

    fn lease(&mut self, worker: usize, lease: &Lease) {
        self.issued.push(lease.id);
        let weights = match &lease.work {
            Work::Think(work) => Some(&work.weights),
            Work::Render(work) => Some(&work.weights),
            Work::Score(_) => None,
        };
        let process = &self.processes[worker];
        if let Some(weights) = weights.filter(|w| !process.versions.contains(&w.version)) {
            let text = format!("DU-12: {} holds no {}", process.id, weights.version);
            return self.break_off(text);
        }
        let mut outcome = model::outcome(&self.options, lease);
        if self.processes[worker].broken {
            let reason = "out of memory".to_owned();
            outcome = Outcome::Failed { kind: "device".to_owned(), reason };
        } else if self.processes[worker].liar && self.dice.permille(150) {
            outcome = Outcome::Done { result: self.garbage(), took: Millis(0) };
        } else if !self.healed && self.dice.permille(10) {
            outcome = Outcome::HandedBack;
        }
        let hangs = !self.healed && self.dice.permille(10);
        let span = if hangs { 8_000 } else { self.dice.between(20, 200) };
        let report = Report::Lease { id: lease.id, outcome };
        self.processes[worker].reports.push_back((span, report));
    }

    fn garbage(&mut self) -> Done {
        match self.dice.between(0, 2) {
            0 => Done::Think(Vec::new()),
            1 => Done::Score(vec![[("semantic".to_owned(), Score::Scored(f64::NAN))].into(); 2]),
            _ => Done::Score(Vec::new()),
        }
    }

    /// A lie about what it was asked: a trainer's costs a group, so there are at most two in a run.
    fn lies_in_earnest(&mut self, worker: usize) -> bool {
        let lies = self.processes[worker].liar && self.true_lies < 2 && self.dice.permille(200);
        self.true_lies += u32::from(lies);
        lies
    }

    /// Somebody may say something that is not so, or no longer.
    pub fn lie(&mut self, worker: usize) {
        let process = &self.processes[worker];
        if !process.liar || !process.up {
            return;
        }
        let epoch = TrainerEpoch(self.dice.between(0, self.groups.len() as u64));
        let old = self.processes[worker].seat.is_none_or(|seat| seat.epoch != epoch);
        let rank = Rank(self.dice.between(0, 3) as u32);
        let version = PolicyVersion(self.dice.between(0, 6));
        let digest = Digest([9; 32]);
        let report = match self.dice.between(0, 5) {
            0..=2 if !self.issued.is_empty() => {
                let mut id: LeaseId = self.dice.pick(&self.issued);
                if self.dice.permille(200) {
                    id.attempt = Attempt(id.attempt.0 + 1);
                }
                let outcome = match self.dice.between(0, 2) {
                    0 => Outcome::HandedBack,
                    1 => Outcome::Failed { kind: "lie".to_owned(), reason: "made up".to_owned() },
                    _ => Outcome::Done { result: self.garbage(), took: Millis(1) },
                };
                Report::Lease { id, outcome }
            }
            3 if self.processes[worker].role == Role::Trainer => {
                Report::PublishAck { version: PolicyVersion(999) }
            }
            4 if old => Report::TrainerReady { epoch, rank, version, digest },
            5 if old => {
                let (kind, reason) = ("lie".to_owned(), "made up".to_owned());
                Report::TrainerFailed { epoch, rank, kind, reason }
            }
            _ if old && self.dice.permille(300) => {
                let shards = vec![model::shard(version, epoch, Rank(9))];
                Report::ShardDone(ShardDone { epoch, rank, version, shards })
            }
            _ if old => Report::StepDone(StepDone {
                epoch,
                rank,
                iteration: version.0 as u32,
                weights: Weights { version, llm: None, dit: None, digest },
                metrics: [("loss".to_owned(), f64::NAN)].into(),
            }),
            _ => return,
        };
        self.up(worker, 0, Call::Report(report));
    }
}
