//! Sizes of the three models, from their `config.json` files, and the parameters they come to.
//! The laws are those of the models that are really built; tests hold them to it.

use crate::CliError;
use serde_json::Value;
use std::path::Path;

/// Sinusoid channels of the transformer's time embedding.
const TIME_CHANNELS: u64 = 256;

/// The language model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lm {
    /// Tokens in the table.
    pub vocab: u64,
    /// Width of the stream.
    pub hidden: u64,
    /// Width of the SwiGLU layer.
    pub inner: u64,
    /// Layers.
    pub layers: u64,
    /// Width of all key heads together.
    pub kv: u64,
    /// Whether the head is the table.
    pub tied: bool,
}

/// The image transformer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dit {
    /// Channels of a token.
    pub channels: u64,
    /// Channels of a token that it gives back.
    pub out: u64,
    /// Width of the streams.
    pub width: u64,
    /// Width of a head.
    pub head: u64,
    /// Blocks.
    pub blocks: u64,
    /// Width of text embeddings.
    pub text: u64,
    /// Latents on each side of a token.
    pub patch: u64,
}

/// The autoencoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vae {
    /// Channels of the first stage.
    pub base: u64,
    /// Latent channels.
    pub z: u64,
    /// Channels of each stage, in `base`.
    pub stages: Vec<u64>,
    /// Residual blocks of a stage.
    pub blocks: u64,
    /// Whether each change of resolution halves time too.
    pub temporal: Vec<bool>,
    /// Colour channels.
    pub colours: u64,
}

/// A whole model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shapes {
    /// Where the sizes are from.
    pub origin: String,
    /// The language model.
    pub lm: Lm,
    /// The transformer.
    pub dit: Dit,
    /// The autoencoder.
    pub vae: Vae,
}

impl Lm {
    /// Parameters of a layer.
    pub fn layer(&self) -> u64 {
        let (d, f, kv) = (self.hidden, self.inner, self.kv);
        2 * d + (d * d + d) + 2 * (d * kv + kv) + d * d + 3 * d * f
    }

    /// All parameters, without the vision tower.
    pub fn params(&self) -> u64 {
        let table = self.vocab * self.hidden;
        table * if self.tied { 1 } else { 2 } + self.layers * self.layer() + self.hidden
    }
}

impl Dit {
    /// Parameters of a block: two streams of modulation, attention and MLP.
    pub fn block(&self) -> u64 {
        let d = self.width;
        2 * ((6 * d * d + 6 * d) + 4 * (d * d + d) + 2 * self.head + (8 * d * d + 5 * d))
    }

    /// All parameters.
    pub fn params(&self) -> u64 {
        let d = self.width;
        let ends = linear(self.channels, d) + self.text + linear(self.text, d);
        let time = linear(TIME_CHANNELS, d) + linear(d, d);
        ends + time + self.blocks * self.block() + linear(d, 2 * d) + linear(d, self.out)
    }

    /// Parameters of adapters of a rank on the layers of every block whose names end in `targets`.
    pub fn adapters(&self, rank: u64, targets: &[String]) -> u64 {
        let d = self.width;
        let attention =
            ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"];
        let square = attention.iter().chain(&["to_add_out"]).map(|l| (format!("attn.{l}"), 2 * d));
        let rest = ["img", "txt"].into_iter().flat_map(|stream| {
            [("mlp.net.0.proj", 5 * d), ("mlp.net.2", 5 * d), ("mod.1", 7 * d)]
                .map(|(layer, sides)| (format!("{stream}_{layer}"), sides))
        });
        adapted(square.chain(rest), targets) * rank * self.blocks
    }
}

impl Lm {
    /// As [`Dit::adapters`].
    pub fn adapters(&self, rank: u64, targets: &[String]) -> u64 {
        let (d, f, kv) = (self.hidden, self.inner, self.kv);
        let layers = [
            ("self_attn.q_proj", 2 * d),
            ("self_attn.k_proj", d + kv),
            ("self_attn.v_proj", d + kv),
            ("self_attn.o_proj", 2 * d),
            ("mlp.gate_proj", d + f),
            ("mlp.up_proj", d + f),
            ("mlp.down_proj", d + f),
        ];
        let layers = layers.map(|(layer, sides)| (layer.to_owned(), sides));
        adapted(layers.into_iter(), targets) * rank * self.layers
    }
}

/// Sum of both sides of the layers that are targeted.
fn adapted(layers: impl Iterator<Item = (String, u64)>, targets: &[String]) -> u64 {
    let wants = |name: &str| {
        let ends = |t: &String| name.strip_suffix(t.as_str()).is_some_and(|s| s.ends_with('.'));
        targets.iter().any(|target| name == target || ends(target))
    };
    layers.filter(|(name, _)| wants(name)).map(|(_, sides)| sides).sum()
}

impl Vae {
    /// Pixels on each side of a latent.
    pub fn scale(&self) -> u64 {
        1 << self.temporal.len()
    }

