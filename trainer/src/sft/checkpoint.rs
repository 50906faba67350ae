//! Checkpoints of supervised fine-tuning: one file each, written by rank 0, handed on by it.
//!
//! Every rank holds the whole state, so one of them writes it, and after a restart one of them
//! reads it: the others need no common file system.

use super::tuner::Tuner;
use crate::error::TrainError;
use duet_torch::Tensors;
use duet_torch::collective::Collective;
use duet_torch::tensorfile::{Metadata, TensorFile, TensorSource, encode};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

const FORMAT: &str = "duet-sft-checkpoint-1";

/// The folder of a stage's checkpoints.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    /// What was learned from what, and how: checkpoints of another stage are refused.
    stage: String,
    keep: usize,
}

impl Checkpoints {
    /// Checkpoints of the stage `stage` in `folder`, of which the newest `keep` are kept.
    pub fn new(folder: PathBuf, stage: String, keep: usize) -> Checkpoints {
        Checkpoints { folder, stage, keep: keep.max(1) }
    }

    fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step:08}.safetensors"))
    }

    /// The steps that there are checkpoints of, in order.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn list(&self) -> Result<Vec<u64>, TrainError> {
        let entries = match std::fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io(&self.folder, &error)),
        };
        let step = |entry: std::io::Result<std::fs::DirEntry>| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            name.strip_prefix("step-")?.strip_suffix(".safetensors")?.parse().ok()
        };
        let mut steps: Vec<u64> = entries.filter_map(step).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Writes a checkpoint, whole or not at all, then removes those that are too old.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, tuner: &Tuner) -> Result<(), TrainError> {
        let metadata: Metadata = [
            ("format", FORMAT.to_owned()),
            ("stage", self.stage.clone()),
            ("step", tuner.step().to_string()),
            ("optimiser_steps", tuner.optimiser_steps().to_string()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        let bytes = encode(&tuner.state(), &metadata)?;
        std::fs::create_dir_all(&self.folder).map_err(|error| io(&self.folder, &error))?;
        let path = self.path(tuner.step());
        let partial = path.with_extension("partial");
        let written = std::fs::write(&partial, bytes)
            .and_then(|()| std::fs::File::open(&partial)?.sync_all())
            .and_then(|()| std::fs::rename(&partial, &path));
        written.map_err(|error| io(&path, &error))?;
        let steps = self.list()?;
        for old in &steps[..steps.len().saturating_sub(self.keep)] {
            let path = self.path(*old);
            std::fs::remove_file(&path).map_err(|error| io(&path, &error))?;
        }
        Ok(())
    }

    /// Puts the newest checkpoint of rank 0 into every rank's tuner; without one, nothing happens.
    /// Gives the step to go on from.
    ///
    /// # Errors
    /// The file is damaged or of another stage, or the ranks cannot talk.
    pub fn restore(&self, tuner: &mut Tuner, group: &dyn Collective) -> Result<u64, TrainError> {
        // The counters travel first: [ok, step, optimiser steps].
        let (mut counters, mut state) = ([1i64, 0, 0], Tensors::new());
        let mut failure = None;
        if group.rank() == 0 {
            match self.read() {
                Ok(None) => {}
                Ok(Some((step, optimiser, tensors))) => {
                    (counters, state) = ([1, step as i64, optimiser as i64], tensors);
                }
                Err(error) => (counters, failure) = ([0; 3], Some(error)),
            }
        }
        let shared = Tensor::from_slice(&counters);
        group.broadcast(&shared, 0)?;
        let counters = Vec::<i64>::try_from(&shared)?;
        if let Some(error) = failure {
            return Err(error);
        }
        if counters[0] == 0 {
            let reason = "rank 0 could not read its checkpoint".to_owned();
            return Err(TrainError::Peer { rank: 0, kind: "checkpoint".to_owned(), reason });
        }
        let (step, optimiser) = (counters[1] as u64, counters[2] as u64);
        if step == 0 {
            return Ok(0);
        }
        let mut whole = Tensors::new();
        for (name, like) in tuner.state() {
            // In the tensor's own type, so that every bit arrives.
            let tensor = match state.get(&name) {
                Some(tensor) => tensor.contiguous(),
                None if group.rank() == 0 => {
                    return Err(TrainError::Checkpoint(format!("`{name}` is missing")));
                }
                None => Tensor::f_zeros(like.size(), (like.kind(), Device::Cpu))?,
            };
            broadcast(&tensor, group)?;
            whole.insert(name, tensor);
        }
        tuner.restore(step, optimiser, &whole)?;
        Ok(step)
    }

    fn read(&self) -> Result<Option<(u64, u64, Tensors)>, TrainError> {
        let Some(step) = self.list()?.pop() else { return Ok(None) };
        let path = self.path(step);
        let bytes = std::fs::read(&path).map_err(|error| io(&path, &error))?;
        let label = path.display().to_string();
        let file = TensorFile::from_bytes(label.clone(), bytes)?;
        let say = |key: &str| file.metadata().get(key).map(String::as_str);
        let bad = |reason: &str| TrainError::Checkpoint(format!("{label}: {reason}"));
        if say("format") != Some(FORMAT) {
            return Err(bad("not a checkpoint of supervised fine-tuning"));
        }
        if say("stage") != Some(self.stage.as_str()) {
            return Err(bad(
                "it was made with other examples, another model or other values of [sft]; take \
                 another run.name, or remove the folder to begin again",
            ));
        }
        let number = |key: &str| say(key).and_then(|text| text.parse().ok());
        let (Some(step), Some(optimiser)) = (number("step"), number("optimiser_steps")) else {
            return Err(bad("its counters are missing"));
        };
        Ok(Some((step, optimiser, file.load_all(Device::Cpu)?)))
    }
}

/// Half precision travels in 32 bits, which hold it exactly: not every collective knows it.
fn broadcast(tensor: &Tensor, group: &dyn Collective) -> Result<(), TrainError> {
    if matches!(tensor.kind(), Kind::BFloat16 | Kind::Half) {
        let wide = tensor.f_to_kind(Kind::Float)?;
        group.broadcast(&wide, 0)?;
        tensor.shallow_clone().f_copy_(&wide)?;
        return Ok(());
    }
    Ok(group.broadcast(tensor, 0)?)
}

fn io(path: &Path, error: &std::io::Error) -> TrainError {
    TrainError::Store(format!("cannot use {}: {error}", path.display()))
}
