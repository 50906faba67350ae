//! A trainer's state as files: any number of ranks writes it, any number reads it.
//!
//! The tensors that all ranks hold alike are cut, in the order of their names, into one stretch for
//! each rank, as even in bytes as whole tensors allow. Pieces of tensors that only one rank holds are
//! written by that rank. A reader puts both together without asking who wrote them.

use super::Engine;
use crate::error::TrainError;
use duet_torch::tensorfile::{Assembly, Metadata, Piece, TensorFile, TensorSource};
use duet_torch::tensorfile::{encode_into, lay_pieces};

const FORMAT: &str = "duet-checkpoint-1";

/// A shard of a checkpoint, for its rank to store.
///
/// # Errors
/// libtorch refuses.
pub fn shard(engine: &Engine, rank: u32, world: u32) -> Result<Vec<u8>, TrainError> {
    let mut image = Vec::new();
    shard_into(engine, (rank, world), &mut image)?;
    Ok(image)
}

/// As [`shard`], in memory that was used before: one copy of the rank's tensors, and nothing else that
/// training would have to wait for.
///
/// # Errors
/// libtorch refuses.
pub fn shard_into(
    engine: &Engine,
    (rank, world): (u32, u32),
    image: &mut Vec<u8>,
) -> Result<(), TrainError> {
    let mut metadata: Metadata = [
        ("format", FORMAT.to_owned()),
        ("version", engine.version().to_string()),
        ("llm_steps", engine.llm.steps().to_string()),
        ("dit_steps", engine.dit.steps().to_string()),
        ("shard", format!("{rank}/{world}")),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    // What the averages among the tensors are, for whoever exports them.
    for branch in [&engine.llm, &engine.dit] {
        let own = super::describe(branch).into_iter();
        metadata.extend(own.map(|(key, value)| (format!("{}.{key}", branch.name), value)));
    }
    let mut state = engine.llm.state();
    state.extend(engine.dit.state());
    let tensors = lay_pieces(stretch(state, rank, world), &mut metadata)?;
    Ok(encode_into(&tensors, &metadata, image)?)
}

/// What rank `rank` writes: its pieces, and the whole tensors whose middle byte lies in its part of
/// all their bytes.
fn stretch(mut state: Vec<Piece>, rank: u32, world: u32) -> Vec<Piece> {
    state.sort_by(|a, b| a.name.cmp(&b.name));
    let whole = state.iter().filter(|piece| piece.range.is_none());
    let total = whole.map(|piece| piece.bytes() as u128).sum::<u128>().max(1);
    let mut at = 0;
    state.retain(|piece| {
        if piece.range.is_some() {
            return true;
        }
        let size = piece.bytes() as u128;
        let middle = at + size / 2;
        at += size;
        middle * u128::from(world) / total == u128::from(rank)
    });
    state
}

/// Puts the state of all shards of one checkpoint into a freshly loaded engine.
///
/// # Errors
/// [`TrainError::Checkpoint`] when shards are missing, of different versions or of another model;
/// then the engine must not be used.
pub fn restore(engine: &mut Engine, files: Vec<TensorFile>) -> Result<(), TrainError> {
    let mut counters: Option<[u64; 3]> = None;
    for file in &files {
        let found = read_counters(file)?;
        if *counters.get_or_insert(found) != found {
            let reason =
                format!("{} belongs to another checkpoint than its siblings", file.label());
            return Err(TrainError::Checkpoint(reason));
        }
    }
    let none = || TrainError::Checkpoint("it has no shards".to_owned());
    let [version, llm, dit] = counters.ok_or_else(none)?;
    engine.sit_if_standing()?;
    let state = Assembly::new(files).map_err(|error| TrainError::Checkpoint(error.to_string()))?;
    let fits = engine.llm.load(llm, &state).and_then(|()| engine.dit.load(dit, &state));
    fits.map_err(|error| match error {
        error @ TrainError::Checkpoint(_) => error,
        error => TrainError::Checkpoint(error.to_string()),
    })?;
    engine.set_version(version);
    Ok(())
}

fn read_counters(file: &TensorFile) -> Result<[u64; 3], TrainError> {
    let bad = |reason: &str| TrainError::Checkpoint(format!("{}: {reason}", file.label()));
    if file.metadata().get("format").map(String::as_str) != Some(FORMAT) {
        return Err(bad("not a shard of a trainer's checkpoint"));
    }
    let number = |key: &str| {
        let value = file.metadata().get(key).and_then(|value| value.parse().ok());
        value.ok_or_else(|| bad("its counters are missing"))
    };
    Ok([number("version")?, number("llm_steps")?, number("dit_steps")?])
}
