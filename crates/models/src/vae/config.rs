//! `vae/config.json` of an `AutoencoderKLQwenImage`.

use crate::error::{ModelError, Result};
use serde_json::{Value, json};

/// What the autoencoder needs to know of its config.
#[derive(Clone, Debug, PartialEq)]
pub struct VaeConfig {
    /// Channels of the first stage.
    pub base_dim: i64,
    /// Latent channels.
    pub z_dim: i64,
    /// Channels of each stage, as multiples of `base_dim`.
    pub dim_mult: Vec<i64>,
    /// Residual blocks per stage of the encoder (the decoder has one more).
    pub num_res_blocks: i64,
    /// For each change of resolution, whether time is halved too. Its length sets the scale factor.
    pub temperal_downsample: Vec<bool>,
    /// Colour channels.
    pub input_channels: i64,
    /// Mean of each latent channel, for normalisation.
    pub latents_mean: Vec<f64>,
    /// Standard deviation of each latent channel.
    pub latents_std: Vec<f64>,
}

impl VaeConfig {
    /// How many pixels a latent spans on each side.
    pub fn scale_factor(&self) -> i64 {
        1 << self.temperal_downsample.len()
    }

    /// Reads a `config.json`; `origin` names it in errors.
    pub fn from_json(config: &Value, origin: &str) -> Result<VaeConfig> {
        let int =
            |key: &str, default: i64| config.get(key).and_then(Value::as_i64).unwrap_or(default);
        let list = |key: &str| config.get(key).and_then(Value::as_array);
        let missing = |key: &str| ModelError::bad_config(origin, key, "missing, or not a list");
        let numbers = |key: &str| -> Result<Vec<f64>> {
            let list = list(key).ok_or_else(|| missing(key))?;
            Ok(list.iter().filter_map(Value::as_f64).collect())
        };
        let dim_mult = list("dim_mult").ok_or_else(|| missing("dim_mult"))?;
        let temporal = list("temperal_downsample").ok_or_else(|| missing("temperal_downsample"))?;
        let parsed = VaeConfig {
            base_dim: int("base_dim", 96),
            z_dim: int("z_dim", 16),
            dim_mult: dim_mult.iter().filter_map(Value::as_i64).collect(),
            num_res_blocks: int("num_res_blocks", 2),
            temperal_downsample: temporal.iter().filter_map(Value::as_bool).collect(),
            input_channels: int("input_channels", 3),
            latents_mean: numbers("latents_mean")?,
            latents_std: numbers("latents_std")?,
        };
        if list("attn_scales").is_some_and(|scales| !scales.is_empty()) {
            let reason = "attention between the stages is not implemented; give an empty list";
            return Err(ModelError::bad_config(origin, "attn_scales", reason));
        }
        parsed.validate(origin)?;
        Ok(parsed)
    }

    /// Checks that the fields fit one another.
    pub fn validate(&self, origin: &str) -> Result<()> {
        let bad = |key: &str, reason: String| Err(ModelError::bad_config(origin, key, reason));
        if self.dim_mult.is_empty() || self.dim_mult.iter().any(|mult| *mult < 1) {
            return bad("dim_mult", "whole numbers above zero expected".to_owned());
        }
        if self.temperal_downsample.len() + 1 != self.dim_mult.len() {
            return bad(
                "temperal_downsample",
                format!(
                    "has {} entries; dim_mult with {} stages calls for {}",
                    self.temperal_downsample.len(),
                    self.dim_mult.len(),
                    self.dim_mult.len() - 1
                ),
            );
        }
        if self.base_dim < 1 || self.z_dim < 1 || self.num_res_blocks < 1 || self.input_channels < 1
        {
            return bad(
                "base_dim",
                "base_dim, z_dim, num_res_blocks and input_channels must be above zero".to_owned(),
            );
        }
        let last = self.dim_mult.len() - 1;
        if self.dim_mult[1..=last].iter().any(|mult| mult * self.base_dim % 2 != 0) {
            return bad("base_dim", "upsampling halves the channels; they must be even".to_owned());
        }
        for (key, list) in
            [("latents_mean", &self.latents_mean), ("latents_std", &self.latents_std)]
        {
            if list.len() as i64 != self.z_dim {
                return bad(key, format!("has {} entries, z_dim is {}", list.len(), self.z_dim));
            }
        }
        if self.latents_std.iter().any(|std| *std <= 0.0) {
            return bad("latents_std", "must be above zero".to_owned());
        }
        Ok(())
    }

    /// A `config.json` that diffusers reads.
    pub fn to_json(&self) -> Value {
        let mut config = json!({
            "_class_name": "AutoencoderKLQwenImage",
            "_diffusers_version": "0.37.0",
            "base_dim": self.base_dim,
            "z_dim": self.z_dim,
            "dim_mult": self.dim_mult,
            "num_res_blocks": self.num_res_blocks,
            "attn_scales": [],
            "temperal_downsample": self.temperal_downsample,
            "dropout": 0.0,
            "latents_mean": self.latents_mean,
            "latents_std": self.latents_std,
        });
        // diffusers 0.36 does not know the key; three is what its absence means.
        if self.input_channels != 3 {
            config["input_channels"] = json!(self.input_channels);
        }
        config
    }
}
