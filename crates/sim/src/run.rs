//! One seed from beginning to verdict.

use crate::model;
use crate::options::Options;
use crate::world::World;
use duet_core::scheduler::FinishReason;
use duet_core::{Digest, TreeId};
use std::collections::BTreeMap;

/// More happenings than this are a loop.
const MOST: u64 = 3_000_000;

/// What became of a seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// A hash over everything that happened: the same seed gives the same.
    pub trace: String,
    /// What was wrong, if anything.
    pub broken: Option<String>,
    /// Happenings.
    pub events: u64,
    /// When it was over, in simulated milliseconds.
    pub ended_at: u64,
    /// The weights at the end.
    pub weights: Option<Digest>,
    /// Trees that were given up.
    pub failed_trees: Vec<TreeId>,
    /// Failures by kind.
    pub failures: BTreeMap<String, u64>,
    /// Trainer groups that went on from what a rank of the one before held.
    pub handed_on: u64,
}

/// Simulates one seed, and compares its weights with those of the same run undisturbed.
pub fn simulate(options: &Options) -> Outcome {
    let mut outcome = once(options);
    if outcome.broken.is_some() {
        return outcome;
    }
    let calm = once(&options.undisturbed());
    if let Some(text) = calm.broken {
        outcome.broken = Some(format!("undisturbed: {text}"));
    } else if calm.failed_trees == outcome.failed_trees && calm.weights != outcome.weights {
        let text = format!(
            "faults changed the weights: {:?} instead of {:?}",
            outcome.weights, calm.weights
        );
        outcome.broken = Some(text);
    } else {
        outcome.broken = innocent_trees(options, &outcome);
    }
    outcome
}

/// A tree that is not poisoned is given up only if somebody failed it on purpose.
fn innocent_trees(options: &Options, outcome: &Outcome) -> Option<String> {
    let faults = &options.faults;
    if faults.broken || faults.liars {
        return None;
    }
    let innocent = |id: &&TreeId| model::poisoned(options, **id).is_none();
    let tree = outcome.failed_trees.iter().find(innocent)?;
    Some(format!("tree {tree} was given up although nothing was wrong with it"))
}

fn once(options: &Options) -> Outcome {
    let mut world = World::new(options.clone());
    let limit = options.faulty_for + options.bound;
    let mut events = 0;
    while world.broken.is_none() && !over(&mut world) {
        events += 1;
        if !world.step() {
            world.break_off("nothing happens any more".to_owned());
        } else if world.now > limit {
            let late = world.coordinator.describe(world.now);
            let (version, now) = (world.oracle.version(), world.now);
            let text = format!("DU-10: at {now} ms the run is still at v{version}: {late}");
            world.break_off(text);
        } else if events > MOST {
            world.break_off(format!("a loop: {MOST} happenings, and no end"));
        }
    }
    if world.broken.is_none() {
        world.compare_with_journal();
        finish(&mut world);
    }
    Outcome {
        trace: world.hash.finalize().to_hex()[..16].to_owned(),
        broken: world.broken.clone(),
        events,
        ended_at: world.now,
        weights: Some(world.oracle.final_digest()),
        failed_trees: world.oracle.failed_trees(),
        failures: world.failures.clone(),
        handed_on: world.handed_on,
    }
}

/// Whether the run has come to its end; a stopped run is resumed.
fn over(world: &mut World) -> bool {
    match world.coordinator.finished.clone() {
        None => false,
        Some(FinishReason::Completed) => true,
        Some(FinishReason::Stopped) => resume(world),
        Some(FinishReason::Failed(reason)) if reason.contains("the store is full") => resume(world),
        Some(FinishReason::Failed(reason)) => {
            let excused = reason.contains("iterations in a row survived");
            if !excused {
                world.break_off(format!("the run failed: {reason}"));
            }
            true
        }
    }
}

fn resume(world: &mut World) -> bool {
    world.close_coordinator();
    world.coordinator.finished = None;
    world.kill_coordinator();
    false
}

/// What must hold when a run is complete.
fn finish(world: &mut World) {
    if world.coordinator.finished != Some(FinishReason::Completed) {
        return;
    }
    let spec = world.options.spec.clone();
    let (version, admitted) = (world.oracle.version(), world.oracle.admitted());
    let trees = (spec.iterations * spec.prompts_per_iteration) as usize;
    let most = (spec.iterations * spec.extra_prompts) as usize;
    if version != u64::from(spec.iterations) || admitted.0 != trees || admitted.1 > most {
        let text = format!("DU-2: completed at v{version} with {admitted:?} of {trees} trees");
        world.break_off(text);
    }
    let poisoned: Vec<TreeId> = (0..spec.iterations)
        .flat_map(|iteration| {
            (0..spec.prompts_per_iteration).map(move |index| TreeId { iteration, index })
        })
        .filter(|id| model::poisoned(&world.options, *id).is_some())
        .collect();
    let failed = world.oracle.failed_trees();
    if let Some(tree) = poisoned.iter().find(|tree| !failed.contains(tree)) {
        world.break_off(format!("tree {tree} fails everywhere, and yet was not given up"));
    }
}
