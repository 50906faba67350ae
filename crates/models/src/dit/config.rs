//! `transformer/config.json` of a `QwenImageTransformer2DModel`.

use crate::error::{ModelError, Result};
use serde_json::{Value, json};

/// What the transformer needs to know of its config.
#[derive(Clone, Debug, PartialEq)]
pub struct DitConfig {
    /// Side of the square of latents that makes a token.
    pub patch_size: i64,
    /// Channels of a packed token: latent channels x patch_size^2.
    pub in_channels: i64,
    /// Latent channels.
    pub out_channels: i64,
    /// Dual-stream blocks.
    pub num_layers: i64,
    /// Width of a head.
    pub attention_head_dim: i64,
    /// Heads.
    pub num_attention_heads: i64,
    /// Width of the text embeddings.
    pub joint_attention_dim: i64,
    /// How the head is split over frame, height and width positions.
    pub axes_dims_rope: [i64; 3],
}

impl DitConfig {
    /// Width of the residual streams.
    pub fn inner_dim(&self) -> i64 {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Reads a `config.json`; `origin` names it in errors.
    pub fn from_json(config: &Value, origin: &str) -> Result<DitConfig> {
        let int = |key: &str| -> Result<i64> {
            config.get(key).and_then(Value::as_i64).filter(|value| *value > 0).ok_or_else(|| {
                ModelError::bad_config(origin, key, "missing, or not a whole number above zero")
            })
        };
        let axes = config.get("axes_dims_rope").and_then(Value::as_array);
        let axes: Vec<i64> = axes.map_or_else(
            || vec![16, 56, 56],
            |axes| axes.iter().filter_map(Value::as_i64).collect(),
        );
        let axes: [i64; 3] = axes.as_slice().try_into().map_err(|_| {
            ModelError::bad_config(origin, "axes_dims_rope", "three whole numbers expected")
        })?;
        let in_channels = int("in_channels")?;
        let parsed = DitConfig {
            patch_size: int("patch_size")?,
            in_channels,
            out_channels: match config.get("out_channels") {
                None | Some(Value::Null) => in_channels,
                Some(_) => int("out_channels")?,
            },
            num_layers: int("num_layers")?,
            attention_head_dim: int("attention_head_dim")?,
            num_attention_heads: int("num_attention_heads")?,
            joint_attention_dim: int("joint_attention_dim")?,
            axes_dims_rope: axes,
        };
        parsed.validate(config, origin)?;
        Ok(parsed)
    }

    fn validate(&self, config: &Value, origin: &str) -> Result<()> {
        let head = self.attention_head_dim;
        if self.axes_dims_rope.iter().sum::<i64>() != head
            || self.axes_dims_rope.iter().any(|axis| *axis < 2 || axis % 2 != 0)
        {
            return Err(ModelError::bad_config(
                origin,
                "axes_dims_rope",
                format!(
                    "{:?} must be even and add up to attention_head_dim = {head}",
                    self.axes_dims_rope
                ),
            ));
        }
        for key in ["guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"] {
            if config.get(key).and_then(Value::as_bool).unwrap_or(false) {
                return Err(ModelError::bad_config(
                    origin,
                    key,
                    "this variant of the transformer is not implemented; set it to false",
                ));
            }
        }
        Ok(())
    }

    /// A `config.json` that diffusers reads.
    pub fn to_json(&self) -> Value {
        json!({
            "_class_name": "QwenImageTransformer2DModel",
            "_diffusers_version": "0.37.0",
            "patch_size": self.patch_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "num_layers": self.num_layers,
            "attention_head_dim": self.attention_head_dim,
            "num_attention_heads": self.num_attention_heads,
            "joint_attention_dim": self.joint_attention_dim,
            "guidance_embeds": false,
            "axes_dims_rope": self.axes_dims_rope,
        })
    }
}