    /// All parameters.
    pub fn params(&self) -> u64 {
        let channels: Vec<u64> = self.stages.iter().map(|stage| stage * self.base).collect();
        let top = channels.last().copied().unwrap_or(self.base);
        let mut sum = cube(self.colours, self.base, 3);
        let mut from = self.base;
        for (stage, to) in channels.iter().enumerate() {
            for _ in 0..self.blocks {
                sum += residual(from, *to);
                from = *to;
            }
            if let Some(temporal) = self.temporal.get(stage) {
                sum += flat(*to, *to, 3) + if *temporal { time(*to, *to) } else { 0 };
            }
        }
        sum += middle(top) + top + cube(top, 2 * self.z, 3);
        sum += cube(2 * self.z, 2 * self.z, 1) + cube(self.z, self.z, 1);
        sum += cube(self.z, top, 3) + middle(top);
        let (mut from, mut last) = (top, top);
        for (index, to) in channels.iter().rev().enumerate() {
            for _ in 0..=self.blocks {
                sum += residual(from, *to);
                from = *to;
            }
            if let Some(temporal) = self.temporal.iter().rev().nth(index) {
                sum += flat(*to, to / 2, 3) + if *temporal { time(*to, 2 * to) } else { 0 };
            }
            (from, last) = (to / 2, *to);
        }
        sum + last + cube(last, self.colours, 3)
    }
}

fn linear(from: u64, to: u64) -> u64 {
    from * to + to
}

fn cube(from: u64, to: u64, kernel: u64) -> u64 {
    from * to * kernel.pow(3) + to
}

fn flat(from: u64, to: u64, kernel: u64) -> u64 {
    from * to * kernel.pow(2) + to
}

fn time(from: u64, to: u64) -> u64 {
    from * to * 3 + to
}

fn residual(from: u64, to: u64) -> u64 {
    let shortcut = if from == to { 0 } else { cube(from, to, 1) };
    from + cube(from, to, 3) + to + cube(to, to, 3) + shortcut
}

fn middle(channels: u64) -> u64 {
    let attention = channels + flat(channels, 3 * channels, 1) + flat(channels, channels, 1);
    2 * residual(channels, channels) + attention
}

impl Shapes {
    /// The published Qwen/Qwen-Image.
    pub fn published() -> Shapes {
        Shapes {
            origin: "the published Qwen-Image".to_owned(),
            lm: Lm {
                vocab: 152_064,
                hidden: 3584,
                inner: 18_944,
                layers: 28,
                kv: 512,
                tied: false,
            },
            dit: Dit {
                channels: 64,
                out: 64,
                width: 3072,
                head: 128,
                blocks: 60,
                text: 3584,
                patch: 2,
            },
            vae: Vae {
                base: 96,
                z: 16,
                stages: vec![1, 2, 4, 4],
                blocks: 2,
                temporal: vec![false, true, true],
                colours: 3,
            },
        }
    }

    /// The sizes of a pipeline folder; no weights are read.
    ///
    /// # Errors
    /// A `config.json` is missing, or a key of it.
    pub fn read(folder: &Path) -> Result<Shapes, CliError> {
        let lm = Json::read(&folder.join("text_encoder/config.json"))?;
        let dit = Json::read(&folder.join("transformer/config.json"))?;
        let vae = Json::read(&folder.join("vae/config.json"))?;
        let (hidden, heads) = (lm.int("hidden_size")?, lm.int("num_attention_heads")?.max(1));
        let kv_heads = lm.int("num_key_value_heads").unwrap_or(heads);
        let (patch, head) = (dit.int("patch_size")?, dit.int("attention_head_dim")?);
        let channels = dit.int("in_channels")?;
        Ok(Shapes {
            origin: folder.display().to_string(),
            lm: Lm {
                vocab: lm.int("vocab_size")?,
                hidden,
                inner: lm.int("intermediate_size")?,
                layers: lm.int("num_hidden_layers")?,
                kv: kv_heads * (hidden / heads),
                tied: lm.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
            },
            dit: Dit {
                channels,
                out: patch * patch * dit.int("out_channels").unwrap_or(channels),
                width: head * dit.int("num_attention_heads")?,
                head,
                blocks: dit.int("num_layers")?,
                text: dit.int("joint_attention_dim")?,
                patch,
            },
            vae: Vae {
                base: vae.int("base_dim").unwrap_or(96),
                z: vae.int("z_dim").unwrap_or(16),
                stages: vae.list("dim_mult")?.iter().filter_map(Value::as_u64).collect(),
                blocks: vae.int("num_res_blocks").unwrap_or(2),
                temporal: vae
                    .list("temperal_downsample")?
                    .iter()
                    .filter_map(Value::as_bool)
                    .collect(),
                colours: vae.int("input_channels").unwrap_or(3),
            },
        })
    }
}

/// A `config.json` that errors can name.
struct Json {
    path: String,
    value: Value,
}

impl Json {
    fn read(path: &Path) -> Result<Json, CliError> {
        let text = std::fs::read(path).map_err(|e| CliError::io("read", path, e))?;
        let path = path.display().to_string();
        let value = serde_json::from_slice(&text)
            .map_err(|error| CliError::Usage(format!("{path}: {error}")))?;
        Ok(Json { path, value })
    }

    /// A key, also where newer files have it: in `text_config`.
    fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).or_else(|| self.value.get("text_config")?.get(key))
    }

    fn int(&self, key: &str) -> Result<u64, CliError> {
        let bad = || CliError::Usage(format!("{}: `{key}`: a whole number expected", self.path));
        self.get(key).and_then(Value::as_u64).filter(|n| *n < 1 << 24).ok_or_else(bad)
    }

    fn list(&self, key: &str) -> Result<&Vec<Value>, CliError> {
        let bad = || CliError::Usage(format!("{}: `{key}`: a list expected", self.path));
        let list = self.get(key).and_then(Value::as_array);
        list.filter(|list| list.len() <= 16).ok_or_else(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_model_has_its_published_sizes() {
        let shapes = Shapes::published();
        assert_eq!(shapes.lm.params(), 7_615_616_512);
        assert_eq!(shapes.dit.params(), 20_430_401_088);
        assert_eq!(shapes.vae.params(), 126_892_531);
    }
}
