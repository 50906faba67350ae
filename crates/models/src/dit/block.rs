//! One dual-stream block (diffusers `QwenImageTransformerBlock`).

use super::config::DitConfig;
use super::rope::rotate;
use crate::error::Result;
use crate::nn::{Linear, attention, fetch, rms_norm};
use crate::params::{Init, ParamSet, ParamSpec};
use duet_torch::{gelu, recompute};
use tch::{Kind, Tensor};

/// Epsilon of every norm in the transformer.
pub(super) const EPS: f64 = 1e-6;

/// Shift, scale and gate of one half of a block, each `[N, D]` with one row per time. The scale
/// has its one added already.
#[derive(Debug)]
pub struct Modulation {
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
}

impl Modulation {
    /// The two modulations of a block from its linear layer's output `[N, 6 D]`.
    fn pair(table: &Tensor) -> [Modulation; 2] {
        let mut parts = table.chunk(6, -1).into_iter();
        let mut next = || parts.next().unwrap_or_default();
        let mut half = || {
            let (shift, scale, gate) = (next(), next(), next());
            Modulation { shift, scale: scale + 1.0, gate }
        };
        [half(), half()]
    }

    /// The modulation at one time (a row of vectors that all samples share), or, for `None`, one
    /// row per sample.
    fn at(&self, row: Option<i64>) -> Modulation {
        let pick = |x: &Tensor| match row {
            Some(row) => x.select(0, row),
            None => x.unsqueeze(1),
        };
        Modulation { shift: pick(&self.shift), scale: pick(&self.scale), gate: pick(&self.gate) }
    }

    /// `LN(x) * (1 + scale) + shift`.
    fn norm(&self, x: &Tensor) -> Tensor {
        modulated_norm(x, &self.shift, &self.scale)
    }

    /// `x + gate * y`.
    fn add(&self, x: &Tensor, y: &Tensor) -> Tensor {
        x.addcmul(&self.gate, y)
    }
}

/// `LN(x) * scale + shift`; vectors go into the fused kernel as its affine part.
pub(super) fn modulated_norm(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Tensor {
    let width = x.size()[2];
    match scale.dim() {
        1 => x.layer_norm([width], Some(scale), Some(shift), EPS, false),
        _ => shift.addcmul(&x.layer_norm::<Tensor>([width], None, None, EPS, false), scale),
    }
}

/// All four modulations of a block.
#[derive(Debug)]
pub(super) struct BlockMods {
    image: [Modulation; 2],
    text: [Modulation; 2],
}

impl BlockMods {
    /// Its twelve tensors: [`BlockMods::of`] takes them back.
    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let all = self.image.iter().chain(&self.text);
        all.flat_map(|half| [&half.shift, &half.scale, &half.gate])
    }

    fn of(tensors: &[Tensor]) -> BlockMods {
        let half = |index: usize| {
            let at = |part: usize| tensors[3 * index + part].shallow_clone();
            Modulation { shift: at(0), scale: at(1), gate: at(2) }
        };
        BlockMods { image: [half(0), half(1)], text: [half(2), half(3)] }
    }

    pub(super) fn at(&self, row: Option<i64>) -> BlockMods {
        BlockMods {
            image: [self.image[0].at(row), self.image[1].at(row)],
            text: [self.text[0].at(row), self.text[1].at(row)],
        }
    }
}

/// The layers of one stream.
#[derive(Debug)]
struct Stream {
    modulation: Linear,
    q: Linear,
    k: Linear,
    v: Linear,
    norm_q: Tensor,
    norm_k: Tensor,
    out: Linear,
    mlp_in: Linear,
    mlp_out: Linear,
}

/// Names of a stream's layers below the block's: modulation, q, k, v, the two norms, output, MLP.
const IMAGE: [&str; 9] = [
    "img_mod.1",
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.norm_q",
    "attn.norm_k",
    "attn.to_out.0",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
];
const TEXT: [&str; 9] = [
    "txt_mod.1",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.norm_added_q",
    "attn.norm_added_k",
    "attn.to_add_out",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
];

