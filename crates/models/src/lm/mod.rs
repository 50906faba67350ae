//! The language model of Qwen2.5-VL (transformers `modeling_qwen2_5_vl.py`): pre-norm decoder with
//! grouped-query attention, biases on q, k and v only, half-rotation RoPE, SwiGLU, RMS norms.
//!
//! For text the three M-RoPE position rows agree, so RoPE is the ordinary one.

mod config;
mod layer;
mod rope;

pub use config::{LmConfig, SpecialIds};
pub use layer::{Layer, Rotation};

use crate::error::Result;
use crate::nn::{Linear, fetch, rms_norm};
use crate::params::{Init, ParamSet, ParamSpec};
use duet_core::Seed;
use rope::RopeTable;
use tch::{Kind, Tensor};

/// How the checkpoint names the language model's tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// `model.layers.N…`, `visual.…`: files written before transformers 4.52, and what
    /// transformers still writes to disk.
    #[default]
    Flat,
    /// `model.language_model.layers.N…`, `model.visual.…`.
    Nested,
}

impl Layout {
    /// What the names begin with.
    pub fn prefix(&self) -> &'static str {
        match self {
            Layout::Flat => "model.",
            Layout::Nested => "model.language_model.",
        }
    }

    /// The layout of a checkpoint with these tensor names.
    pub fn of<'a>(mut names: impl Iterator<Item = &'a str>) -> Layout {
        match names.any(|name| name.starts_with(Layout::Nested.prefix())) {
            true => Layout::Nested,
            false => Layout::Flat,
        }
    }
}

/// The language model, ready to run.
#[derive(Debug)]
pub struct Lm {
    config: LmConfig,
    layout: Layout,
    params: ParamSet,
    embed: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Linear,
    rope: RopeTable,
    recompute: bool,
}

impl Lm {
    /// Every parameter that `config` calls for.
    pub fn specs(config: &LmConfig, layout: Layout) -> Vec<ParamSpec> {
        let prefix = layout.prefix();
        let mut out = Vec::new();
        let table = [config.vocab_size, config.hidden_size];
        out.push(ParamSpec::new(format!("{prefix}embed_tokens.weight"), &table, INIT));
        for index in 0..config.num_hidden_layers {
            Layer::specs(&mut out, config, &format!("{prefix}layers.{index}"));
        }
        out.push(ParamSpec::new(format!("{prefix}norm.weight"), &table[1..], Init::Ones));
        if !config.tie_word_embeddings {
            out.push(ParamSpec::new("lm_head.weight", &table, INIT));
        }
        out
    }

