//! One decoder layer.

use super::config::LmConfig;
use crate::error::Result;
use crate::nn::{Linear, attention, fetch, rms_norm};
use crate::params::{Init, ParamSet, ParamSpec};
use tch::Tensor;

/// Cosines and sines of a run of positions, broadcastable over `[B, H, T, D]`.
#[derive(Debug)]
pub struct Rotation {
    /// cos.
    pub cos: Tensor,
    /// sin, its first half negated.
    pub sin: Tensor,
}

impl Rotation {
    /// Handles to the same tables.
    pub(crate) fn share(&self) -> Rotation {
        Rotation { cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone() }
    }

    /// Rotates `[B, H, T, D]`: `x cos + cat(-x2, x1) sin`.
    pub fn apply(&self, x: &Tensor) -> Tensor {
        let half = x.size()[3] / 2;
        (x * &self.cos).addcmul(&x.roll([half], [3]), &self.sin)
    }
}

/// A decoder layer: attention and SwiGLU, each after an RMS norm, each added to the stream.
#[derive(Debug)]
pub struct Layer {
    pub(crate) input_norm: Tensor,
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    pub(crate) o: Linear,
    pub(crate) post_norm: Tensor,
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    eps: f64,
}

impl Layer {
    pub(super) fn specs(out: &mut Vec<ParamSpec>, config: &LmConfig, name: &str) {
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let kv = config.num_key_value_heads * config.head_dim();
        let init = Init::Normal(0.02);
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            out.push(ParamSpec::new(format!("{name}.{norm}.weight"), &[d], Init::Ones));
        }
        for (layer, size, bias) in [
            ("self_attn.q_proj", (d, d), true),
            ("self_attn.k_proj", (d, kv), true),
            ("self_attn.v_proj", (d, kv), true),
            ("self_attn.o_proj", (d, d), false),
            ("mlp.gate_proj", (d, f), false),
            ("mlp.up_proj", (d, f), false),
            ("mlp.down_proj", (f, d), false),
        ] {
            Linear::specs(out, &format!("{name}.{layer}"), size, bias, init);
        }
    }

    pub(super) fn load(params: &ParamSet, config: &LmConfig, name: &str) -> Result<Layer> {
        let linear = |layer: &str| Linear::load(params, &format!("{name}.{layer}"));
        Ok(Layer {
            input_norm: fetch(params, &format!("{name}.input_layernorm.weight"))?,
            q: linear("self_attn.q_proj")?,
            k: linear("self_attn.k_proj")?,
            v: linear("self_attn.v_proj")?,
            o: linear("self_attn.o_proj")?,
            post_norm: fetch(params, &format!("{name}.post_attention_layernorm.weight"))?,
            gate: linear("mlp.gate_proj")?,
            up: linear("mlp.up_proj")?,
            down: linear("mlp.down_proj")?,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim(),
            eps: config.rms_norm_eps,
        })
    }

    /// Everything in it that may be trained.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let layers = [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down];
        let norms = [&self.input_norm, &self.post_norm];
        layers.into_iter().flat_map(Linear::tensors).chain(norms)
    }

    /// The same layer: handles to the same tensors.
    pub(crate) fn share(&self) -> Layer {
        Layer {
            input_norm: self.input_norm.shallow_clone(),
            q: self.q.share(),
            k: self.k.share(),
            v: self.v.share(),
            o: self.o.share(),
            post_norm: self.post_norm.shallow_clone(),
            gate: self.gate.share(),
            up: self.up.share(),
            down: self.down.share(),
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            eps: self.eps,
        }
    }

    pub(super) fn linears_mut(&mut self) -> [&mut Linear; 7] {
        [
            &mut self.q,
            &mut self.k,
            &mut self.v,
            &mut self.o,
            &mut self.gate,
            &mut self.up,
            &mut self.down,
        ]
    }

    /// Queries, keys (both rotated) and values of the normed input: `[B, T, D]` to
    /// `[B, heads, T, head_dim]`, fewer heads for keys and values.
    pub fn project(&self, x: &Tensor, rotation: &Rotation) -> (Tensor, Tensor, Tensor) {
        let (batch, length) = (x.size()[0], x.size()[1]);
        let split =
            |y: Tensor, heads: i64| y.view([batch, length, heads, self.head_dim]).transpose(1, 2);
        let normed = rms_norm(x, &self.input_norm, self.eps);
        let q = split(self.q.forward(&normed), self.heads);
        let k = split(self.k.forward(&normed), self.kv_heads);
        let v = split(self.v.forward(&normed), self.kv_heads);
        (rotation.apply(&q), rotation.apply(&k), v)
    }

    /// What follows attention: output projection, residual, SwiGLU, residual. `attended` is
    /// `[B, heads, T, head_dim]`.
    pub fn finish(&self, x: &Tensor, attended: &Tensor) -> Tensor {
        let x = x + self.o.forward(&attended.transpose(1, 2).flatten(2, 3));
        let normed = rms_norm(&x, &self.post_norm, self.eps);
        let inner = self.gate.forward(&normed).silu() * self.up.forward(&normed);
        x + self.down.forward(&inner)
    }

    /// The whole layer over a sequence, causal; `allowed` `[B, 1, T, T]` overrides the triangle.
    pub fn forward(&self, x: &Tensor, rotation: &Rotation, allowed: Option<&Tensor>) -> Tensor {
        let (q, k, v) = self.project(x, rotation);
        self.finish(x, &attention(&q, &k, &v, allowed, allowed.is_none()))
    }
}
