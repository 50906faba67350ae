//! One token at a time: the language model's weights laid out for sampling, and its KV cache.

use crate::error::{ModelError, Result};
use crate::lm::{Layer, Lm, LmConfig};
use crate::nn::{Linear, attention, rms_norm};
use duet_torch::decode::{Frame, LayerWeights, StepCache, StepDecoder};
use tch::{Device, Kind, Tensor};

/// Models above this many parameters keep their weights as they are: fused copies would double
/// the memory and save little.
const FUSE_BELOW: i64 = 300_000_000;
/// Positions that the cache grows by.
const BLOCK: i64 = 64;

/// A weight as `x W + b` wants it, `[in, out]`, adapter merged in.
#[derive(Debug)]
struct Fused {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Fused {
    /// Several layers of one input, as one. With `copy`, laid out for few rows of input.
    fn of(layers: &[&Linear], copy: bool) -> Fused {
        let weights: Vec<Tensor> = layers.iter().map(|layer| layer.whole_weight()).collect();
        let biases: Vec<&Tensor> = layers.iter().filter_map(|layer| layer.bias.as_ref()).collect();
        let weight = match weights.as_slice() {
            [one] => one.tr(),
            many => Tensor::cat(many, 0).tr(),
        };
        let bias = match biases.as_slice() {
            [] => None,
            many => Some(Tensor::cat(many, 0).detach()),
        };
        let weight = if copy { weight.contiguous() } else { weight };
        Fused { weight, bias }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        match &self.bias {
            Some(bias) => bias.addmm(x, &self.weight),
            None => x.mm(&self.weight),
        }
    }
}

#[derive(Debug)]
struct Step {
    input_norm: Tensor,
    qkv: Vec<Fused>,
    out: Fused,
    post_norm: Tensor,
    gate_up: Vec<Fused>,
    down: Fused,
}

impl Step {
    fn new(layer: &Layer, fuse: bool) -> Step {
        let group = |layers: &[&Linear]| match fuse {
            true => vec![Fused::of(layers, true)],
            false => layers.iter().map(|layer| Fused::of(&[layer], false)).collect(),
        };
        Step {
            input_norm: layer.input_norm.detach(),
            qkv: group(&[&layer.q, &layer.k, &layer.v]),
            out: Fused::of(&[&layer.o], fuse),
            post_norm: layer.post_norm.detach(),
            gate_up: group(&[&layer.gate, &layer.up]),
            down: Fused::of(&[&layer.down], fuse),
        }
    }
}

/// The weights, adapters merged in, in the order of the fused kernels.
fn kernels(lm: &Lm) -> Result<StepDecoder> {
    let config = lm.config();
    let layers: Vec<LayerWeights> = lm
        .layers()
        .iter()
        .map(|layer| {
            let parts = [&layer.q, &layer.k, &layer.v];
            let biases: Vec<&Tensor> = parts.iter().filter_map(|part| part.bias.as_ref()).collect();
            LayerWeights {
                input_norm: layer.input_norm.detach(),
                qkv: Tensor::cat(&parts.map(Linear::whole_weight), 0),
                qkv_bias: (!biases.is_empty()).then(|| Tensor::cat(&biases, 0).detach()),
                out: layer.o.whole_weight(),
                post_norm: layer.post_norm.detach(),
                gate: layer.gate.whole_weight(),
                up: layer.up.whole_weight(),
                down: layer.down.whole_weight(),
            }
        })
        .collect();
    let frame = Frame {
        table: lm.embedding(),
        norm: lm.final_norm(),
        head: &lm.head().whole_weight(),
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        eps: config.rms_norm_eps,
    };
    StepDecoder::new(&layers, &frame).map_err(|e| ModelError::BadInput(e.to_string()))
}

/// `[.., parts]` of the input through every layer of a group.
fn apply(group: &[Fused], x: &Tensor) -> Tensor {
    match group {
        [one] => one.forward(x),
        many => Tensor::cat(&many.iter().map(|layer| layer.forward(x)).collect::<Vec<_>>(), -1),
    }
}

/// Keys and values of one layer, `[n, kv_heads, capacity, head_dim]` each.
#[derive(Debug)]
struct Slot {
    k: Tensor,
    v: Tensor,
}

/// The state of `n` sequences that are all equally long.
#[derive(Debug)]
pub struct Cache {
    slots: Vec<Slot>,
    length: i64,
    capacity: i64,
}

impl Cache {
    /// Positions filled.
    pub fn len(&self) -> i64 {
        self.length
    }

