//! The vision tower of Qwen2.5-VL: not run here, but part of the folder, since
//! `Qwen2_5_VLForConditionalGeneration` does not load without it. A published folder's own tower is
//! carried through untouched; a new small model gets a small random one.

use crate::params::{Init, ParamSet, ParamSpec};
use duet_core::Seed;
use serde_json::{Value, json};

/// Sizes of a vision tower.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VisionConfig {
    /// Blocks.
    pub depth: i64,
    /// Width.
    pub hidden_size: i64,
    /// Width of its SwiGLU layers.
    pub intermediate_size: i64,
    /// Heads.
    pub num_heads: i64,
    /// Width of the language model that it feeds.
    pub out_hidden_size: i64,
}

/// Side of a patch in pixels; frames in a patch; patches that merge into a token, on each side.
const PATCH: i64 = 14;
const FRAMES: i64 = 2;
const MERGE: i64 = 2;

impl VisionConfig {
    /// The smallest tower that transformers accepts, for a language model of this width.
    pub fn tiny(out_hidden_size: i64) -> Self {
        VisionConfig {
            depth: 1,
            hidden_size: 16,
            intermediate_size: 16,
            num_heads: 2,
            out_hidden_size,
        }
    }

    /// The `vision_config` of `text_encoder/config.json`.
    pub fn to_json(&self) -> Value {
        json!({
            "model_type": "qwen2_5_vl",
            "depth": self.depth,
            "hidden_size": self.hidden_size,
            "hidden_act": "silu",
            "intermediate_size": self.intermediate_size,
            "num_heads": self.num_heads,
            "in_channels": 3,
            "in_chans": 3,
            "patch_size": PATCH,
            "spatial_patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "tokens_per_second": 2,
            "window_size": 112,
            "out_hidden_size": self.out_hidden_size,
            "fullatt_block_indexes": [self.depth - 1],
            "initializer_range": 0.02,
        })
    }

    /// Every parameter of the tower, under `visual.`.
    pub fn specs(&self) -> Vec<ParamSpec> {
        let (h, f) = (self.hidden_size, self.intermediate_size);
        let merged = h * MERGE * MERGE;
        let mut out = Vec::new();
        let mut add = |name: String, shape: &[i64], init: Init| {
            out.push(ParamSpec::new(format!("visual.{name}"), shape, init));
        };
        let linear = Init::Normal(0.02);
        add("patch_embed.proj.weight".into(), &[h, 3, FRAMES, PATCH, PATCH], linear);
        for block in 0..self.depth {
            let name = |layer: &str| format!("blocks.{block}.{layer}");
            add(name("norm1.weight"), &[h], Init::Ones);
            add(name("norm2.weight"), &[h], Init::Ones);
            for (layer, from, to) in [
                ("attn.qkv", h, 3 * h),
                ("attn.proj", h, h),
                ("mlp.gate_proj", h, f),
                ("mlp.up_proj", h, f),
                ("mlp.down_proj", f, h),
            ] {
                add(name(&format!("{layer}.weight")), &[to, from], linear);
                add(name(&format!("{layer}.bias")), &[to], Init::Zeros);
            }
        }
        add("merger.ln_q.weight".into(), &[h], Init::Ones);
        for (layer, to) in [("merger.mlp.0", merged), ("merger.mlp.2", self.out_hidden_size)] {
            add(format!("{layer}.weight"), &[to, merged], linear);
            add(format!("{layer}.bias"), &[to], Init::Zeros);
        }
        out
    }
}

/// A random vision tower, to be carried along by a new pipeline.
pub fn init_vision_tower(config: &VisionConfig, seed: &Seed) -> ParamSet {
    ParamSet::init(&config.specs(), seed)
}
