//! How long an event takes with 10,000 workers and 100,000 trees in flight:
//! `cargo run --release -p duet-sim --example crowd`.
//!
//! Every worker polls, works and reports in turn, with heartbeats in between; the simulated clock
//! advances by one millisecond an event. Times are of one thread, outputs drained, nothing journaled.
#![forbid(unsafe_code)]

use duet_core::advantage::AdvantageSpec;
use duet_core::reward::RewardSpec;
use duet_core::schedule::{Schedule, WindowSpec};
use duet_core::scheduler::{Effect, Event, Scheduler};
use duet_core::spec::{RunSpec, Timing};
use duet_core::work::{
    Assignment, Done, Finish, Lease, Outcome, PromptRow, Report, Score, Trace, Work,
};
use duet_core::{ArtifactRef, Digest, Generation, Millis, Role, WorkerId};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

const WORKERS: usize = 10_000;
const TREES: u32 = 100_000;
const EVENTS: usize = 1_000_000;

fn spec() -> RunSpec {
    RunSpec {
        seed: 1,
        iterations: 10,
        prompts_per_iteration: TREES / 2,
        traces: 2,
        leaves: 2,
        lag: 1,
        steps: 10,
        window: WindowSpec::All,
        schedule: Schedule::Balanced,
        reward: RewardSpec::default(),
        llm_advantage: AdvantageSpec::default(),
        dit_advantage: AdvantageSpec::default(),
        extra_prompts: 0,
        world: 1,
        checkpoint_every: 1,
        max_attempts: 3,
        quarantine_after: 3,
        timing: Timing { heartbeat_timeout: Millis(10_000_000), ..Timing::default() },
    }
}

fn artifact(key: String) -> ArtifactRef {
    ArtifactRef { digest: Digest([7; 32]), bytes: 1, key }
}

fn done(lease: &Lease) -> Outcome {
    let place = lease.id.unit.place();
    let trace = |j| Trace {
        artifact: artifact(format!("{place}/{j}")),
        text: String::new(),
        refined_prompt: String::new(),
        well_formed: true,
        tokens: 1,
        finish: Finish::Stop,
    };
    let result = match &lease.work {
        Work::Think(work) => Done::Think((0..work.traces).map(trace).collect()),
        Work::Render(_) => Done::Render(artifact(place)),
        Work::Score(work) => {
            let names = ["aesthetic", "consistency", "semantic"];
            let leaf =
                |k| names.iter().map(|n| ((*n).to_owned(), Score::Scored(f64::from(k)))).collect();
            Done::Score((0..work.leaves).map(leaf).collect())
        }
    };
    Outcome::Done { result, took: Millis(1) }
}

struct Crowd {
    scheduler: Scheduler,
    now: u64,
    told: VecDeque<(WorkerId, Assignment)>,
    times: Vec<Duration>,
    polls: Vec<Duration>,
    records: usize,
}

impl Crowd {
    fn event(&mut self, event: Event) {
        self.now += 1;
        let poll = matches!(event, Event::Polled { .. });
        let began = Instant::now();
        let _ = self.scheduler.handle(Millis(self.now), event);
        if self.scheduler.poll_timeout().is_some_and(|due| due.0 <= self.now) {
            self.scheduler.handle_timeout(Millis(self.now));
        }
        let mut outputs = Vec::new();
        while let Some(output) = self.scheduler.poll_output() {
            outputs.push(output);
        }
        let took = began.elapsed();
        self.times.push(took);
        if poll {
            self.polls.push(took);
        }
        for output in outputs {
            self.records += output.records.len();
            for effect in output.effects {
                if let Effect::Assign { worker, assignment, .. } = effect {
                    self.told.push_back((worker, assignment));
                }
            }
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let row = |row| PromptRow { row, text: "a prompt".to_owned(), meta: String::new() };
    let prompts = (0..u64::from(TREES)).map(row).collect();
    let scheduler = Scheduler::new(spec(), prompts, Generation(1))?;
    let (told, times) = (VecDeque::new(), Vec::with_capacity(2 * EVENTS));
    let polls = Vec::with_capacity(EVENTS);
    let mut crowd = Crowd { scheduler, now: 0, told, times, polls, records: 0 };
    let session = 1;
    let names: Vec<WorkerId> = (0..WORKERS).map(|i| WorkerId(format!("worker-{i:05}"))).collect();
    for (i, worker) in names.iter().enumerate() {
        let role = if i % 4 == 0 { Role::Reward } else { Role::Rollout };
        crowd.event(Event::Registered { worker: worker.clone(), role, session });
        crowd.event(Event::Polled { worker: worker.clone(), session });
    }
    let mut beat = 0;
    while crowd.times.len() < EVENTS {
        let Some((worker, assignment)) = crowd.told.pop_front() else { break };
        if let Assignment::Lease(lease) = assignment {
            let report = Report::Lease { id: lease.id, outcome: done(&lease) };
            crowd.event(Event::Reported { worker: worker.clone(), session, report });
        }
        crowd.event(Event::Polled { worker, session });
        beat = (beat + 7) % WORKERS;
        crowd.event(Event::Heartbeat { worker: names[beat].clone(), session });
    }
    let state = crowd.scheduler.state();
    let (flying, images) = (state.in_flight(), state.totals.images);
    let (mut times, mut polls) = (crowd.times, crowd.polls);
    println!(
        "{} events, {} records, {flying} trees in flight, {images} images",
        times.len(),
        crowd.records
    );
    print("event", &mut times);
    print("poll", &mut polls);
    Ok(())
}

fn print(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let total: Duration = times.iter().sum();
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let at = |part: f64| us(times[((times.len() - 1) as f64 * part) as usize]);
    println!(
        "{what} p99 {:.1} us, p99.9 {:.1} us, most {:.1} us, median {:.1} us, mean {:.1} us",
        at(0.99),
        at(0.999),
        at(1.0),
        at(0.5),
        us(total / times.len() as u32)
    );
}