    /// Whether no position is filled.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Copies of the one sequence in it, for `n` sequences with room for `more` positions.
    pub fn fork(&self, n: i64, more: i64) -> Cache {
        let capacity = self.length + more.min(BLOCK);
        let widen = |x: &Tensor| grown(&x.expand([n, -1, -1, -1], false), self.length, capacity);
        let slots = self.slots.iter().map(|slot| Slot { k: widen(&slot.k), v: widen(&slot.v) });
        Cache { slots: slots.collect(), length: self.length, capacity }
    }

    /// Keeps the sequences `rows` and forgets the others.
    pub fn keep(&mut self, rows: &Tensor) {
        for slot in &mut self.slots {
            slot.k = slot.k.index_select(0, rows);
            slot.v = slot.v.index_select(0, rows);
        }
    }

    fn reserve(&mut self, positions: i64) {
        if self.length + positions <= self.capacity {
            return;
        }
        self.capacity = self.length + positions.max(BLOCK);
        for slot in &mut self.slots {
            slot.k = grown(&slot.k, self.length, self.capacity);
            slot.v = grown(&slot.v, self.length, self.capacity);
        }
    }
}

/// The first `length` positions of `x` in a tensor with room for `capacity`.
fn grown(x: &Tensor, length: i64, capacity: i64) -> Tensor {
    let mut shape = x.size();
    shape[2] = capacity;
    let out = Tensor::empty(shape.as_slice(), (x.kind(), x.device()));
    out.narrow(2, 0, length).copy_(&x.narrow(2, 0, length));
    out
}

/// The language model, laid out for sampling with one policy version. Make a new one after every
/// change of the weights.
#[derive(Debug)]
pub struct Decoder<'a> {
    lm: &'a Lm,
    config: &'a LmConfig,
    steps: Vec<Step>,
    norm: Tensor,
    head: Fused,
    /// The same in one call of fused kernels, where there are such (small fp32 models on the CPU);
    /// then `steps` serve for prompts only.
    kernels: Option<StepDecoder>,
}

