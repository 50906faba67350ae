//! The Qwen-Image diffusion transformer (diffusers >= 0.37 `QwenImageTransformer2DModel`, where
//! padded text is masked): text and image streams with their own weights, joint attention over
//! `[text, image]`, adaptive layer norms driven by the time.

mod block;
mod config;
pub mod rope;
pub mod time;

pub use block::Block;
pub use config::DitConfig;

use crate::error::{ModelError, Result};
use crate::nn::{Linear, fetch, rms_norm};
use crate::params::{Init, ParamSet, ParamSpec};
use block::{BlockMods, EPS, Part, Shared, modulated_norm};
use duet_core::Seed;
use tch::{Device, Kind, Tensor};
use time::TimeEmbedding;

/// Text that conditions a batch, taken through the input layers once and used in every step.
#[derive(Debug)]
pub struct Text {
    /// `[B, T, D]`, already of the transformer's width.
    hidden: Tensor,
    /// `[B, T]` bool; `None`: no padding.
    mask: Option<Tensor>,
}

impl Text {
    /// The same text for each of `batch` samples, when it is one text.
    pub fn expand(&self, batch: i64) -> Text {
        let wide = |x: &Tensor, rest: &[i64]| x.expand([&[batch], rest].concat(), false);
        Text {
            hidden: wide(&self.hidden, &[-1, -1]),
            mask: self.mask.as_ref().map(|mask| wide(mask, &[-1])),
        }
    }
}

/// Modulations of all blocks for a list of times, computed once for a whole schedule.
#[derive(Debug)]
pub struct Mods {
    blocks: Vec<BlockMods>,
    /// Shift and (1 + scale) of the output norm, each `[N, D]`.
    out: (Tensor, Tensor),
    times: i64,
}

/// Positions of a batch: rotations of text and image tokens.
#[derive(Debug)]
pub struct Positions {
    rotations: Tensor,
    grid: (i64, i64),
    text: i64,
}

impl Positions {
    fn part(&self, keys: Option<Tensor>) -> Part {
        Part { rotations: self.rotations.shallow_clone(), keys, text: self.text }
    }
}

/// Adapters are folded into copies of the weights below this many parameters; above, the copies
/// would cost more memory than they save time.
const FOLD_BELOW: i64 = 300_000_000;

/// The transformer, ready to run.
#[derive(Debug)]
pub struct Dit {
    config: DitConfig,
    params: ParamSet,
    img_in: Linear,
    txt_norm: Tensor,
    txt_in: Linear,
    time: TimeEmbedding,
    blocks: Vec<Block>,
    norm_out: Linear,
    proj_out: Linear,
    recompute: bool,
}

impl Dit {
    /// Every parameter that `config` calls for. Modulations and the output layer start at zero.
    pub fn specs(config: &DitConfig) -> Vec<ParamSpec> {
        let d = config.inner_dim();
        let joint = config.joint_attention_dim;
        let patch = config.patch_size * config.patch_size * config.out_channels;
        let mut out = Vec::new();
        Linear::specs(&mut out, "img_in", (config.in_channels, d), true, Init::Xavier);
        out.push(ParamSpec::new("txt_norm.weight", &[joint], Init::Ones));
        Linear::specs(&mut out, "txt_in", (joint, d), true, Init::Xavier);
        TimeEmbedding::specs(&mut out, config);
        for index in 0..config.num_layers {
            Block::specs(&mut out, config, &format!("transformer_blocks.{index}"));
        }
        Linear::specs(&mut out, "norm_out.linear", (d, 2 * d), true, Init::Zeros);
        Linear::specs(&mut out, "proj_out", (d, patch), true, Init::Zeros);
        out
    }

    /// Builds the model on parameters that it then owns.
    pub fn new(config: DitConfig, params: ParamSet, origin: &str) -> Result<Dit> {
        params.check(&Dit::specs(&config), origin)?;
        let blocks = (0..config.num_layers)
            .map(|index| Block::load(&params, &config, &format!("transformer_blocks.{index}")))
            .collect::<Result<_>>()?;
        Ok(Dit {
            img_in: Linear::load(&params, "img_in")?,
            txt_norm: fetch(&params, "txt_norm.weight")?,
            txt_in: Linear::load(&params, "txt_in")?,
            time: TimeEmbedding::load(&params)?,
            norm_out: Linear::load(&params, "norm_out.linear")?,
            proj_out: Linear::load(&params, "proj_out")?,
            config,
            params,
            blocks,
            recompute: false,
        })
    }

