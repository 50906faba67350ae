//! A trainer's state as files: any number of ranks writes it, any number reads it.
//!
//! All tensors of the state, in name order, are cut into one stretch for each rank, as even in
//! bytes as whole tensors allow.

use super::Engine;
use crate::error::TrainError;
use duet_torch::Tensors;
use duet_torch::tensorfile::{Metadata, TensorFile, TensorSource, encode};
use tch::{Device, Tensor};

const FORMAT: &str = "duet-checkpoint-1";

/// A shard of a checkpoint, for its rank to store.
///
/// # Errors
/// libtorch refuses.
pub fn shard(engine: &Engine, rank: u32, world: u32) -> Result<Vec<u8>, TrainError> {
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
    let state: Tensors = engine.llm.state().into_iter().chain(engine.dit.state()).collect();
    Ok(encode(&stretch(&state, rank, world), &metadata)?)
}

/// The tensors of rank `rank`: those whose middle byte lies in its part of all bytes.
fn stretch(state: &Tensors, rank: u32, world: u32) -> Tensors {
    let size = |t: &Tensor| (t.numel() * t.kind().elt_size_in_bytes()) as u128;
    let total = state.values().map(size).sum::<u128>().max(1);
    let mut at = 0;
    let mut own = Tensors::new();
    for (name, tensor) in state {
        let middle = at + size(tensor) / 2;
        at += size(tensor);
        if middle * u128::from(world) / total == u128::from(rank) {
            own.insert(name.clone(), tensor.shallow_clone());
        }
    }
    own
}

/// Puts the state of all shards of one checkpoint into a freshly loaded engine.
///
/// # Errors
/// [`TrainError::Checkpoint`] when shards are missing, of different versions or of another model;
/// then the engine must not be used.
pub fn restore(engine: &mut Engine, shards: Vec<(String, Vec<u8>)>) -> Result<(), TrainError> {
    let mut state = Tensors::new();
    let mut counters: Option<[u64; 3]> = None;
    for (label, bytes) in shards {
        let file = TensorFile::from_bytes(label, bytes)?;
        let found = read_counters(&file)?;
        if *counters.get_or_insert(found) != found {
            let reason =
                format!("{} belongs to another checkpoint than its siblings", file.label());
            return Err(TrainError::Checkpoint(reason));
        }
        state.extend(file.load_all(Device::Cpu)?);
    }
    let none = || TrainError::Checkpoint("it has no shards".to_owned());
    let [version, llm, dit] = counters.ok_or_else(none)?;
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