    /// Builds the model on parameters that it then owns. Tensors it does not know are an error of
    /// the caller, who keeps them apart ([`crate::pipeline`] does).
    pub fn new(config: LmConfig, params: ParamSet, origin: &str) -> Result<Lm> {
        let layout = Layout::of(params.names());
        params.check(&Lm::specs(&config, layout), origin)?;
        let prefix = layout.prefix();
        let embed = fetch(&params, &format!("{prefix}embed_tokens.weight"))?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::load(&params, &config, &format!("{prefix}layers.{index}")))
            .collect::<Result<_>>()?;
        let head = match config.tie_word_embeddings {
            true => Linear {
                name: "lm_head".to_owned(),
                weight: embed.shallow_clone(),
                bias: None,
                adapter: None,
                packed: None,
            },
            false => Linear::load(&params, "lm_head")?,
        };
        let rope = RopeTable::new(&config, embed.device(), embed.kind());
        let norm = fetch(&params, &format!("{prefix}norm.weight"))?;
        Ok(Lm { config, layout, params, embed, layers, norm, head, rope, recompute: false })
    }

    /// A model with random weights (normal 0.02, as transformers initialises it).
    pub fn init(config: LmConfig, seed: &Seed) -> Result<Lm> {
        let params = ParamSet::init(&Lm::specs(&config, Layout::default()), seed);
        Lm::new(config, params, "a new language model")
    }

    /// Its config.
    pub fn config(&self) -> &LmConfig {
        &self.config
    }

    /// The device that its weights are on.
    pub fn device(&self) -> tch::Device {
        self.embed.device()
    }

    /// How its tensors are named.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Its parameters, by checkpoint name.
    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    /// Its decoder layers, in order.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The embedding table `[V, D]`.
    pub fn embedding(&self) -> &Tensor {
        &self.embed
    }

    /// The weight of the final norm `[D]`.
    pub fn final_norm(&self) -> &Tensor {
        &self.norm
    }

    /// The output layer (for tied models it holds the embedding table).
    pub fn head(&self) -> &Linear {
        &self.head
    }

    /// Whether the backward pass of [`crate::logprob::token_log_probs`] computes each layer's
    /// activations again instead of keeping them. Costs one more forward pass; no number changes.
    pub fn set_recompute(&mut self, on: bool) {
        self.recompute = on;
    }

    /// What [`Lm::set_recompute`] said.
    pub fn recomputes(&self) -> bool {
        self.recompute
    }

    /// Every linear layer, for adapters.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let head = (!self.config.tie_word_embeddings).then_some(&mut self.head);
        self.layers.iter_mut().flat_map(Layer::linears_mut).chain(head).collect()
    }

    /// Rotations of positions `start..start + len`.
    pub fn rotation(&self, start: i64, len: i64) -> Rotation {
        self.rope.range(start, len)
    }

    /// Embeddings of tokens: `[B, T]` i64 to `[B, T, D]`.
    pub fn embed(&self, tokens: &Tensor) -> Tensor {
        Tensor::embedding(&self.embed, tokens, -1, false, false)
    }

    /// Last hidden states, after the final norm: `[B, T]` i64 to `[B, T, D]`.
    ///
    /// `mask` is `[B, T]` bool, true at real tokens. Right padding needs none: causality keeps it
    /// from the tokens before it. With a mask, positions count real tokens only, so left and right
    /// padding give the same states. What comes out at padding means nothing.
    pub fn hidden(&self, tokens: &Tensor, mask: Option<&Tensor>) -> Tensor {
        let length = tokens.size()[1];
        let mut x = self.embed(tokens);
        let (rotation, allowed) = match mask {
            None => (self.rope.range(0, length), None),
            Some(mask) => {
                let mask = mask.to_kind(Kind::Bool);
                let positions = mask.to_kind(Kind::Int64).cumsum(1, Kind::Int64) - 1;
                let positions = positions.clamp_min(0);
                let square = (length, length);
                let ones = Tensor::ones([square.0, square.1], (Kind::Bool, tokens.device()));
                let eye = Tensor::eye(length, (Kind::Bool, tokens.device()));
                let keys = mask.unsqueeze(1).unsqueeze(1).logical_and(&ones.tril(0));
                (self.rope.at(&positions), Some(keys.logical_or(&eye)))
            }
        };
        for layer in &self.layers {
            x = layer.forward(&x, &rotation, allowed.as_ref());
        }
        rms_norm(&x, &self.norm, self.config.rms_norm_eps)
    }

    /// Last hidden states of several texts that lie one behind the other in one row: tokens `[T]`,
    /// `lengths` adding up to T, to `[T, D]`. Each text has positions of its own and sees itself
    /// alone, as if it were computed by itself.
    pub fn hidden_packed(&self, tokens: &Tensor, lengths: &[i64]) -> Tensor {
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let whole = self.rope.range(0, longest);
        let lay = |table: &Tensor| {
            let parts: Vec<Tensor> = lengths.iter().map(|n| table.narrow(0, 0, *n)).collect();
            Tensor::cat(&parts, 0)
        };
        let rotation = Rotation { cos: lay(&whole.cos), sin: lay(&whole.sin) };
        // One text needs no mask: causality is enough, and has a faster kernel.
        let allowed = (lengths.len() > 1).then(|| {
            let device = tokens.device();
            let blocks: Vec<Tensor> = lengths
                .iter()
                .map(|n| Tensor::ones([*n, *n], (Kind::Bool, device)).tril(0))
                .collect();
            Tensor::block_diag(&blocks).to_kind(Kind::Bool).unsqueeze(0).unsqueeze(0)
        });
        let mut x = self.embed(&tokens.unsqueeze(0));
        for layer in &self.layers {
            x = layer.forward(&x, &rotation, allowed.as_ref());
        }
        rms_norm(&x.squeeze_dim(0), &self.norm, self.config.rms_norm_eps)
    }

    /// Logits of hidden states, in the model's dtype: `[.., D]` to `[.., V]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        self.head.forward(hidden)
    }
}

/// transformers' initialiser of linear layers and embeddings.
const INIT: Init = Init::Normal(0.02);
