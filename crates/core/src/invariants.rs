//! The invariants, by id. Checked in release builds and in the simulator.
//!
//! What is checked where: `State::apply` refuses a record that would break DU-1, DU-2, DU-4, DU-5, DU-6, DU-8
//! or DU-12, at every decision; [`check_step`] reads DU-1, DU-2, DU-4, DU-7 and DU-8 off what a committed step
//! may have changed, after every one, and [`check`] off the whole state before every checkpoint; the lease table refuses a second lease (DU-5); DU-3 holds because a lease's version
//! is computed from its iteration alone; DU-9 is the artifact store's. The simulator's oracle works all of
//! them out again from the journal, and adds DU-10 and DU-11. A violation ends the run with its id.

use crate::TreeId;
use crate::scheduler::{Fate, State, judge};
use crate::spec::RunSpec;

/// The ids and what they say.
pub const REGISTRY: [(&str, &str); 12] = [
    ("DU-1", "a leaf or trace contributes to at most one committed step"),
    ("DU-2", "admitted trees = in flight + retired; each retired tree has exactly one fate"),
    ("DU-3", "a tree of iteration i was sampled with version i-L, whole"),
    ("DU-4", "the policy version grows by exactly one per committed step"),
    ("DU-5", "at most one live lease per (tree, stage) or (sub-tree, stage)"),
    ("DU-6", "a report of an old attempt changes nothing"),
    ("DU-7", "advantages are finite; centred groups sum to zero; a group of one has none"),
    ("DU-8", "no reward exists for a failed scoring"),
    ("DU-9", "bytes under a content hash never change"),
    ("DU-10", "after faults stop, every admitted tree is retired within a bound"),
    ("DU-11", "restore(snapshot, journal) == live state"),
    ("DU-12", "a worker samples only with a committed version"),
];

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{id} is broken: {text}")]
pub struct Violation {
    /// Which.
    pub id: &'static str,
    /// How.
    pub text: String,
}

impl Violation {
    /// A violation of the invariant `id`.
    pub fn new(id: &'static str, text: String) -> Violation {
        Violation { id, text }
    }
}

/// Checks the durable state, whole.
///
/// # Errors
/// The first violation found.
pub fn check(spec: &RunSpec, state: &State) -> Result<(), Violation> {
    du_1_and_2(state, 0)?;
    du_4(state)?;
    du_7_and_8(spec, state)
}

/// Checks what a committed step may have changed; the rest was checked when it was committed.
///
/// # Errors
/// As [`check`].
pub fn check_step(spec: &RunSpec, state: &State) -> Result<(), Violation> {
    du_1_and_2(state, state.version.0.saturating_sub(1))?;
    du_4(state)?;
    du_7_and_8(spec, state)
}

/// From this iteration on; no tree of an earlier one is in flight.
fn du_1_and_2(state: &State, first: u64) -> Result<(), Violation> {
    let first = TreeId { iteration: u32::try_from(first).unwrap_or(u32::MAX), index: 0 };
    let mut flying = 0;
    for (id, tree) in state.trees.range(first..) {
        let committed = u64::from(id.iteration) < state.version.0;
        match (&tree.fate, committed) {
            (Some(Fate::Trained | Fate::ZeroSpread), false) => {
                let text = format!("tree {id} is retired before its step is committed");
                return Err(Violation::new("DU-1", text));
            }
            (None, true) => {
                let text = format!("tree {id} has no fate although its step is committed");
                return Err(Violation::new("DU-2", text));
            }
            (fate, _) => flying += u64::from(fate.is_none()),
        }
    }
    let totals = &state.totals;
    let retired = totals.trained + totals.zero_spread + totals.failed;
    if flying + retired != totals.admitted {
        let text = format!("{} admitted, {flying} in flight, {retired} retired", totals.admitted);
        return Err(Violation::new("DU-2", text));
    }
    Ok(())
}

fn du_4(state: &State) -> Result<(), Violation> {
    for (iteration, step) in &state.steps {
        if step.weights.version.0 != u64::from(*iteration) + 1 {
            let text = format!("iteration {iteration} committed {}", step.weights.version);
            return Err(Violation::new("DU-4", text));
        }
    }
    match state.steps.last_key_value() {
        Some((last, _)) if u64::from(*last) + 1 != state.version.0 => {
            let text = format!("version {} after iteration {last}", state.version);
            Err(Violation::new("DU-4", text))
        }
        _ => Ok(()),
    }
}

fn du_7_and_8(spec: &RunSpec, state: &State) -> Result<(), Violation> {
    let Some(iteration) = state.version.0.checked_sub(1).map(|i| i as u32) else { return Ok(()) };
    for (id, tree) in judge(state, spec, iteration) {
        let numbers = tree.llm.iter().chain(tree.dit.iter().flatten()).flatten();
        if let Some(bad) = numbers.copied().find(|a| !a.is_finite()) {
            return Err(Violation::new("DU-7", format!("tree {id} has an advantage of {bad}")));
        }
        let without =
            tree.llm_rewards.iter().zip(&tree.llm).any(|(r, a)| r.is_none() && a.is_some());
        if without {
            let text = format!("tree {id} has an advantage without a reward");
            return Err(Violation::new("DU-8", text));
        }
    }
    Ok(())
}
