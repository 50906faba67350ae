//! The optimiser loop that every part of the bootstrap shares.

use crate::error::{Result, WorldError};
use duet_torch::Tensors;
use duet_torch::optim::{AdamW, AdamWOptions, clip_grad_norm};
use tch::Tensor;

/// AdamW on a set of parameters with a warm-up and a cosine to a tenth.
pub struct Learner {
    params: Tensors,
    adam: AdamW,
    plan: Plan,
    step: usize,
}

/// How long and how fast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// What is trained, for messages.
    pub phase: &'static str,
    /// Optimiser steps.
    pub steps: usize,
    /// Samples (or sequences) per step.
    pub batch: usize,
    /// Highest learning rate.
    pub lr: f64,
}

/// Bound on the gradient's global norm.
const CLIP: f64 = 1.0;

impl Learner {
    /// A learner for `params`, which it switches to training.
    ///
    /// # Errors
    /// libtorch refuses to make the optimiser's state.
    pub fn new(params: Tensors, plan: Plan) -> Result<Learner> {
        for param in params.values() {
            let _ = param.set_requires_grad(true);
        }
        let options = AdamWOptions { beta2: 0.99, weight_decay: 0.01, ..AdamWOptions::default() };
        let adam = AdamW::new(options, &params)?;
        Ok(Learner { params, adam, plan, step: 0 })
    }

    /// The learning rate of the next step.
    fn lr(&self) -> f64 {
        let (step, steps) = (self.step as f64, self.plan.steps.max(1) as f64);
        let warm = (steps * 0.05).max(1.0);
        let cosine = 0.55 + 0.45 * (std::f64::consts::PI * step / steps).cos();
        self.plan.lr * ((step + 1.0) / warm).min(1.0) * cosine
    }

    /// One step down the gradient of a scalar loss, which is returned.
    ///
    /// # Errors
    /// The loss is not finite, or libtorch refuses.
    pub fn step(&mut self, loss: &Tensor) -> Result<f64> {
        let value = loss.double_value(&[]);
        loss.f_backward()?;
        let grads = gradients(&self.params);
        self.apply(value, &grads)
    }

    /// One step along given gradients of a loss of that value, which is returned.
    ///
    /// # Errors
    /// As [`Learner::step`].
    pub fn apply(&mut self, loss: f64, grads: &Tensors) -> Result<f64> {
        if !loss.is_finite() {
            return Err(WorldError::NotFinite { phase: self.plan.phase, step: self.step });
        }
        clip_grad_norm(grads, CLIP)?;
        self.adam.step(self.lr(), &self.params, grads)?;
        forget(&self.params);
        self.step += 1;
        Ok(loss)
    }

    /// Switches the parameters back from training.
    pub fn finish(self) {
        for param in self.params.values() {
            let _ = param.set_requires_grad(false);
        }
    }
}

/// What the last backward pass left at each parameter; zero where the loss does not depend on it.
pub fn gradients(params: &Tensors) -> Tensors {
    let of = |param: &Tensor| {
        let grad = param.grad();
        if grad.defined() { grad.detach() } else { param.zeros_like() }
    };
    params.iter().map(|(name, param)| (name.clone(), of(param))).collect()
}

/// Clears the gradients of all parameters.
pub fn forget(params: &Tensors) {
    for param in params.values() {
        param.shallow_clone().zero_grad();
    }
}