impl<'a> Decoder<'a> {
    /// Lays the weights out; adapters that are on are merged in.
    pub fn new(lm: &'a Lm) -> Result<Decoder<'a>> {
        let config = lm.config();
        let small = lm.params().numel() < FUSE_BELOW;
        let plain = lm.device() == Device::Cpu && lm.embedding().kind() == Kind::Float;
        tch::no_grad(|| {
            let fits = small && plain && config.head_dim() % 8 == 0;
            let kernels = fits.then(|| kernels(lm)).transpose()?;
            Ok(Decoder { kernels, ..Decoder::of_operations(lm, small && !fits) })
        })
    }

    /// As [`Decoder::new`], of libtorch's operations alone: what other devices run.
    pub fn plain(lm: &'a Lm) -> Decoder<'a> {
        tch::no_grad(|| Decoder::of_operations(lm, lm.params().numel() < FUSE_BELOW))
    }

    fn of_operations(lm: &'a Lm, fuse: bool) -> Decoder<'a> {
        Decoder {
            lm,
            config: lm.config(),
            steps: lm.layers().iter().map(|layer| Step::new(layer, fuse)).collect(),
            norm: lm.final_norm().detach(),
            head: Fused::of(&[lm.head()], fuse),
            kernels: None,
        }
    }

    /// The model.
    pub fn lm(&self) -> &Lm {
        self.lm
    }

    /// An empty cache for one sequence.
    pub fn cache(&self) -> Cache {
        let config = self.config;
        let shape = [1, config.num_key_value_heads, 0, config.head_dim()];
        let options = (self.norm.kind(), self.norm.device());
        let slots = self
            .steps
            .iter()
            .map(|_| Slot { k: Tensor::empty(shape, options), v: Tensor::empty(shape, options) });
        Cache { slots: slots.collect(), length: 0, capacity: 0 }
    }

    /// Feeds tokens `[n, T]` (T is 1 once the prompt is in) and gives the logits after the last
    /// one, `[n, V]` fp32.
    ///
    /// # Errors
    /// When the cache was not made for this model.
    pub fn advance(&self, tokens: &Tensor, cache: &mut Cache) -> Result<Tensor> {
        tch::no_grad(|| {
            let (n, length) = (tokens.size()[0], tokens.size()[1]);
            cache.reserve(length);
            if let (Some(kernels), 1) = (&self.kernels, length) {
                let rotation = self.lm.rotation(cache.length, 1);
                let state = StepCache {
                    keys: cache.slots.iter().map(|slot| &slot.k).collect(),
                    values: cache.slots.iter().map(|slot| &slot.v).collect(),
                    length: cache.length,
                };
                let tokens = Vec::<i64>::try_from(tokens.reshape([n]))?;
                let logits = kernels.step(&tokens, &state, (&rotation.cos, &rotation.sin));
                let logits = logits.map_err(|e| ModelError::BadInput(e.to_string()))?;
                cache.length += 1;
                return Ok(logits);
            }
            let rows = tokens.reshape([n * length]);
            let mut x = self.lm.embed(&rows);
            let rotation = self.lm.rotation(cache.length, length);
            // [T, 1, D]: heads come after positions here.
            let turn = (rotation.cos.unsqueeze(1), rotation.sin.unsqueeze(1));
            let eps = self.config.rms_norm_eps;
            let half = self.config.intermediate_size;
            for (step, slot) in self.steps.iter().zip(&cache.slots) {
                let qkv = apply(&step.qkv, &rms_norm(&x, &step.input_norm, eps));
                let attended = self.attend(&qkv, &turn, slot, cache.length, (n, length));
                x += step.out.forward(&attended);
                let inner = apply(&step.gate_up, &rms_norm(&x, &step.post_norm, eps));
                let gated = inner.narrow(1, 0, half).silu() * inner.narrow(1, half, half);
                x += step.down.forward(&gated);
            }
            cache.length += length;
            let last = x.view([n, length, -1]).select(1, length - 1);
            let last = rms_norm(&last, &self.norm, eps);
            Ok(self.head.forward(&last).to_kind(Kind::Float))
        })
    }

    /// `[n T, (heads + 2 kv_heads) D]` to `[n T, heads D]`; the new keys and values go into the cache.
    fn attend(
        &self,
        qkv: &Tensor,
        (cos, sin): &(Tensor, Tensor),
        slot: &Slot,
        at: i64,
        (n, length): (i64, i64),
    ) -> Tensor {
        let config = self.config;
        let (heads, kv, d) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim());
        let split = qkv.view([n, length, heads + 2 * kv, d]);
        let turned = split.narrow(2, 0, heads + kv);
        let turned = (&turned * cos).addcmul(&turned.roll([d / 2], [3]), sin);
        let (mut k_at, mut v_at) = (slot.k.narrow(2, at, length), slot.v.narrow(2, at, length));
        k_at.copy_(&turned.narrow(2, heads, kv).transpose(1, 2));
        v_at.copy_(&split.narrow(2, heads + kv, kv).transpose(1, 2));
        let end = at + length;
        let (k, v) = (slot.k.narrow(2, 0, end), slot.v.narrow(2, 0, end));
        let q = turned.narrow(2, 0, heads);
        if length == 1 {
            // Query heads of one key head act as its queries: no key is repeated.
            let q = q.reshape([n, kv, heads / kv, d]);
            return attention(&q, &k, &v, None, false).reshape([n, heads * d]);
        }
        let seen = (at > 0).then(|| Tensor::ones([length, end], (Kind::Bool, q.device())).tril(at));
        let out = attention(&q.transpose(1, 2), &k, &v, seen.as_ref(), at == 0);
        out.transpose(1, 2).reshape([n * length, heads * d])
    }
}
