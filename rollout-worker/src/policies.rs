//! The policy versions a worker holds, and switching the models between them.
//!
//! A version's files hold the tensors that differ from the base model. Switching writes them in
//! place and puts the base model's own values back where the new version has none, so that a
//! version gives the same model whatever was active before it.

use crate::error::WorkError;
use duet_core::work::Weights;
use duet_core::{ArtifactRef, Digest, PolicyVersion};
use duet_models::ModelError;
use duet_models::params::ParamSet;
use duet_torch::tensorfile::{TensorFile, TensorSource};
use duet_torch::{Tensors, require_finite};
use std::collections::BTreeMap;
use tch::{Device, Tensor};

/// Files of one version, as they came from the store (already verified against their hashes).
#[derive(Clone, Debug, Default)]
pub struct WeightFiles {
    /// The LLM's.
    pub llm: Option<Vec<u8>>,
    /// The DiT's.
    pub dit: Option<Vec<u8>>,
}

/// The tensors that versions replace: those of the models, or of the adapters on them.
#[derive(Clone, Copy, Debug)]
pub struct Trained<'a> {
    /// The LLM's.
    pub llm: &'a ParamSet,
    /// The DiT's.
    pub dit: &'a ParamSet,
}

/// One held version. Versions in which a branch did not change share its tensors.
#[derive(Debug)]
struct Held {
    digest: Digest,
    llm: Part,
    dit: Part,
}

/// A branch of a held version.
#[derive(Debug, Default)]
struct Part {
    /// Hash of the file it came from; `None`: the base model's own weights.
    file: Option<Digest>,
    tensors: Tensors,
}

/// All held versions, on the CPU, and which of them the models are set to.
#[derive(Debug)]
pub struct Policies {
    most: usize,
    held: BTreeMap<PolicyVersion, Held>,
    /// The base model's values of every tensor that some version has replaced.
    llm_base: Tensors,
    dit_base: Tensors,
    active: Option<PolicyVersion>,
}

impl Policies {
    /// Holds up to `most` versions (at least one): the newest, and the base model always.
    pub fn new(most: usize) -> Policies {
        Policies {
            most: most.max(1),
            held: BTreeMap::new(),
            llm_base: Tensors::new(),
            dit_base: Tensors::new(),
            active: None,
        }
    }

    /// Whether `weights` can be activated without its files.
    pub fn holds(&self, weights: &Weights) -> bool {
        let base = weights.llm.is_none() && weights.dit.is_none();
        base || self.held.get(&weights.version).is_some_and(|held| held.digest == weights.digest)
    }

    /// Whether a held version came from this file, so that it need not be fetched again.
    pub fn has(&self, file: &ArtifactRef) -> bool {
        let parts = self.held.values().flat_map(|held| [&held.llm, &held.dit]);
        parts.into_iter().any(|part| part.file == Some(file.digest))
    }

    /// Takes a version in, after checking that it fits the models and is finite. A file
    /// that [`Policies::has`] knows may be left out.
    ///
    /// # Errors
    /// [`WorkError`] naming the tensor that does not fit; then nothing has changed.
    pub fn hold(
        &mut self,
        weights: &Weights,
        files: WeightFiles,
        trained: Trained<'_>,
    ) -> Result<(), WorkError> {
        let version = weights.version;
        let part = |name: &str, file: &Option<ArtifactRef>, data, params| {
            let file = file.as_ref().map(|file| file.digest);
            let tensors = match data {
                Some(data) => read(&format!("{name} weights of {version}"), data, params)?,
                None if file.is_none() => Tensors::new(),
                None => self.shared(file).ok_or(WorkError::NotHeld(version))?,
            };
            require_finite(&tensors).map_err(|source| WorkError::BadWeights { version, source })?;
            Ok::<_, WorkError>(Part { file, tensors })
        };
        let held = Held {
            digest: weights.digest,
            llm: part("llm", &weights.llm, files.llm, trained.llm)?,
            dit: part("dit", &weights.dit, files.dit, trained.dit)?,
        };
        self.held.insert(version, held);
        while self.held.len() > self.most {
            self.held.pop_first();
        }
        // The version may have come back with other contents (the coordinator was restored).
        if self.active == Some(version) {
            self.active = None;
        }
        Ok(())
    }

    /// The tensors of a held file; handles, not copies: nothing writes to them.
    fn shared(&self, file: Option<Digest>) -> Option<Tensors> {
        let mut parts = self.held.values().flat_map(|held| [&held.llm, &held.dit]);
        let part = parts.find(|part| part.file == file)?;
        Some(part.tensors.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect())
    }

    /// Sets the models to a version; returns whether they were set to another before.
    ///
    /// # Errors
    /// [`WorkError::NotHeld`], [`WorkError::OtherPolicy`].
    pub fn activate(&mut self, weights: &Weights, trained: Trained<'_>) -> Result<bool, WorkError> {
        let none = Tensors::new();
        let (llm, dit) = match self.held.get(&weights.version) {
            _ if weights.llm.is_none() && weights.dit.is_none() => (&none, &none),
            Some(held) if held.digest != weights.digest => {
                let (held, asked) = (held.digest, weights.digest);
                return Err(WorkError::OtherPolicy { version: weights.version, held, asked });
            }
            Some(held) => (&held.llm.tensors, &held.dit.tensors),
            None => return Err(WorkError::NotHeld(weights.version)),
        };
        if self.active == Some(weights.version) {
            return Ok(false);
        }
        // Half-written models are nobody's policy: until both are set, none is active.
        self.active = None;
        switch(trained.llm, &mut self.llm_base, llm)?;
        switch(trained.dit, &mut self.dit_base, dit)?;
        self.active = Some(weights.version);
        Ok(true)
    }
}

/// Reads a weights file and checks that the model has every tensor of it in that shape.
fn read(label: &str, data: Vec<u8>, params: &ParamSet) -> Result<Tensors, WorkError> {
    let tensors = TensorFile::from_bytes(label, data)?.load_all(Device::Cpu)?;
    for (name, tensor) in &tensors {
        let (origin, got) = (label.to_owned(), tensor.size());
        match params.get(name).map(Tensor::size) {
            Some(want) if want == got => {}
            Some(want) => {
                let name = name.clone();
                return Err(ModelError::WrongShape { origin, name, got, want }.into());
            }
            None => {
                let reason = format!("{origin}: tensor `{name}` is not part of this model");
                return Err(ModelError::BadInput(reason).into());
            }
        }
    }
    Ok(tensors)
}

/// Writes `new` into `params`, and the base values of everything else that was ever replaced.
fn switch(params: &ParamSet, base: &mut Tensors, new: &Tensors) -> Result<(), WorkError> {
    for name in new.keys() {
        if let (false, Some(own)) = (base.contains_key(name), params.get(name)) {
            base.insert(name.clone(), own.detach().to_device(Device::Cpu).copy());
        }
    }
    let back = base.iter().filter(|(name, _)| !new.contains_key(*name));
    let all = back.chain(new).map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
    params.assign(&all.collect(), "a policy version")?;
    Ok(())
}
