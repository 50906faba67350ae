//! The few layers that all three models are made of.

use crate::error::{ModelError, Result};
use crate::params::{Init, ParamSet, ParamSpec};
use duet_torch::Panels;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tch::{Device, Kind, Tensor};

/// A low-rank addition to a linear layer: `y += scale * x A' B'` (LoRA, arXiv 2106.09685).
#[derive(Debug)]
pub struct Adapter {
    /// `[rank, in]`.
    pub a: Tensor,
    /// `[out, rank]`.
    pub b: Tensor,
    /// alpha / rank.
    pub scale: f64,
    /// Shared switch: off gives the reference policy.
    pub on: Arc<AtomicBool>,
}

/// `y = x W' + b`, with an optional adapter.
#[derive(Debug)]
pub struct Linear {
    /// Name of the layer in the checkpoint, without `.weight`.
    pub name: String,
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
    /// LoRA, if this layer has one.
    pub adapter: Option<Adapter>,
    /// The layer as it acts, laid out for sampling without gradient.
    pub(crate) packed: Option<Panels>,
}

impl Linear {
    /// The layer called `name`: `{name}.weight` and, if there, `{name}.bias`.
    pub fn load(params: &ParamSet, name: &str) -> Result<Linear> {
        Ok(Linear {
            name: name.to_owned(),
            weight: fetch(params, &format!("{name}.weight"))?,
            bias: params.get(&format!("{name}.bias")).map(Tensor::shallow_clone),
            adapter: None,
            packed: None,
        })
    }

    /// Everything in it that may be trained.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let adapter = self.adapter.iter().flat_map(|adapter| [&adapter.a, &adapter.b]);
        [&self.weight].into_iter().chain(&self.bias).chain(adapter)
    }

    /// The same layer: handles to the same tensors and the same switch.
    pub(crate) fn share(&self) -> Linear {
        let adapter = self.adapter.as_ref().map(|adapter| Adapter {
            a: adapter.a.shallow_clone(),
            b: adapter.b.shallow_clone(),
            scale: adapter.scale,
            on: Arc::clone(&adapter.on),
        });
        Linear {
            name: self.name.clone(),
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            adapter,
            packed: self.packed.as_ref().map(Panels::share),
        }
    }

    /// Whether an adapter is on.
    pub(crate) fn adapts(&self) -> bool {
        self.adapter.as_ref().is_some_and(|adapter| adapter.on.load(Ordering::Relaxed))
    }

    /// The weight that the layer acts with, without gradient: a copy where an adapter is on.
    pub(crate) fn whole_weight(&self) -> Tensor {
        let weight = self.weight.detach();
        match &self.adapter {
            Some(adapter) if adapter.on.load(Ordering::Relaxed) => tch::no_grad(|| {
                let delta = adapter.b.matmul(&adapter.a) * adapter.scale;
                (weight.to_kind(Kind::Float) + delta).to_kind(weight.kind())
            }),
            _ => weight,
        }
    }

    /// The same layer for sampling, with [`Linear::whole_weight`] for its weight: on the CPU in fp32 laid
    /// out for the product.
    pub(crate) fn folded(&self) -> Result<Linear> {
        let whole = self.whole_weight();
        let bias = self.bias.as_ref().map(Tensor::detach);
        let plain = whole.device() == Device::Cpu && whole.kind() == Kind::Float;
        let packed = plain.then(|| Panels::new(&whole, bias.as_ref())).transpose()?;
        Ok(Linear { name: self.name.clone(), weight: whole, bias, adapter: None, packed })
    }

    /// Applies it over the last dimension.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        // What panels refuse, a mistaken shape or dtype, libtorch refuses below in its own words; the weight
        // there is the whole one as well, so it can never be another policy.
        if let Some(Ok(y)) = self.packed.as_ref().map(|packed| packed.apply(x)) {
            return y;
        }
        let y = x.linear(&self.weight, self.bias.as_ref());
        match &self.adapter {
            Some(adapter) if adapter.on.load(Ordering::Relaxed) => {
                crate::lora::add_low_rank(adapter, x, y)
            }
            _ => y,
        }
    }

    /// Specs of a linear layer's parameters.
    pub fn specs(out: &mut Vec<ParamSpec>, name: &str, size: (i64, i64), bias: bool, init: Init) {
        out.push(ParamSpec::new(format!("{name}.weight"), &[size.1, size.0], init));
        if bias {
            out.push(ParamSpec::new(format!("{name}.bias"), &[size.1], Init::Zeros));
        }
    }
}

/// A handle to a tensor that `ParamSet::check` has vouched for.
pub(crate) fn fetch(params: &ParamSet, name: &str) -> Result<Tensor> {
    params.get(name).map(Tensor::shallow_clone).ok_or_else(|| ModelError::MissingTensor {
        origin: "model".to_owned(),
        name: name.to_owned(),
        shape: Vec::new(),
    })
}

/// RMS norm over the last dimension, accumulated in fp32 whatever the dtype:
/// `x * rsqrt(mean(x^2) + eps) * weight`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    x.rms_norm(weight.size(), Some(weight), eps)
}

/// Attention through libtorch's fused kernels; `[B, H, T, D]` each, key and value heads may be fewer
/// (grouped queries). A bool mask is true where a key may be seen.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
) -> Tensor {
    let (heads, kv_heads) = (q.size()[1], k.size()[1]);
    // CUDA's fused kernels take fewer key heads or a mask, not both: without this, all weights
    // [B, H, T, T] would be laid out and kept.
    if heads != kv_heads && mask.is_some() && q.device().is_cuda() {
        let whole = |x: &Tensor| x.repeat_interleave_self_int(heads / kv_heads, 1, None);
        let (k, v) = (whole(k), whole(v));
        return Tensor::scaled_dot_product_attention(q, &k, &v, mask, 0.0, causal, None, false);
    }
    let grouped = heads != kv_heads;
    Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None, grouped)
}
