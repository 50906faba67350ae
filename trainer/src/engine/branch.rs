//! One of the two models with what trains it: the trained tensors, their gradients, AdamW.

use super::gradient::{Reduction, Sharing};
use super::layout::Seat;
use super::seated::Seated;
use super::settings::{BranchSettings, OldPolicy};
use crate::error::TrainError;
use duet_core::Seed;
use duet_models::lora::{Adaptable, Lora};
use duet_models::params::ParamSet;
use duet_torch::Tensors;
use duet_torch::collective::Collective;
use duet_torch::tensorfile::{Assembly, Piece};
use std::ops::Range;
use tch::{Kind, Tensor};

/// A branch.
pub struct Branch {
    /// `llm` or `dit`.
    pub name: &'static str,
    /// The adapter, where one is trained.
    pub lora: Option<Lora>,
    /// The trained tensors, by the names they are published under.
    pub params: Tensors,
    settings: BranchSettings,
    /// What depends on this rank's place in its group; `None` until it has one.
    seated: Option<Seated>,
    /// The policy that samples, where it is not the trained one.
    old: Option<Tensors>,
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
        let copy = |(name, param): (&String, &Tensor)| (name.clone(), param.detach().copy());
        let lags = settings.old != OldPolicy::Trained;
        let old = lags.then(|| params.iter().map(copy).collect());
        Ok(Branch { name, lora, params, settings, seated: None, old })
    }

    /// Takes a place in a group: makes room for the gradient and the optimiser's state, or for this
    /// rank's share of them. A state that is whole goes along to another place.
    ///
    /// # Errors
    /// A state that is shared out cannot go along; or memory is short.
    pub fn sit(&mut self, seat: Seat, sharing: Sharing) -> Result<(), TrainError> {
        match &mut self.seated {
            Some(seated) if seated.gradient.layout().seat() == seat => return Ok(()),
            Some(seated) if seated.optimiser.steps() > 0 => return self.stay(seat, sharing),
            _ => {}
        }
        // What there was goes before its successor comes.
        self.seated = None;
        self.seated = Some(Seated::new(&self.params, &self.settings, seat, sharing)?);
        Ok(())
    }

    /// Takes a place in another group with the state it has, and with fresh memory for the gradient: what
    /// was under way in a group that came apart may still be written into the old.
    ///
    /// # Errors
    /// As [`sit`](Self::sit).
    pub fn stay(&mut self, seat: Seat, sharing: Sharing) -> Result<(), TrainError> {
        let Some(seated) = &mut self.seated else { return self.sit(seat, sharing) };
        let moves = seated.gradient.layout().seat() != seat;
        if moves && sharing.zero > 0 && (seated.gradient.is_shared() || seat.world > 1) {
            let reason = format!(
                "the {} optimiser's state is shared out; it must be restored to become rank {} of {}",
                self.name, seat.rank, seat.world
            );
            return Err(TrainError::Protocol(reason));
        }
        seated.renew(&self.params, seat, sharing)
    }

    /// Replaces the state by rank `root`'s. All ranks of a group that hold it whole call this.
    ///
    /// # Errors
    /// [`TrainError::Collective`]; then the branch must not be used.
    pub fn take_from(&mut self, group: &dyn Collective, root: u32) -> Result<(), TrainError> {
        let mut pieces = self.state();
        pieces.sort_by(|a, b| a.name.cmp(&b.name));
        for Piece { tensor, .. } in pieces {
            let flat = tensor.f_contiguous()?.f_view(-1)?;
            // As bytes: they are copied, not computed with.
            group.broadcast(&flat.f_view_dtype(Kind::Uint8)?, root)?;
            if !tensor.is_contiguous() {
                let whole = flat.f_view(tensor.size().as_slice())?;
                tch::no_grad(|| tensor.shallow_clone().f_copy_(&whole))?;
            }
        }
        let steps = Tensor::from(self.steps() as i64);
        group.broadcast(&steps, root)?;
        self.seated_mut()?.optimiser.set_steps(u64::try_from(steps.int64_value(&[])).unwrap_or(0));
        Ok(())
    }

    /// Whether ranks share the optimiser's state out.
    pub fn is_shared(&self) -> bool {
        self.seated.as_ref().is_some_and(|seated| seated.gradient.is_shared())
    }

    /// Its place in a group; `None` until it has one.
    pub fn seat(&self) -> Option<Seat> {
        self.seated.as_ref().map(|seated| seated.gradient.layout().seat())
    }

    /// Whether it has no place in a group yet.
    pub fn is_standing(&self) -> bool {
        self.seated.is_none()
    }

    fn seated(&self) -> Result<&Seated, TrainError> {
        self.seated.as_ref().ok_or_else(|| standing(self.name))
    }

    fn seated_mut(&mut self) -> Result<&mut Seated, TrainError> {
        let name = self.name;
        self.seated.as_mut().ok_or_else(|| standing(name))
    }

    /// Optimiser steps taken.
    pub fn steps(&self) -> u64 {
        self.seated.as_ref().map_or(0, |seated| seated.optimiser.steps())
    }

    /// Begins an update in which this rank has `own` micro-batches and the one that has most `most`.
    ///
    /// # Errors
    /// The branch sits elsewhere than the group says.
    pub fn begin<'g>(
        &mut self,
        group: &'g dyn Collective,
        (own, most): (u32, u32),
    ) -> Result<Reduction<'g>, TrainError> {
        let gradient = &mut self.seated_mut()?.gradient;
        gradient.clear();
        gradient.reduction(group, own, most)
    }

    /// Back-propagates a micro-batch's loss, adds its gradient to those before it, and begins the sums
    /// over ranks that are due.
    ///
    /// # Errors
    /// libtorch refuses, or [`TrainError::Collective`].
    pub fn backward(
        &mut self,
        loss: &Tensor,
        reduction: &mut Reduction<'_>,
    ) -> Result<(), TrainError> {
        let Seated { gradient, leaves, .. } = self.seated_mut()?;
        gradient.begin_pass(reduction);
        duet_torch::backward(loss, leaves, &mut |param, grad| {
            gradient.take(reduction, param, &grad)
        })?;
        gradient.end_pass(reduction)
    }

    /// Begins the sums over ranks that no micro-batch of this rank began.
    ///
    /// # Errors
    /// [`TrainError::Collective`].
    pub fn begin_all(&mut self, reduction: &mut Reduction<'_>) -> Result<(), TrainError> {
        self.seated_mut()?.gradient.begin_all(reduction)
    }

    /// Waits for all sums over ranks.
    ///
    /// # Errors
    /// [`TrainError::Collective`].
    pub fn finish(&mut self, reduction: &mut Reduction<'_>) -> Result<(), TrainError> {
        self.seated_mut()?.gradient.finish(reduction)
    }

    /// Clips the gradient to an L2 norm of `max_norm` and gives its norm before, and the first
    /// parameter whose gradient is not finite, if any: then nothing is scaled. The factor is
    /// PyTorch's: `min(1, max_norm / (norm + 1e-6))`.
    ///
    /// # Errors
    /// [`TrainError::Collective`].
    pub fn clip(
        &mut self,
        group: &dyn Collective,
        max_norm: f64,
    ) -> Result<(f64, Option<&str>), TrainError> {
        let gradient = &mut self.seated_mut()?.gradient;
        gradient.learn_order(group)?;
        let (norm, bad) = gradient.norm(group)?;
        let factor = max_norm / (norm + 1e-6);
        if norm.is_finite() && factor < 1.0 {
            gradient.scale(factor)?;
        }
        Ok((norm, bad))
    }

    /// Takes an optimiser step and clears the gradient; where ranks share the step out, they tell each
    /// other what came out.
    ///
    /// # Errors
    /// libtorch refuses, or [`TrainError::Collective`].
    pub fn step(&mut self, group: &dyn Collective) -> Result<(), TrainError> {
        let (lr, weight) = (self.settings.lr, 1.0 - self.settings.ema);
        let seated = self.seated_mut()?;
        seated.optimiser.step(lr, &seated.params, &seated.grads)?;
        if let Some(ema) = &seated.ema {
            tch::no_grad(|| {
                ema.iter().try_for_each(|(name, average)| {
                    average.shallow_clone().f_lerp_(&seated.params[name], weight).map(drop)
                })
            })?;
        }
        if seated.gradient.is_shared() {
            tch::no_grad(|| seated.gather(group))?;
        }
        seated.gradient.clear();
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

    /// Sets the learning rate of the steps to come.
    pub fn set_lr(&mut self, lr: f64) {
        self.settings.lr = lr;
    }

    /// Learning rate.
    pub fn lr(&self) -> f64 {
        self.settings.lr
    }

    /// Parameters under `NAME/param/...`, the policy that samples under `NAME/old/...`, the optimiser's
    /// state under `NAME/adamw/...` and the moving average under `NAME/ema/...`; handles, not copies.
    /// What all ranks hold alike is whole; a piece is this rank's alone.
    pub fn state(&self) -> Vec<Piece> {
        let params = self.params.iter().map(|(n, t)| (self.key("param", n), t.detach()));
        let old = self.old.iter().flatten();
        let old = old.map(|(n, t)| (self.key("old", n), t.shallow_clone()));
        let mut all: Vec<Piece> =
            params.chain(old).map(|(name, tensor)| Piece::whole(name, tensor)).collect();
        let Some(seated) = &self.seated else { return all };
        let (state, shared) = (seated.optimiser.state(), seated.gradient.is_shared());
        for own in &seated.own {
            let name = &seated.gradient.layout().names()[own.param];
            let shape = seated.leaves[own.param].size();
            // A rank's alone also where it is the whole of a tensor.
            let piece = |name: String, tensor: &Tensor| match shared {
                true => {
                    let range = own.from..own.from + own.len;
                    Piece::part(name, &shape, range, tensor.view(-1))
                }
                false => Piece::whole(name, tensor.shallow_clone()),
            };
            for part in seated.optimiser.parts(&own.name) {
                let key = self.key("adamw", &format!("{name}.{part}"));
                all.push(piece(key, &state[&format!("{}.{part}", own.name)]));
            }
            if let Some(average) = seated.ema.as_ref().and_then(|ema| ema.get(&own.name)) {
                all.push(piece(self.key("ema", name), average));
            }
        }
        all
    }

    /// The state of a branch that is not shared out, by name.
    pub fn whole_state(&self) -> Tensors {
        self.state().into_iter().map(|piece| (piece.name, piece.tensor)).collect()
    }

    /// Takes over a state that [`state`](Self::state) of all ranks gave, however many those were; where
    /// the state is shared out, this rank's part of it.
    ///
    /// # Errors
    /// A tensor is missing or has another shape; then the branch must not be used.
    pub fn load(&mut self, steps: u64, state: &Assembly) -> Result<(), TrainError> {
        self.take_over(steps, &|key, shape, range| {
            if state.spec(key).is_none_or(|spec| spec.shape != shape) {
                return Err(unfit(key));
            }
            Ok(match range {
                Some(range) => state.load_range(key, range)?,
                None => state.load(key)?,
            })
        })
    }

    /// Takes over a state that [`whole_state`](Self::whole_state) gave.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_whole(&mut self, steps: u64, state: &Tensors) -> Result<(), TrainError> {
        self.take_over(steps, &|key, shape, range| {
            let saved = state.get(key).filter(|saved| saved.size() == shape);
            let saved = saved.ok_or_else(|| unfit(key))?;
            Ok(match range {
                Some(range) => {
                    let flat = saved.f_contiguous()?.f_view(-1)?;
                    flat.f_narrow(0, range.start, range.end - range.start)?
                }
                None => saved.shallow_clone(),
            })
        })
    }

    /// `find` gives the tensor of a name and shape, or a stretch of it, flat.
    fn take_over(&mut self, steps: u64, find: &Find<'_>) -> Result<(), TrainError> {
        let copy = |from: Tensor, to: &Tensor| -> Result<(), TrainError> {
            Ok(tch::no_grad(|| to.shallow_clone().f_copy_(&from))?)
        };
        for (name, param) in &self.params {
            copy(find(&self.key("param", name), &param.size(), None)?, param)?;
        }
        for (name, old) in self.old.iter().flatten() {
            copy(find(&self.key("old", name), &old.size(), None)?, old)?;
        }
        let seated = self.seated()?;
        let mut moments = Tensors::new();
        for own in &seated.own {
            let name = &seated.gradient.layout().names()[own.param];
            let shape = seated.leaves[own.param].size();
            let range = (own.len != leaf_len(&shape)).then(|| own.from..own.from + own.len);
            for part in seated.optimiser.parts(&own.name) {
                let key = self.key("adamw", &format!("{name}.{part}"));
                moments.insert(format!("{}.{part}", own.name), find(&key, &shape, range.clone())?);
            }
            if let Some(average) = seated.ema.as_ref().and_then(|ema| ema.get(&own.name)) {
                copy(find(&self.key("ema", name), &shape, range)?, average)?;
            }
        }
        Ok(self.seated_mut()?.optimiser.load(steps, &moments)?)
    }

    fn key(&self, kind: &str, name: &str) -> String {
        format!("{}/{kind}/{name}", self.name)
    }
}

/// A saved tensor by its key and shape, or a stretch of its elements, flat.
type Find<'a> = dyn Fn(&str, &[i64], Option<Range<i64>>) -> Result<Tensor, TrainError> + 'a;

fn leaf_len(shape: &[i64]) -> i64 {
    shape.iter().product()
}

fn unfit(key: &str) -> TrainError {
    TrainError::Checkpoint(format!("`{key}` is missing or has another shape"))
}

fn standing(name: &str) -> TrainError {
    TrainError::Protocol(format!("the {name} branch has no place in a group yet"))
}