    /// A model with random weights; it predicts zero until it is trained.
    pub fn init(config: DitConfig, seed: &Seed) -> Result<Dit> {
        let params = ParamSet::init(&Dit::specs(&config), seed);
        Dit::new(config, params, "a new transformer")
    }

    /// Its config.
    pub fn config(&self) -> &DitConfig {
        &self.config
    }

    /// Its parameters, by checkpoint name.
    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    /// The device that its weights are on.
    pub fn device(&self) -> Device {
        self.img_in.weight.device()
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.img_in.weight.kind()
    }

    /// The same policy, up to rounding, quicker to sample with: adapters are added to copies of the
    /// weights, which are laid out for the product on the CPU in fp32. `None` where that gains nothing, or
    /// the model is large. No gradients.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn folded(&self) -> Result<Option<Dit>> {
        let around = [&self.img_in, &self.txt_in, &self.norm_out, &self.proj_out];
        let around = around.into_iter().chain([&self.time.first, &self.time.second]);
        let adapted = around.chain(self.blocks.iter().flat_map(Block::linears)).any(Linear::adapts);
        let plain = self.device() == Device::Cpu && self.kind() == Kind::Float;
        if !(adapted || plain) || self.params.numel() >= FOLD_BELOW {
            return Ok(None);
        }
        let (first, second) = (self.time.first.folded()?, self.time.second.folded()?);
        Ok(Some(Dit {
            config: self.config.clone(),
            params: ParamSet::new(),
            img_in: self.img_in.folded()?,
            txt_norm: self.txt_norm.shallow_clone(),
            txt_in: self.txt_in.folded()?,
            time: TimeEmbedding { first, second },
            blocks: self.blocks.iter().map(Block::folded).collect::<Result<_>>()?,
            norm_out: self.norm_out.folded()?,
            proj_out: self.proj_out.folded()?,
            recompute: false,
        }))
    }

    /// Whether the backward pass computes each block's activations again instead of keeping them.
    /// Costs one more forward pass; no number changes.
    pub fn set_recompute(&mut self, on: bool) {
        self.recompute = on;
    }

    /// Every linear layer, for adapters.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = vec![
            &mut self.img_in,
            &mut self.txt_in,
            &mut self.time.first,
            &mut self.time.second,
            &mut self.norm_out,
            &mut self.proj_out,
        ];
        all.extend(self.blocks.iter_mut().flat_map(Block::linears_mut));
        all
    }

    /// Text embeddings `[B, T, joint]` through norm and input layer. `mask` `[B, T]` is true at
    /// real tokens; it is dropped when it is all true, as diffusers does.
    pub fn text(&self, embeds: &Tensor, mask: Option<&Tensor>) -> Result<Text> {
        let size = embeds.size();
        if size.len() != 3 || size[2] != self.config.joint_attention_dim {
            return Err(ModelError::BadInput(format!(
                "text embeddings have shape {size:?}; the transformer wants [B, T, {}]",
                self.config.joint_attention_dim
            )));
        }
        let mask = mask.map(|mask| mask.to_kind(Kind::Bool));
        let mask = mask.filter(|mask| mask.all().int64_value(&[]) == 0);
        let normed = rms_norm(&embeds.to_kind(self.kind()), &self.txt_norm, EPS);
        Ok(Text { hidden: self.txt_in.forward(&normed), mask })
    }

    /// Positions of `text` text tokens and an image of `grid` (height, width) packed tokens.
    pub fn positions(&self, text: i64, grid: (i64, i64)) -> Positions {
        let angles = rope::joint_angles(&self.config, text, grid, self.img_in.weight.device());
        Positions { rotations: rope::unit(&angles), grid, text }
    }

    /// Modulations for `times` `[N]` in [0, 1] (sigma, which is timestep / 1000).
    pub fn modulations(&self, times: &Tensor) -> Mods {
        let time = self.time.forward(times);
        let blocks = self.blocks.iter().map(|block| block.modulations(&time)).collect();
        let out = self.norm_out.forward(&time);
        let d = self.config.inner_dim();
        // norm_out has scale before shift, unlike the blocks.
        let (scale, shift) = (out.narrow(1, 0, d) + 1.0, out.narrow(1, d, d));
        Mods { blocks, out: (shift, scale), times: times.size()[0] }
    }

    /// Predicts the velocity (noise - data): packed latents `[B, S, in_channels]`, cast to the
    /// model's dtype, to `[B, S, patch^2 out_channels]` in that dtype.
    ///
    /// `time` picks one row of `mods` for the whole batch; with `None`, sample `b` uses row `b`.
    pub fn forward(
        &self,
        latents: &Tensor,
        text: &Text,
        positions: &Positions,
        mods: &Mods,
        time: Option<i64>,
    ) -> Result<Tensor> {
        self.check(latents, text, positions, mods, time)?;
        let image = self.img_in.forward(&latents.to_kind(self.kind()));
        // A node of its own: the same text is used at several steps, and its gradient is to be
        // summed over each step first, as recomputation does.
        let hidden = text.hidden.view_as(&text.hidden);
        let keys = text.mask.as_ref().map(|mask| {
            let (batch, tokens) = (latents.size()[0], latents.size()[1]);
            let ones = Tensor::ones([batch, tokens], (Kind::Bool, mask.device()));
            Tensor::cat(&[mask, &ones], 1).unsqueeze(1).unsqueeze(1)
        });
        let shared = Shared { parts: vec![positions.part(keys)] };
        self.through(image, hidden, &shared, mods, time)
    }

    /// As [`Dit::forward`] at the time `row`, under several conditions: one velocity each. All go
    /// through the layers as one batch, without padding.
    ///
    /// # Errors
    /// As [`Dit::forward`]; also when there is no condition, or one has a mask.
    pub fn forward_each(
        &self,
        latents: &Tensor,
        conditions: &[(Text, Positions)],
        mods: &Mods,
        row: i64,
    ) -> Result<Vec<Tensor>> {
        for (text, positions) in conditions {
            self.check(latents, text, positions, mods, Some(row))?;
        }
        if let [(text, positions)] = conditions {
            return Ok(vec![self.forward(latents, text, positions, mods, Some(row))?]);
        }
        if conditions.is_empty() || conditions.iter().any(|(text, _)| text.mask.is_some()) {
            let reason = "conditions that go through as one batch come without padding";
            return Err(ModelError::BadInput(reason.to_owned()));
        }
        let one = self.img_in.forward(&latents.to_kind(self.kind()));
        let image = Tensor::cat(&vec![&one; conditions.len()], 0);
        let rows = |(text, _): &(Text, Positions)| text.hidden.flatten(0, 1);
        let hidden = Tensor::cat(&conditions.iter().map(rows).collect::<Vec<_>>(), 0);
        let parts = conditions.iter().map(|(_, positions)| positions.part(None)).collect();
        let shared = Shared { parts };
        let out = self.through(image, hidden.unsqueeze(0), &shared, mods, Some(row))?;
        Ok(out.chunk(conditions.len() as i64, 0))
    }

    /// All blocks and the output layer.
    fn through(
        &self,
        mut image: Tensor,
        mut hidden: Tensor,
        shared: &Shared,
        mods: &Mods,
        time: Option<i64>,
    ) -> Result<Tensor> {
        let last = self.blocks.len() - 1;
        for (index, (block, mods)) in self.blocks.iter().zip(&mods.blocks).enumerate() {
            let mods = mods.at(time);
            let end = index == last;
            (image, hidden) = match self.recompute {
                true => block.recompute(&image, &hidden, &mods, shared, end)?,
                false => block.forward(&image, &hidden, &mods, shared, end),
            };
        }
        let pick = |x: &Tensor| match time {
            Some(row) => x.select(0, row),
            None => x.unsqueeze(1),
        };
        let normed = modulated_norm(&image, &pick(&mods.out.0), &pick(&mods.out.1));
        Ok(self.proj_out.forward(&normed))
    }

    fn check(
        &self,
        latents: &Tensor,
        text: &Text,
        positions: &Positions,
        mods: &Mods,
        time: Option<i64>,
    ) -> Result<()> {
        let (size, words) = (latents.size(), text.hidden.size());
        let (height, width) = positions.grid;
        let fits = size.len() == 3
            && size[1] == height * width
            && size[2] == self.config.in_channels
            && words[0] == size[0]
            && words[1] == positions.text
            && time.map_or(mods.times == size[0], |row| (0..mods.times).contains(&row));
        if fits {
            return Ok(());
        }
        Err(ModelError::BadInput(format!(
            "the transformer got latents {size:?}, text {words:?}, a grid of {height} x {width} \
             after {} text tokens, and {} times of which {time:?}; latents must be [B, {}, {}] and \
             text [B, {}, _]",
            positions.text,
            mods.times,
            height * width,
            self.config.in_channels,
            positions.text,
        )))
    }
}
