//! What a seed decides.

use crate::dice::Dice;
use duet_core::Millis;
use duet_core::advantage::{AdvantageSpec, Center, GroupKey, Scale};
use duet_core::reward::{FailurePolicy, RewardSpec};
use duet_core::schedule::{CurvePoint, Schedule, WindowSpec};
use duet_core::spec::{RunSpec, Timing};

/// How bad the first phase is. Chances are in a thousand; spans in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// A message is lost.
    pub loss: u64,
    /// A message arrives twice.
    pub double: u64,
    /// Longest delay of a message: what reorders them.
    pub delay: u64,
    /// Mean time between deaths of workers; zero: none.
    pub worker_deaths: u64,
    /// The coordinator dies at an output with records, at any of them.
    pub coordinator_deaths: u64,
    /// Mean time between cuts of one worker's connection.
    pub cuts: u64,
    /// Mean time between stops (SIGSTOP) of one process.
    pub stops: u64,
    /// A worker's clock is off by up to so much.
    pub drift: u64,
    /// One worker works ten times slower than the others.
    pub slow: bool,
    /// One rollout or reward worker fails everything.
    pub broken: bool,
    /// One worker of each role says things that are not so.
    pub liars: bool,
    /// A manifest cannot be written.
    pub manifests: u64,
    /// Mean time between operators' commands (pause, resume, drain, stop).
    pub commands: u64,
}

/// A run and what is done to it.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where all of it comes from.
    pub seed: u64,
    /// The run.
    pub spec: RunSpec,
    /// Prompts in the data set.
    pub prompts: usize,
    /// Rollout, reward and trainer processes.
    pub workers: [usize; 3],
    /// A tree that fails wherever it is tried.
    pub poisoned_trees: u64,
    /// A component of a leaf cannot be scored, wherever it is tried.
    pub failing_scores: u64,
    /// What goes wrong in the first phase.
    pub faults: Faults,
    /// Length of the first phase.
    pub faulty_for: u64,
    /// The run must be over this long after the faults.
    pub bound: u64,
}

impl Options {
    /// The options of a seed.
    pub fn new(seed: u64) -> Options {
        let mut dice = Dice::new(seed, 1);
        let spec = spec(&mut dice, seed);
        let world = spec.world as usize;
        let workers = [
            dice.between(1, 4) as usize,
            dice.between(1, 2) as usize,
            world + dice.between(0, 1) as usize,
        ];
        let faults = if dice.permille(30) { Faults::default() } else { faults(&mut dice) };
        Options {
            seed,
            prompts: spec.prompts_per_iteration as usize + dice.between(0, 4) as usize,
            spec,
            workers,
            poisoned_trees: dice.pick(&[0, 0, 100]),
            failing_scores: dice.pick(&[0, 0, 50, 300]),
            faulty_for: dice.between(5_000, 30_000),
            faults,
            bound: 400_000,
        }
    }

    /// The same run, undisturbed: poisoned trees and scores that fail stay, for they belong to the
    /// run and not to what happens to it.
    pub fn undisturbed(&self) -> Options {
        Options { faults: Faults::default(), faulty_for: 0, ..self.clone() }
    }
}

fn spec(dice: &mut Dice, seed: u64) -> RunSpec {
    let traces = dice.between(1, 3) as u32;
    let advantage = |dice: &mut Dice| AdvantageSpec {
        center: dice.pick(&[Center::Mean, Center::Mean, Center::LeaveOneOut]),
        scale: dice.pick(&[Scale::Group, Scale::Group, Scale::None]),
        ddof: dice.between(0, 1) as u32,
        group: dice.pick(&[GroupKey::Trace, GroupKey::Tree]),
        ..AdvantageSpec::default()
    };
    let iterations = dice.between(2, 5) as u32;
    RunSpec {
        seed,
        iterations,
        prompts_per_iteration: dice.between(1, 4) as u32,
        traces,
        leaves: dice.between(1, 3) as u32,
        lag: dice.pick(&[0, 0, 1, 1, 2]),
        steps: 10,
        window: dice.pick(&[
            WindowSpec::Random { len: 2, low: 0, high: 5 },
            WindowSpec::Progressive { len: 3, every: 2, stride: 2 },
            WindowSpec::All,
        ]),
        schedule: dice.pick(&[
            Schedule::Balanced,
            Schedule::Balanced,
            Schedule::Staged { switch_at: iterations / 2 },
            Schedule::Alternating { llm: 1, dit: 1 },
            Schedule::Plateau { patience: 1, min_delta: 0.0, smooth: 1, at_most: iterations - 1 },
            Schedule::Curve {
                points: vec![
                    CurvePoint { iteration: 0, llm: 1.0, dit: 0.0 },
                    CurvePoint { iteration: 2, llm: 0.5, dit: 0.5 },
                ],
            },
        ]),
        reward: RewardSpec {
            failure: dice.pick(&[
                FailurePolicy::RequireAll,
                FailurePolicy::AtLeast(1),
                FailurePolicy::DropTree,
            ]),
            ..RewardSpec::default()
        },
        llm_advantage: advantage(dice),
        dit_advantage: advantage(dice),
        extra_prompts: dice.pick(&[0, 0, 1, 3]),
        world: dice.between(1, 3) as u32,
        min_world: dice.pick(&[0, 0, 1]),
        checkpoint_every: dice.between(1, 3) as u32,
        max_attempts: dice.between(3, 4) as u32,
        quarantine_after: dice.pick(&[0, 3, 3]),
        timing: Timing {
            heartbeat_timeout: Millis(2_000),
            reconnect: Millis(300),
            think: Millis(3_000),
            render: Millis(3_000),
            score: Millis(2_000),
            step: Millis(6_000),
            rendezvous: Millis(5_000),
            backoff: Millis(200),
            backoff_max: Millis(2_000),
        },
    }
}

/// Each kind of fault is on in about half of the seeds, so that each is also seen alone.
fn faults(dice: &mut Dice) -> Faults {
    let mut some = |values: &[u64]| if dice.permille(500) { dice.pick(values) } else { 0 };
    let mut faults = Faults {
        loss: some(&[10, 50, 200]),
        double: some(&[20, 100]),
        delay: some(&[20, 100, 800]),
        worker_deaths: some(&[800, 2_000, 6_000]),
        coordinator_deaths: some(&[3, 10, 30]),
        cuts: some(&[1_500, 5_000]),
        stops: some(&[1_500, 5_000]),
        drift: some(&[100, 300]),
        manifests: some(&[300]),
        commands: some(&[2_000, 6_000]),
        ..Faults::default()
    };
    faults.slow = dice.permille(300);
    faults.broken = dice.permille(200);
    faults.liars = dice.permille(250);
    faults
}