impl Stream {
    fn specs(out: &mut Vec<ParamSpec>, config: &DitConfig, block: &str, names: [&str; 9]) {
        let d = config.inner_dim();
        let name = |index: usize| format!("{block}.{}", names[index]);
        // AdaLN-zero: a fresh block is the identity.
        Linear::specs(out, &name(0), (d, 6 * d), true, Init::Zeros);
        for index in [1, 2, 3, 6] {
            Linear::specs(out, &name(index), (d, d), true, Init::Xavier);
        }
        for index in [4, 5] {
            let norm = format!("{}.weight", name(index));
            out.push(ParamSpec::new(norm, &[config.attention_head_dim], Init::Ones));
        }
        Linear::specs(out, &name(7), (d, 4 * d), true, Init::Xavier);
        Linear::specs(out, &name(8), (4 * d, d), true, Init::Xavier);
    }

    fn load(params: &ParamSet, block: &str, names: [&str; 9]) -> Result<Stream> {
        let linear = |index: usize| Linear::load(params, &format!("{block}.{}", names[index]));
        let norm = |index: usize| fetch(params, &format!("{block}.{}.weight", names[index]));
        Ok(Stream {
            modulation: linear(0)?,
            q: linear(1)?,
            k: linear(2)?,
            v: linear(3)?,
            norm_q: norm(4)?,
            norm_k: norm(5)?,
            out: linear(6)?,
            mlp_in: linear(7)?,
            mlp_out: linear(8)?,
        })
    }

    fn linears(&self) -> [&Linear; 7] {
        let Stream { modulation, q, k, v, out, mlp_in, mlp_out, .. } = self;
        [modulation, q, k, v, out, mlp_in, mlp_out]
    }

    fn linears_mut(&mut self) -> [&mut Linear; 7] {
        [
            &mut self.modulation,
            &mut self.q,
            &mut self.k,
            &mut self.v,
            &mut self.out,
            &mut self.mlp_in,
            &mut self.mlp_out,
        ]
    }

    /// The same layers: handles to the same tensors.
    fn share(&self) -> Stream {
        Stream {
            modulation: self.modulation.share(),
            q: self.q.share(),
            k: self.k.share(),
            v: self.v.share(),
            norm_q: self.norm_q.shallow_clone(),
            norm_k: self.norm_k.shallow_clone(),
            out: self.out.share(),
            mlp_in: self.mlp_in.share(),
            mlp_out: self.mlp_out.share(),
        }
    }

    /// The same layers for sampling, with their adapters added to the weights.
    fn folded(&self) -> Result<Stream> {
        let mut stream = self.share();
        for layer in stream.linears_mut() {
            *layer = layer.folded()?;
        }
        Ok(stream)
    }

    /// Everything that [`Block::forward`] reads of it and that may be trained.
    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let layers = [&self.q, &self.k, &self.v, &self.out, &self.mlp_in, &self.mlp_out];
        layers.into_iter().flat_map(Linear::tensors).chain([&self.norm_q, &self.norm_k])
    }

    /// Second half of the block: `x += gate1 * out(attended)`, then the gated MLP.
    fn finish(&self, x: &Tensor, attended: &Tensor, mods: &[Modulation; 2]) -> Tensor {
        let x = mods[0].add(x, &self.out.forward(attended));
        let inner = self.mlp_in.forward(&mods[1].norm(&x));
        let inner = gelu(&inner);
        clip(mods[1].add(&x, &self.mlp_out.forward(&inner)))
    }
}

/// Samples that attend within themselves: those of one condition.
#[derive(Debug)]
pub(super) struct Part {
    /// Unit complex numbers `[1, T + S, 1, head_dim / 2]`.
    pub rotations: Tensor,
    /// `[B, 1, 1, T + S]` bool, true where a key may be seen.
    pub keys: Option<Tensor>,
    /// T.
    pub text: i64,
}

/// What all blocks share in one call. Streams are row by row the same arithmetic whatever a row
/// belongs to, so several conditions go through them as one batch: images as `[parts B, S, D]`,
/// texts, which differ in length, one behind the other as `[1, sum of B T, D]` (`[B, T, D]` where
/// there is one part). Only attention tells the parts apart.
#[derive(Debug)]
pub(super) struct Shared {
    pub parts: Vec<Part>,
}

