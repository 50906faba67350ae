//! The language model's `config.json`, as Qwen2.5-VL publishes it: flat (older files) or with a
//! nested `text_config` (transformers 4.57 and later).

use crate::error::{ModelError, Result};
use serde_json::{Map, Value, json};

/// What the language model needs to know of `text_encoder/config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct LmConfig {
    /// Tokens in the embedding table.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the SwiGLU layer.
    pub intermediate_size: i64,
    /// Decoder layers.
    pub num_hidden_layers: i64,
    /// Query heads.
    pub num_attention_heads: i64,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: i64,
    /// Epsilon of all RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest sequence.
    pub max_position_embeddings: i64,
    /// How head_dim / 2 is split over time, height and width; for text all three positions agree.
    pub mrope_section: Vec<i64>,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// `<|endoftext|>`, also used for padding.
    pub bos_token_id: i64,
    /// `<|im_end|>`.
    pub eos_token_id: i64,
}

impl LmConfig {
    /// Width of a head.
    pub fn head_dim(&self) -> i64 {
        self.hidden_size / self.num_attention_heads
    }

    /// Reads a `config.json`; `origin` names it in errors.
    pub fn from_json(config: &Value, origin: &str) -> Result<LmConfig> {
        let text = config.get("text_config").unwrap_or(config);
        let int = |key: &str| -> Result<i64> {
            let value = text.get(key).or_else(|| config.get(key));
            value.and_then(Value::as_i64).ok_or_else(|| {
                ModelError::bad_config(origin, key, "missing, or not a whole number")
            })
        };
        let or = |key: &str, default: i64| {
            let value = text.get(key).or_else(|| config.get(key));
            value.and_then(Value::as_i64).unwrap_or(default)
        };
        let rope = text.get("rope_parameters").or_else(|| text.get("rope_scaling"));
        let theta = text.get("rope_theta").or_else(|| rope.and_then(|r| r.get("rope_theta")));
        let section = rope.and_then(|r| r.get("mrope_section")).and_then(Value::as_array);
        let heads = int("num_attention_heads")?;
        let hidden_size = int("hidden_size")?;
        let parsed = LmConfig {
            vocab_size: int("vocab_size")?,
            hidden_size,
            intermediate_size: int("intermediate_size")?,
            num_hidden_layers: int("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: or("num_key_value_heads", heads),
            rms_norm_eps: text.get("rms_norm_eps").and_then(Value::as_f64).unwrap_or(1e-6),
            rope_theta: theta.and_then(Value::as_f64).unwrap_or(1e6),
            max_position_embeddings: or("max_position_embeddings", 32_768),
            mrope_section: section
                .map(|parts| parts.iter().filter_map(Value::as_i64).collect())
                .unwrap_or_default(),
            tie_word_embeddings: config
                .get("tie_word_embeddings")
                .or_else(|| text.get("tie_word_embeddings"))
                .and_then(Value::as_bool)
                .unwrap_or(false),
            bos_token_id: or("bos_token_id", 151_643),
            eos_token_id: or("eos_token_id", 151_645),
        };
        parsed.validate(text, origin)?;
        Ok(parsed)
    }

    fn validate(&self, text: &Value, origin: &str) -> Result<()> {
        let bad = |key: &str, reason: String| Err(ModelError::bad_config(origin, key, reason));
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
        ];
        for (key, value) in sizes {
            if value < 1 {
                return bad(key, format!("{value} is not a size; give a number above zero"));
            }
        }
        if self.hidden_size % self.num_attention_heads != 0 || self.head_dim() % 2 != 0 {
            return bad(
                "hidden_size",
                format!(
                    "{} does not split into {} heads of even width",
                    self.hidden_size, self.num_attention_heads
                ),
            );
        }
        if self.num_attention_heads % self.num_key_value_heads != 0 {
            return bad(
                "num_key_value_heads",
                format!(
                    "{} does not divide num_attention_heads = {}",
                    self.num_key_value_heads, self.num_attention_heads
                ),
            );
        }
        match text.get("hidden_act").and_then(Value::as_str) {
            None | Some("silu") => {}
            Some(other) => return bad("hidden_act", format!("`{other}`; only `silu` exists here")),
        }
        if text.get("use_sliding_window").and_then(Value::as_bool).unwrap_or(false) {
            return bad("use_sliding_window", "sliding windows are not implemented".to_owned());
        }
        Ok(())
    }

