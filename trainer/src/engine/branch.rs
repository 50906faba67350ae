//! One of the two models with what trains it: the trained tensors, their gradients, AdamW.

use super::settings::{BranchSettings, OldPolicy};
use crate::error::TrainError;
use duet_core::Seed;
use duet_models::lora::{Adaptable, Lora};
use duet_models::params::ParamSet;
use duet_torch::Tensors;
use duet_torch::collective::Collective;
use duet_torch::optim::{AdamW, clip_grad_norm};
use duet_torch::tensorfile::{Assembly, Piece};
use tch::{Device, Kind, Tensor};

/// A branch.
pub struct Branch {
    /// `llm` or `dit`.
    pub name: &'static str,
    /// The adapter, where one is trained.
    pub lora: Option<Lora>,
    /// The trained tensors, by the names they are published under.
    pub params: Tensors,
    settings: BranchSettings,
    optimiser: AdamW,
    gradient: Gradient,
    /// Moving average of the trained tensors, where one is kept.
    ema: Option<Tensors>,
    /// The policy that samples, where it is not the trained one.
    old: Option<Tensors>,
}

/// A saved state: of a checkpoint's files, or in memory.
#[derive(Clone, Copy)]
pub enum Saved<'a> {
    /// What files hold together.
    Files(&'a Assembly),
    /// Whole tensors.
    Tensors(&'a Tensors),
}

impl Saved<'_> {
    fn names(&self) -> Vec<&str> {
        match self {
            Saved::Files(files) => files.names().collect(),
            Saved::Tensors(tensors) => tensors.keys().map(String::as_str).collect(),
        }
    }

    fn load(&self, name: &str) -> Result<Tensor, TrainError> {
        match self {
            Saved::Files(files) => Ok(files.load(name)?),
            Saved::Tensors(tensors) => Ok(tensors[name].shallow_clone()),
        }
    }

    /// Copies a tensor that must be there and of the same shape.
    fn copy_into(&self, name: &str, into: &Tensor) -> Result<(), TrainError> {
        let found = match self {
            Saved::Files(files) => files.spec(name).map(|spec| spec.shape.clone()),
            Saved::Tensors(tensors) => tensors.get(name).map(Tensor::size),
        };
        if found.is_none_or(|shape| shape != into.size()) {
            let reason = format!("`{name}` is missing or has another shape");
            return Err(TrainError::Checkpoint(reason));
        }
        match self {
            Saved::Files(files) => files.copy_into(name, into)?,
            Saved::Tensors(tensors) => {
                tch::no_grad(|| into.shallow_clone().f_copy_(&tensors[name]))?;
            }
        }
        Ok(())
    }
}

/// The gradients of all micro-batches so far, fp32, in one piece of memory in name order; each
/// parameter's is a view of it.
struct Gradient {
    flat: Tensor,
    views: Tensors,
}

impl Gradient {
    fn new(params: &Tensors) -> Result<Gradient, TrainError> {
        let total: usize = params.values().map(Tensor::numel).sum();
        let device = params.values().next().map_or(Device::Cpu, Tensor::device);
        let flat = Tensor::f_zeros([total as i64], (Kind::Float, device))?;
        let (mut views, mut at) = (Tensors::new(), 0i64);
        for (name, param) in params {
            let len = param.numel() as i64;
            let view = flat.f_narrow(0, at, len)?.f_view(param.size().as_slice())?;
            views.insert(name.clone(), view);
            at += len;
        }
        Ok(Gradient { flat, views })
    }
}

impl Branch {
    /// Prepares a model for training: marks what is trained, or puts an adapter on it. All else
    /// of the model is frozen.
    ///
    /// # Errors
    /// The adapter fits no layer, or memory is short.
    pub fn new<M: Adaptable>(
        name: &'static str,
        model: &mut M,
        frozen: impl Fn(&M) -> &ParamSet,
        settings: BranchSettings,
        seed: &Seed,
    ) -> Result<Branch, TrainError> {
        let (lora, params) = match &settings.lora {
            _ if settings.frozen => {
                frozen(model).set_trainable(|_| false);
                (None, Tensors::new())
            }
            Some(config) => {
                frozen(model).set_trainable(|_| false);
                let lora = Lora::attach(model, config.clone(), seed)?;
                lora.params().set_trainable(|_| true);
                let params = lora.params().to_map();
                (Some(lora), params)
            }
            None => {
                frozen(model).set_trainable(|_| true);
                (None, frozen(model).to_map())
            }
        };
        let optimiser = AdamW::new(settings.adamw, &params)?;
        let gradient = Gradient::new(&params)?;
        let copy = |(name, param): (&String, &Tensor)| (name.clone(), param.detach().copy());
        let ema = (settings.ema > 0.0).then(|| params.iter().map(copy).collect());
        let lags = settings.old != OldPolicy::Trained;
        let old = lags.then(|| params.iter().map(copy).collect());
        Ok(Branch { name, lora, params, settings, optimiser, gradient, ema, old })
    }

    /// Optimiser steps taken.
    pub fn steps(&self) -> u64 {
        self.optimiser.steps()
    }