impl Shared {
    fn share(&self) -> Shared {
        let part = |part: &Part| Part {
            rotations: part.rotations.shallow_clone(),
            keys: part.keys.as_ref().map(Tensor::shallow_clone),
            text: part.text,
        };
        Shared { parts: self.parts.iter().map(part).collect() }
    }

    /// Image rows `[parts B, S, ..]` of each part.
    fn images(&self, x: &Tensor) -> Vec<Tensor> {
        match self.parts.len() {
            1 => vec![x.shallow_clone()],
            parts => x.chunk(parts as i64, 0),
        }
    }

    /// Text rows of each part, `[B, T, ..]`.
    fn texts(&self, x: &Tensor, batch: i64) -> Vec<Tensor> {
        if self.parts.len() == 1 {
            return vec![x.shallow_clone()];
        }
        let rows: Vec<i64> = self.parts.iter().map(|part| batch * part.text).collect();
        let rest = x.size().split_off(2);
        let parts = x.split_with_sizes(rows.as_slice(), 1);
        let shape = |part: &Part| [&[batch, part.text], rest.as_slice()].concat();
        self.parts.iter().zip(parts).map(|(part, x)| x.view(shape(part).as_slice())).collect()
    }
}

/// A dual-stream block.
#[derive(Debug)]
pub struct Block {
    image: Stream,
    text: Stream,
    heads: i64,
    head_dim: i64,
}

impl Block {
    pub(super) fn specs(out: &mut Vec<ParamSpec>, config: &DitConfig, name: &str) {
        Stream::specs(out, config, name, IMAGE);
        Stream::specs(out, config, name, TEXT);
    }