    /// A whole `config.json` of a `Qwen2_5_VLForConditionalGeneration`, with the keys that
    /// transformers 4.57 and 5.x read. `vision` is the `vision_config`, from
    /// [`crate::pipeline::VisionConfig::to_json`].
    pub fn to_json(&self, vision: Value, token_ids: &SpecialIds) -> Value {
        let section = if self.mrope_section.is_empty() {
            default_section(self.head_dim())
        } else {
            self.mrope_section.clone()
        };
        let mut text = Map::new();
        let layers = vec!["full_attention"; self.num_hidden_layers as usize];
        for (key, value) in [
            ("model_type", json!("qwen2_5_vl_text")),
            ("vocab_size", json!(self.vocab_size)),
            ("hidden_size", json!(self.hidden_size)),
            ("intermediate_size", json!(self.intermediate_size)),
            ("num_hidden_layers", json!(self.num_hidden_layers)),
            ("num_attention_heads", json!(self.num_attention_heads)),
            ("num_key_value_heads", json!(self.num_key_value_heads)),
            ("hidden_act", json!("silu")),
            ("max_position_embeddings", json!(self.max_position_embeddings)),
            ("initializer_range", json!(0.02)),
            ("rms_norm_eps", json!(self.rms_norm_eps)),
            ("use_cache", json!(true)),
            ("use_sliding_window", json!(false)),
            ("sliding_window", Value::Null),
            ("max_window_layers", json!(self.num_hidden_layers)),
            ("layer_types", json!(layers)),
            ("attention_dropout", json!(0.0)),
            ("rope_theta", json!(self.rope_theta)),
            (
                "rope_scaling",
                json!({"type": "default", "rope_type": "default", "mrope_section": section}),
            ),
            (
                "rope_parameters",
                json!({"rope_theta": self.rope_theta, "rope_type": "default",
                       "type": "default", "mrope_section": section}),
            ),
            ("bos_token_id", json!(self.bos_token_id)),
            ("eos_token_id", json!(self.eos_token_id)),
            ("pad_token_id", Value::Null),
            ("tie_word_embeddings", json!(self.tie_word_embeddings)),
            ("dtype", json!("float32")),
        ] {
            text.insert(key.to_owned(), value);
        }
        json!({
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "image_token_id": token_ids.image,
            "video_token_id": token_ids.video,
            "vision_start_token_id": token_ids.vision_start,
            "vision_end_token_id": token_ids.vision_end,
            "dtype": "float32",
            "text_config": Value::Object(text),
            "vision_config": vision,
        })
    }
}

/// Ids of the tokens that stand for images; unused for text, but part of the config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpecialIds {
    /// `<|image_pad|>`.
    pub image: i64,
    /// `<|video_pad|>`.
    pub video: i64,
    /// `<|vision_start|>`.
    pub vision_start: i64,
    /// `<|vision_end|>`.
    pub vision_end: i64,
}

impl Default for SpecialIds {
    fn default() -> Self {
        SpecialIds { image: 151_655, video: 151_656, vision_start: 151_652, vision_end: 151_653 }
    }
}

/// A quarter of the half-width for time, the rest shared by height and width: [16, 24, 24] for 128.
fn default_section(head_dim: i64) -> Vec<i64> {
    let half = head_dim / 2;
    let time = half / 4;
    let height = (half - time) / 2;
    vec![time, height, half - time - height]
}
