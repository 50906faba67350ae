//! Named tensors of a model: the names are exactly those of the published checkpoint.

use crate::error::{ModelError, Result};
use duet_core::{Purpose, Seed};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// How a parameter starts when a model is made from nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Gaussian with mean zero and this standard deviation.
    Normal(f64),
    /// Xavier uniform over the first two dimensions, the rest being the receptive field (a causal
    /// 3-D kernel counts only its last slice, since only that one acts on a single frame).
    Xavier,
    /// He (Kaiming) normal for a SiLU network: std = sqrt(2 / fan_in), fan as for `Xavier`.
    He,
}

/// A parameter that a config calls for.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape in the checkpoint.
    pub shape: Vec<i64>,
    /// Its start value.
    pub init: Init,
}

impl ParamSpec {
    /// A parameter called `name`.
    pub fn new(name: impl Into<String>, shape: &[i64], init: Init) -> Self {
        ParamSpec { name: name.into(), shape: shape.to_vec(), init }
    }

    /// Number of elements.
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// The start value, in fp32 on the CPU; a pure function of the seed and of the name.
    pub fn sample(&self, seed: &Seed) -> Tensor {
        let key = duet_core::Digest::of(self.name.as_bytes());
        let word = u64::from_le_bytes(key.0[..8].try_into().expect("eight bytes"));
        let seed = seed.derive(Purpose::Weights, &[word]);
        let count = self.numel() as usize;
        match self.init {
            Init::Zeros => Tensor::zeros(&self.shape, (Kind::Float, Device::Cpu)),
            Init::Ones => Tensor::ones(&self.shape, (Kind::Float, Device::Cpu)),
            Init::Normal(std) => self.normal(&seed, count, std),
            Init::He => self.normal(&seed, count, (2.0 / self.fans().0).sqrt()),
            Init::Xavier => {
                let (fan_in, fan_out) = self.fans();
                self.normal(&seed, count, (2.0 / (fan_in + fan_out)).sqrt())
            }
        }
    }

    fn normal(&self, seed: &Seed, count: usize, std: f64) -> Tensor {
        Tensor::from_slice(&seed.normals(count)).view(self.shape.as_slice()) * std
    }

    /// Fan-in and fan-out.
    fn fans(&self) -> (f64, f64) {
        let field: i64 = match self.shape.len() {
            0..=2 => 1,
            5 => self.shape[3..].iter().product(),
            _ => self.shape[2..].iter().product(),
        };
        let out = self.shape.first().copied().unwrap_or(1);
        let inp = self.shape.get(1).copied().unwrap_or(out);
        ((inp * field) as f64, (out * field) as f64)
    }
}

/// Tensors by checkpoint name. Cloned handles of the same tensor (in a module, in an optimiser) share
/// storage and gradient, so writing in place reaches them all.
#[derive(Debug, Default)]
pub struct ParamSet {
    tensors: BTreeMap<String, Tensor>,
}

impl ParamSet {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Fresh parameters for a list of specs: fp32 on the CPU.
    pub fn init(specs: &[ParamSpec], seed: &Seed) -> Self {
        specs.iter().map(|spec| (spec.name.clone(), spec.sample(seed))).collect()
    }

    /// Adds or replaces a tensor.
    pub fn insert(&mut self, name: impl Into<String>, tensor: Tensor) -> Option<Tensor> {
        self.tensors.insert(name.into(), tensor)
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Takes the tensor called `name` out.
    pub fn remove(&mut self, name: &str) -> Option<Tensor> {
        self.tensors.remove(name)
    }

    /// Whether there is a tensor called `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names and tensors, in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Number of elements in all.
    pub fn numel(&self) -> i64 {
        self.tensors.values().map(|tensor| tensor.numel() as i64).sum()
    }

    /// Handles to the same tensors in a plain map (for an optimiser, a digest or a file).
    pub fn to_map(&self) -> BTreeMap<String, Tensor> {
        self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    /// Handles to the tensors that require a gradient, by name.
    pub fn trainable(&self) -> BTreeMap<String, Tensor> {
        let trained = self.tensors.iter().filter(|(_, tensor)| tensor.requires_grad());
        trained.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    /// Sets, for every tensor, whether it is trained.
    pub fn set_trainable(&self, mut trained: impl FnMut(&str) -> bool) {
        for (name, tensor) in &self.tensors {
            let _ = tensor.set_requires_grad(trained(name));
        }
    }

    /// Copies tensors onto another device or into another dtype; a tensor that is already there is
    /// not copied. Call before a module is built on the set.
    pub fn to(self, device: Device, kind: Kind) -> Self {
        let moved = |(name, tensor): (String, Tensor)| {
            let kind = if tensor.is_floating_point() { kind } else { tensor.kind() };
            (name, tensor.to_device(device).to_kind(kind))
        };
        ParamSet { tensors: self.tensors.into_iter().map(moved).collect() }
    }

    /// Writes new values in place, for instance a new policy version. Every tensor of `new` must
    /// exist here with the same shape; nothing is written unless all do.
    pub fn assign(&self, new: &BTreeMap<String, Tensor>, origin: &str) -> Result<()> {
        for (name, tensor) in new {
            let own = self.get(name).ok_or_else(|| {
                ModelError::BadInput(format!("{origin}: tensor `{name}` is not part of this model"))
            })?;
            if own.size() != tensor.size() {
                return Err(ModelError::WrongShape {
                    origin: origin.to_owned(),
                    name: name.clone(),
                    got: tensor.size(),
                    want: own.size(),
                });
            }
        }
        tch::no_grad(|| {
            for (name, tensor) in new {
                if let Some(own) = self.get(name) {
                    own.shallow_clone().copy_(tensor);
                }
            }
        });
        Ok(())
    }

    /// Checks that every spec is met: present, right shape, floating point.
    pub fn check(&self, specs: &[ParamSpec], origin: &str) -> Result<()> {
        for spec in specs {
            let tensor = self.get(&spec.name).ok_or_else(|| ModelError::MissingTensor {
                origin: origin.to_owned(),
                name: spec.name.clone(),
                shape: spec.shape.clone(),
            })?;
            if tensor.size() != spec.shape {
                return Err(ModelError::WrongShape {
                    origin: origin.to_owned(),
                    name: spec.name.clone(),
                    got: tensor.size(),
                    want: spec.shape.clone(),
                });
            }
            if !matches!(tensor.kind(), Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double) {
                return Err(ModelError::WrongKind {
                    origin: origin.to_owned(),
                    name: spec.name.clone(),
                    got: format!("{:?}", tensor.kind()),
                });
            }
        }
        Ok(())
    }
}

impl FromIterator<(String, Tensor)> for ParamSet {
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(items: I) -> Self {
        ParamSet { tensors: items.into_iter().collect() }
    }
}
