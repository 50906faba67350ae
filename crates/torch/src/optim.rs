//! AdamW as PyTorch computes it, and clipping over the global norm.

use crate::{Tensors, ffi};
use tch::{Kind, TchError, Tensor};

/// What an optimiser step or its state got wrong.
#[derive(Debug, thiserror::Error)]
pub enum OptimError {
    /// Gradients and parameters have different names.
    #[error("`{0}` has a gradient but is no parameter of this optimiser")]
    Unknown(String),
    /// A parameter without a gradient.
    #[error("`{0}` has no gradient")]
    NoGradient(String),
    /// A tensor of another shape or element type than it should have.
    #[error("`{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Which.
        name: String,
        /// What was found.
        found: Vec<i64>,
        /// What was expected.
        expected: Vec<i64>,
    },
    /// A saved state without a tensor that it must have.
    #[error("the saved optimiser state has no `{0}`")]
    Missing(String),
    /// libtorch refused.
    #[error("libtorch: {0}")]
    Torch(String),
}

impl From<TchError> for OptimError {
    fn from(error: TchError) -> Self {
        OptimError::Torch(error.to_string())
    }
}

/// AdamW's constants (arXiv 1711.05101); the learning rate is given to each step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the gradient's running mean.
    pub beta1: f64,
    /// Decay of the squared gradient's running mean.
    pub beta2: f64,
    /// Added to the denominator, after the square root and the bias correction.
    pub eps: f64,
    /// Decoupled: each step first multiplies a parameter by `1 - lr * weight_decay`.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    /// PyTorch's defaults.
    fn default() -> Self {
        AdamWOptions { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-2 }
    }
}

struct Slot {
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    /// fp32 copy of a parameter that is kept in half precision.
    master: Option<Tensor>,
}

/// AdamW over named parameters: the operations of `torch.optim.adamw._single_tensor_adamw` in
/// their order, bit for bit. State is fp32; a bf16 or fp16 parameter has an fp32 master copy that
/// the steps accumulate in.
pub struct AdamW {
    options: AdamWOptions,
    steps: u64,
    slots: std::collections::BTreeMap<String, Slot>,
}

/// Suffixes of the state's tensors, after the parameter's name; PyTorch's names.
const EXP_AVG: &str = "exp_avg";
const EXP_AVG_SQ: &str = "exp_avg_sq";
const MASTER: &str = "master";

impl AdamW {
    /// A fresh state (zeros, no step taken) for `params`.
    ///
    /// # Errors
    /// When libtorch cannot allocate.
    pub fn new(options: AdamWOptions, params: &Tensors) -> Result<AdamW, OptimError> {
        let mut slots = std::collections::BTreeMap::new();
        for (name, param) in params {
            let zeros = || Tensor::f_zeros(param.size(), (state_kind(param), param.device()));
            let master =
                is_half(param).then(|| param.f_detach()?.f_to_kind(Kind::Float)).transpose()?;
            slots.insert(name.clone(), Slot { exp_avg: zeros()?, exp_avg_sq: zeros()?, master });
        }
        Ok(AdamW { options, steps: 0, slots })
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Says how many steps led to the state, which was written into [`state`](AdamW::state)'s tensors.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// The constants.
    pub fn options(&self) -> AdamWOptions {
        self.options
    }

    /// One step with learning rate `lr`, in place. `grads` has one gradient for each parameter.
    ///
    /// # Errors
    /// [`OptimError`] when names or shapes do not match; then nothing was changed.
    pub fn step(&mut self, lr: f64, params: &Tensors, grads: &Tensors) -> Result<(), OptimError> {
        self.check(params, grads)?;
        let count = i64::try_from(self.steps + 1).unwrap_or(i64::MAX);
        for (name, slot) in &mut self.slots {
            let (param, grad) = (&params[name], &grads[name]);
            let grad = grad.f_detach()?.f_to_kind(slot.exp_avg.kind())?;
            match &slot.master {
                Some(master) => {
                    apply(&self.options, lr, count, master, &grad, slot)?;
                    tch::no_grad(|| param.shallow_clone().f_copy_(master))?;
                }
                None => apply(&self.options, lr, count, &param.detach(), &grad, slot)?,
            }
        }
        self.steps += 1;
        Ok(())
    }

    fn check(&self, params: &Tensors, grads: &Tensors) -> Result<(), OptimError> {
        if let Some(name) = grads.keys().find(|name| !self.slots.contains_key(*name)) {
            return Err(OptimError::Unknown(name.clone()));
        }
        for (name, slot) in &self.slots {
            let param = params.get(name).ok_or_else(|| OptimError::Unknown(name.clone()))?;
            let grad = grads.get(name).ok_or_else(|| OptimError::NoGradient(name.clone()))?;
            for tensor in [param, grad] {
                same_shape(name, tensor, &slot.exp_avg)?;
            }
        }
        Ok(())
    }

    /// Suffixes of the state's tensors of a parameter.
    pub fn parts(&self, name: &str) -> &'static [&'static str] {
        match self.slots.get(name) {
            Some(Slot { master: Some(_), .. }) => &[EXP_AVG, EXP_AVG_SQ, MASTER],
            Some(_) => &[EXP_AVG, EXP_AVG_SQ],
            None => &[],
        }
    }