    pub(super) fn load(params: &ParamSet, config: &DitConfig, name: &str) -> Result<Block> {
        Ok(Block {
            image: Stream::load(params, name, IMAGE)?,
            text: Stream::load(params, name, TEXT)?,
            heads: config.num_attention_heads,
            head_dim: config.attention_head_dim,
        })
    }

    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.image.linears_mut().into_iter().chain(self.text.linears_mut())
    }

    /// Modulations for `N` times from SiLU(temb) `[N, D]`.
    pub(super) fn modulations(&self, time: &Tensor) -> BlockMods {
        BlockMods {
            image: Modulation::pair(&self.image.modulation.forward(time)),
            text: Modulation::pair(&self.text.modulation.forward(time)),
        }
    }

    /// `[B, N, D]` to `[B, N, H, head_dim]`.
    fn split(&self, x: &Tensor) -> Tensor {
        let size = x.size();
        x.view([size[0], size[1], self.heads, self.head_dim])
    }

    /// The same block: handles to the same tensors.
    fn share(&self) -> Block {
        Block {
            image: self.image.share(),
            text: self.text.share(),
            heads: self.heads,
            head_dim: self.head_dim,
        }
    }

    /// The same block for sampling, with its adapters added to the weights.
    pub(super) fn folded(&self) -> Result<Block> {
        Ok(Block { image: self.image.folded()?, text: self.text.folded()?, ..self.share() })
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.image.linears().into_iter().chain(self.text.linears())
    }

    /// [`Block::forward`] that keeps only what goes in and computes the rest again in the backward
    /// pass.
    pub(super) fn recompute(
        &self,
        image: &Tensor,
        text: &Tensor,
        mods: &BlockMods,
        shared: &Shared,
        last: bool,
    ) -> Result<(Tensor, Tensor)> {
        let block = self.share();
        let shared = shared.share();
        let mut inputs = vec![image, text];
        inputs.extend(mods.tensors());
        let leaves: Vec<&Tensor> = self.image.tensors().chain(self.text.tensors()).collect();
        let mut outputs = recompute(&inputs, &leaves, move |inputs| {
            let mods = BlockMods::of(&inputs[2..]);
            let (image, text) = block.forward(&inputs[0], &inputs[1], &mods, &shared, last);
            if last { vec![image] } else { vec![image, text] }
        })?;
        let image = outputs.remove(0);
        Ok((image, outputs.pop().unwrap_or_else(|| text.shallow_clone())))
    }

    /// Runs the block. With `last`, the text stream's output, which nothing reads, is not computed,
    /// and the text that comes back is the one that went in.
    pub(super) fn forward(
        &self,
        image: &Tensor,
        text: &Tensor,
        mods: &BlockMods,
        shared: &Shared,
        last: bool,
    ) -> (Tensor, Tensor) {
        let batch = image.size()[0] / shared.parts.len() as i64;
        let (image_in, text_in) = (mods.image[0].norm(image), mods.text[0].norm(text));
        let images = |layer: &Linear| shared.images(&self.split(&layer.forward(&image_in)));
        let texts = |layer: &Linear| shared.texts(&self.split(&layer.forward(&text_in)), batch);
        let (of_image, of_text) = (&self.image, &self.text);
        let (image_q, image_k, image_v) =
            (images(&of_image.q), images(&of_image.k), images(&of_image.v));
        let text_q = (!last).then(|| texts(&of_text.q));
        let (text_k, text_v) = (texts(&of_text.k), texts(&of_text.v));
        // Nodes of their own: what several parts add to a norm's gradient is summed here first, as
        // recomputation does.
        let own = |x: &Tensor| x.view_as(x);
        let (text_norm_q, text_norm_k) = (own(&of_text.norm_q), own(&of_text.norm_k));
        let (image_norm_q, image_norm_k) = (own(&of_image.norm_q), own(&of_image.norm_k));
        let attended: Vec<Tensor> = shared
            .parts
            .iter()
            .enumerate()
            .map(|(at, part)| {
                let k = [(&text_k[at], &text_norm_k), (&image_k[at], &image_norm_k)];
                let k = norm_rotate(&k, &part.rotations);
                let v = Tensor::cat(&[&text_v[at], &image_v[at]], 1);
                let image_q = (&image_q[at], &image_norm_q);
                let q = match &text_q {
                    Some(text_q) => {
                        let parts = [(&text_q[at], &text_norm_q), image_q];
                        norm_rotate(&parts, &part.rotations)
                    }
                    None => {
                        let tokens = part.rotations.size()[1] - part.text;
                        norm_rotate(&[image_q], &part.rotations.narrow(1, part.text, tokens))
                    }
                };
                let (q, k, v) = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2));
                attention(&q, &k, &v, part.keys.as_ref(), false).transpose(1, 2)
            })
            .collect();
        // Cut before flattening: flattening copies, and linear layers are slow on what is not whole.
        let image_out = |from: &dyn Fn(&Part) -> i64| {
            let cut = |(part, x): (&Part, &Tensor)| x.narrow(1, from(part), image.size()[1]);
            let rows: Vec<Tensor> = shared.parts.iter().zip(&attended).map(cut).collect();
            joined(&rows, 0).flatten(2, 3)
        };
        if last {
            let image = of_image.finish(image, &image_out(&|_| 0), &mods.image);
            return (image, text.shallow_clone());
        }
        let cut = |(part, x): (&Part, &Tensor)| match shared.parts.len() {
            1 => x.narrow(1, 0, part.text),
            _ => x.narrow(1, 0, part.text).flatten(0, 1).unsqueeze(0),
        };
        let rows: Vec<Tensor> = shared.parts.iter().zip(&attended).map(cut).collect();
        let text_out = joined(&rows, 1).flatten(2, 3);
        (
            of_image.finish(image, &image_out(&|part| part.text), &mods.image),
            of_text.finish(text, &text_out, &mods.text),
        )
    }
}

/// The tensors behind each other; the one itself where there is one.
fn joined(tensors: &[Tensor], dim: i64) -> Tensor {
    match tensors {
        [one] => one.shallow_clone(),
        many => Tensor::cat(many, dim),
    }
}

/// RMS norms of parts `[B, N, H, D]`, each with its weight, laid one behind the other and rotated.
fn norm_rotate(parts: &[(&Tensor, &Tensor)], rotations: &Tensor) -> Tensor {
    let normed: Vec<Tensor> =
        parts.iter().map(|(part, weight)| rms_norm(part, weight, EPS)).collect();
    rotate(&Tensor::cat(&normed, 1), rotations)
}

/// Half precision must not overflow (diffusers clips there, and only there).
fn clip(x: Tensor) -> Tensor {
    match x.kind() {
        Kind::Half => x.clamp(-65_504.0, 65_504.0),
        _ => x,
    }
}