    /// Back-propagates a micro-batch's loss and adds its gradient to those before it.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn backward(&mut self, loss: &Tensor) -> Result<(), TrainError> {
        loss.f_backward()?;
        for (name, sum) in &self.gradient.views {
            let mut param = self.params[name].shallow_clone();
            let grad = param.grad();
            if grad.defined() {
                let _ = sum.shallow_clone().f_add_(&grad.f_to_kind(Kind::Float)?)?;
                param.zero_grad();
            }
        }
        Ok(())
    }

    /// Sums the gradient over all ranks, in buckets that travel one behind the other.
    ///
    /// # Errors
    /// [`TrainError::Collective`].
    pub fn reduce(&self, group: &dyn Collective, bucket_bytes: usize) -> Result<(), TrainError> {
        if group.world() == 1 {
            return Ok(());
        }
        let total = self.gradient.flat.numel() as i64;
        let bucket = (bucket_bytes / 4).max(1) as i64;
        let pieces = (0..total).step_by(bucket as usize);
        let pieces = pieces
            .map(|at| self.gradient.flat.f_narrow(0, at, bucket.min(total - at)))
            .collect::<Result<Vec<_>, _>>()?;
        let begun = pieces
            .iter()
            .map(|piece| group.begin_all_reduce(piece))
            .collect::<Result<Vec<_>, _>>()?;
        begun.into_iter().try_for_each(|pending| pending.wait())?;
        Ok(())
    }

    /// Clips the gradient and gives its norm before. Nothing is scaled where it is not finite.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn clip(&self, max_norm: f64) -> Result<f64, TrainError> {
        Ok(clip_grad_norm(&self.gradient.views, max_norm)?)
    }

    /// The name of the first parameter whose gradient is not finite.
    pub fn bad_gradient(&self) -> Option<&str> {
        let bad = |(_, view): &(&String, &Tensor)| !duet_torch::all_finite([*view]);
        self.gradient.views.iter().find(bad).map(|(name, _)| name.as_str())
    }

    /// Takes an optimiser step and clears the gradient.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn step(&mut self) -> Result<(), TrainError> {
        self.optimiser.step(self.settings.lr, &self.params, &self.gradient.views)?;
        if let Some(ema) = &self.ema {
            let weight = 1.0 - self.settings.ema;
            tch::no_grad(|| {
                ema.iter().try_for_each(|(name, average)| {
                    average.shallow_clone().f_lerp_(&self.params[name], weight).map(drop)
                })
            })?;
        }
        self.clear();
        Ok(())
    }

    /// Has the policy that samples follow, once all updates on a rollout are done.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn follow(&mut self) -> Result<(), TrainError> {
        let Some(old) = &self.old else { return Ok(()) };
        let weight = 1.0 - self.settings.old.decay(self.steps());
        tch::no_grad(|| {
            old.iter().try_for_each(|(name, old)| {
                old.shallow_clone().f_lerp_(&self.params[name], weight).map(drop)
            })
        })?;
        Ok(())
    }

    /// Whether another policy samples than the one that is trained.
    pub fn lags(&self) -> bool {
        self.old.is_some()
    }

    /// The weights of the policy that samples.
    pub fn published(&self) -> &Tensors {
        self.old.as_ref().unwrap_or(&self.params)
    }

    /// What `run` gives under the policy that samples.
    ///
    /// # Errors
    /// Those of `run`, or libtorch refuses; the trained weights are back in any case but the last.
    pub fn sampling<T>(
        &self,
        run: impl FnOnce() -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        let Some(old) = &self.old else { return run() };
        let put = |from: &Tensors| {
            let copy =
                |(name, param): (&String, &Tensor)| param.shallow_clone().f_copy_(&from[name]);
            tch::no_grad(|| self.params.iter().try_for_each(copy))
        };
        let kept: Tensors =
            self.params.iter().map(|(name, param)| (name.clone(), param.detach().copy())).collect();
        put(old)?;
        let found = run();
        put(&kept)?;
        found
    }

    /// Forgets the gradient.
    pub fn clear(&mut self) {
        let _ = self.gradient.flat.zero_();
    }

    /// Sets the learning rate of the steps to come.
    pub fn set_lr(&mut self, lr: f64) {
        self.settings.lr = lr;
    }

    /// Learning rate.
    pub fn lr(&self) -> f64 {
        self.settings.lr
    }

    /// Parameters and optimiser state under `NAME/param/...` and `NAME/adamw/...`; handles, not
    /// copies. What all ranks hold alike is whole; a piece is this rank's alone.
    pub fn state(&self) -> Vec<Piece> {
        let params = self.params.iter().map(|(n, t)| (self.param_key(n), t.detach()));
        let state = self.optimiser.state();
        let state = state.into_iter().map(|(n, t)| (format!("{}/adamw/{n}", self.name), t));
        let ema = self.ema.iter().flatten();
        let ema = ema.map(|(n, t)| (format!("{}/ema/{n}", self.name), t.shallow_clone()));
        let old = self.old.iter().flatten();
        let old = old.map(|(n, t)| (format!("{}/old/{n}", self.name), t.shallow_clone()));
        let all = params.chain(state).chain(ema).chain(old);
        all.map(|(name, tensor)| Piece::whole(name, tensor)).collect()
    }

    /// Takes over a state that [`state`](Self::state) of all ranks gave, however many those were.
    ///
    /// # Errors
    /// A tensor is missing or has another shape; then the branch must not be used.
    pub fn load(&mut self, steps: u64, state: Saved<'_>) -> Result<(), TrainError> {
        let prefix = format!("{}/adamw/", self.name);
        let mut own = Tensors::new();
        for name in state.names() {
            if let Some(short) = name.strip_prefix(&prefix) {
                own.insert(short.to_owned(), state.load(name)?);
            }
        }
        self.optimiser.load(steps, &own)?;
        let take = |key: String, into: &Tensor| state.copy_into(&key, into);
        for (name, param) in &self.params {
            take(self.param_key(name), param)?;
        }
        for (name, average) in self.ema.iter().flatten() {
            take(format!("{}/ema/{name}", self.name), average)?;
        }
        for (name, old) in self.old.iter().flatten() {
            take(format!("{}/old/{name}", self.name), old)?;
        }
        Ok(())
    }

    fn param_key(&self, name: &str) -> String {
        format!("{}/param/{name}", self.name)
    }
}