    /// The state as tensors `{parameter}.exp_avg`, `.exp_avg_sq` and, for half precision,
    /// `.master`; shared with the optimiser, so write or copy them before the next step
    /// or [`load`](AdamW::load).
    pub fn state(&self) -> Tensors {
        let mut state = Tensors::new();
        for (name, slot) in &self.slots {
            state.insert(format!("{name}.{EXP_AVG}"), slot.exp_avg.shallow_clone());
            state.insert(format!("{name}.{EXP_AVG_SQ}"), slot.exp_avg_sq.shallow_clone());
            if let Some(master) = &slot.master {
                state.insert(format!("{name}.{MASTER}"), master.shallow_clone());
            }
        }
        state
    }

    /// Takes over a saved state after `steps` steps; tensors it does not know are left alone.
    ///
    /// # Errors
    /// [`OptimError`] when a tensor is missing or has another shape; then nothing was changed.
    pub fn load(&mut self, steps: u64, state: &Tensors) -> Result<(), OptimError> {
        let own = self.state();
        for (key, own) in &own {
            let loaded = state.get(key).ok_or_else(|| OptimError::Missing(key.clone()))?;
            same_shape(key, loaded, own)?;
        }
        // In place, so that the state is in memory only twice meanwhile.
        for (key, mut own) in own {
            if let Some(loaded) = state.get(&key) {
                own.f_copy_(&loaded.f_detach()?)?;
            }
        }
        self.steps = steps;
        Ok(())
    }
}

fn is_half(param: &Tensor) -> bool {
    matches!(param.kind(), Kind::BFloat16 | Kind::Half)
}

fn state_kind(param: &Tensor) -> Kind {
    if is_half(param) { Kind::Float } else { param.kind() }
}

fn same_shape(name: &str, tensor: &Tensor, like: &Tensor) -> Result<(), OptimError> {
    let (found, expected) = (tensor.size(), like.size());
    if found == expected {
        return Ok(());
    }
    Err(OptimError::Shape { name: name.to_owned(), found, expected })
}

fn apply(
    options: &AdamWOptions,
    lr: f64,
    count: i64,
    param: &Tensor,
    grad: &Tensor,
    slot: &Slot,
) -> Result<(), OptimError> {
    // SAFETY: all four are live tensors of equal shape; the shim changes the parameter and the two
    // moments, which this optimiser's caller gave it to change.
    let status = unsafe {
        ffi::duet_adamw(
            ffi::raw(param),
            ffi::raw(grad),
            ffi::raw(&slot.exp_avg),
            ffi::raw(&slot.exp_avg_sq),
            lr,
            options.beta1,
            options.beta2,
            options.eps,
            options.weight_decay,
            count,
        )
    };
    if status < 0 { Err(OptimError::Torch(ffi::last_error())) } else { Ok(()) }
}

/// Scales all gradients, in place, so that their common L2 norm is at most `max_norm`, and gives
/// the norm before.
///
/// `torch.nn.utils.clip_grad_norm_`: norm of the tensors' norms, factor
/// `min(1, max_norm / (norm + 1e-6))`. Norms are taken in fp32. A norm that is not finite scales
/// nothing: the caller must give the step up.
///
/// # Errors
/// When libtorch refuses.
pub fn clip_grad_norm(grads: &Tensors, max_norm: f64) -> Result<f64, TchError> {
    let norms = grads
        .values()
        .map(|grad| grad.f_detach()?.f_to_kind(Kind::Float)?.f_norm())
        .collect::<Result<Vec<_>, _>>()?;
    if norms.is_empty() {
        return Ok(0.0);
    }
    let total = Tensor::f_stack(&norms, 0)?.f_norm()?;
    let norm = total.f_double_value(&[])?;
    if norm.is_finite() {
        let factor = (total + 1e-6).f_reciprocal()?.f_mul_scalar(max_norm)?.f_clamp_max(1.0)?;
        for grad in grads.values() {
            let mut grad = grad.detach();
            let _ = grad.f_mul_(&factor.f_to_kind(grad.kind())?)?;
        }
    }
    Ok(norm)
}
