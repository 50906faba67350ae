//! The Qwen tokenizer: byte-level BPE by Hugging Face's `tokenizers`, read from and written to the
//! files that transformers' `Qwen2Tokenizer` uses.

mod train;

pub use train::SPECIAL_TOKENS;

use crate::error::{ModelError, Result};
use crate::pipeline::{read_json, read_text};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// The pre-tokenisation of Qwen2 (transformers `tokenization_qwen2.py`): words with the space before
/// them, single digits, runs of punctuation.
const SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Largest tokenizer file that is read.
const MAX_BYTES: u64 = 64 << 20;

/// A tokenizer with the folder it came from.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    config: Value,
    chat_template: Option<String>,
    end_of_text: i64,
    im_end: i64,
}

impl Tokenizer {
    /// Reads a `tokenizer/` folder: `tokenizer.json`, or `vocab.json` with `merges.txt` and the
    /// added tokens of `tokenizer_config.json`.
    pub fn load(folder: &Path) -> Result<Tokenizer> {
        let config_path = folder.join("tokenizer_config.json");
        let config = if config_path.is_file() { read_json(&config_path)? } else { json!({}) };
        let whole = folder.join("tokenizer.json");
        let inner = if whole.is_file() {
            let text = read_text(&whole, MAX_BYTES)?;
            tokenizers::Tokenizer::from_bytes(text.as_bytes())
                .map_err(|error| ModelError::bad_file(&whole, error.to_string()))?
        } else {
            from_vocab_files(folder, &config)?
        };
        let template = folder.join("chat_template.jinja");
        let chat_template = if template.is_file() {
            Some(read_text(&template, MAX_BYTES)?)
        } else {
            config.get("chat_template").and_then(Value::as_str).map(str::to_owned)
        };
        Tokenizer::build(inner, config, chat_template, &folder.display().to_string())
    }

    fn build(
        inner: tokenizers::Tokenizer,
        config: Value,
        chat_template: Option<String>,
        origin: &str,
    ) -> Result<Tokenizer> {
        let id = |token: &str| {
            inner.token_to_id(token).map(i64::from).ok_or_else(|| {
                ModelError::Tokenizer(format!("{origin}: the special token `{token}` is missing"))
            })
        };
        let (end_of_text, im_end) = (id("<|endoftext|>")?, id("<|im_end|>")?);
        Ok(Tokenizer { inner, config, chat_template, end_of_text, im_end })
    }

    /// Ids of `text`; special tokens written out in it are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|error| ModelError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().iter().map(|id| i64::from(*id)).collect())
    }

    /// The text of `ids`, without special tokens. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[i64]) -> Result<String> {
        let ids: Vec<u32> = ids.iter().filter_map(|id| u32::try_from(*id).ok()).collect();
        self.inner.decode(&ids, true).map_err(|error| ModelError::Tokenizer(error.to_string()))
    }

    /// The id of one token, as it is written in the vocabulary.
    pub fn id(&self, token: &str) -> Option<i64> {
        self.inner.token_to_id(token).map(i64::from)
    }

    /// `<|endoftext|>`: ends a document, and pads.
    pub fn end_of_text(&self) -> i64 {
        self.end_of_text
    }

    /// `<|im_end|>`: ends a turn.
    pub fn im_end(&self) -> i64 {
        self.im_end
    }

    /// Number of tokens, special ones included.
    pub fn size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The chat template that came with the tokenizer.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The files of a `tokenizer/` folder that transformers' `Qwen2Tokenizer` reads, fast or slow.
    pub fn files(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        let whole =
            self.inner.to_string(true).map_err(|error| ModelError::Tokenizer(error.to_string()))?;
        let parsed: Value = serde_json::from_str(&whole)
            .map_err(|error| ModelError::Tokenizer(error.to_string()))?;
        let model = parsed.get("model").cloned().unwrap_or_default();
        let vocab = model.get("vocab").cloned().unwrap_or_else(|| json!({}));
        let mut merges = String::from("#version: 0.2\n");
        for merge in model.get("merges").and_then(Value::as_array).into_iter().flatten() {
            let line = match merge {
                Value::String(line) => line.clone(),
                Value::Array(pair) => {
                    pair.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ")
                }
                _ => continue,
            };
            merges.push_str(&line);
            merges.push('\n');
        }
        let added = parsed.get("added_tokens").and_then(Value::as_array);
        let mut files = BTreeMap::new();
        let mut text = |name: &str, content: String| {
            files.insert(name.to_owned(), content.into_bytes());
        };
        text("tokenizer.json", whole);
        text("vocab.json", vocab.to_string());
        text("merges.txt", merges);
        text("added_tokens.json", added_ids(added).to_string());
        text("special_tokens_map.json", pretty(&special_map()));
        text("tokenizer_config.json", pretty(&self.config_json(added)));
        if let Some(template) = &self.chat_template {
            text("chat_template.jinja", template.clone());
        }
        Ok(files)
    }

    fn config_json(&self, added: Option<&Vec<Value>>) -> Value {
        let mut config = match &self.config {
            Value::Object(config) => config.clone(),
            _ => Map::new(),
        };
        let mut decoder = Map::new();
        for token in added.into_iter().flatten() {
            let (Some(id), Value::Object(fields)) = (token.get("id"), token) else {
                continue;
            };
            let mut fields = fields.clone();
            fields.remove("id");
            decoder.insert(id.to_string(), Value::Object(fields));
        }
        config.insert("added_tokens_decoder".to_owned(), Value::Object(decoder));
        for (key, value) in [
            ("tokenizer_class", json!("Qwen2Tokenizer")),
            ("add_prefix_space", json!(false)),
            ("add_bos_token", json!(false)),
            ("bos_token", Value::Null),
            ("eos_token", json!("<|im_end|>")),
            ("pad_token", json!("<|endoftext|>")),
            ("unk_token", Value::Null),
            ("errors", json!("replace")),
            ("split_special_tokens", json!(false)),
            ("clean_up_tokenization_spaces", json!(false)),
            ("model_max_length", json!(131_072)),
        ] {
            match config.get(key) {
                Some(has) if !has.is_null() => {}
                _ => drop(config.insert(key.to_owned(), value)),
            }
        }
        // transformers 5.x writes a list, which 4.57 takes for names of attributes; both read this name.
        if let Some(Value::Array(list)) = config.get("extra_special_tokens").cloned() {
            config.remove("extra_special_tokens");
            config.insert("additional_special_tokens".to_owned(), Value::Array(list));
        }
        if let Some(template) = &self.chat_template {
            config.insert("chat_template".to_owned(), json!(template));
        }
        Value::Object(config)
    }
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn added_ids(added: Option<&Vec<Value>>) -> Value {
    let pairs = added.into_iter().flatten().filter_map(|token| {
        Some((token.get("content")?.as_str()?.to_owned(), token.get("id")?.clone()))
    });
    Value::Object(pairs.collect())
}

fn special_map() -> Value {
    json!({
        "additional_special_tokens": &SPECIAL_TOKENS[1..],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    })
}

/// The description of a Qwen tokenizer in the format of `tokenizer.json`.
fn description(vocab: Value, merges: Value, added: Value) -> Value {
    let split = json!({"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated",
                       "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
                       "use_regex": false});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes]},
        "post_processor": bytes,
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocab, "merges": merges,
        },
    })
}

fn from_description(description: &Value, origin: &str) -> Result<tokenizers::Tokenizer> {
    tokenizers::Tokenizer::from_bytes(description.to_string().as_bytes())
        .map_err(|error| ModelError::Tokenizer(format!("{origin}: {error}")))
}

fn from_vocab_files(folder: &Path, config: &Value) -> Result<tokenizers::Tokenizer> {
    let vocab = read_json(&folder.join("vocab.json"))?;
    let text = read_text(&folder.join("merges.txt"), MAX_BYTES)?;
    let merges: Vec<[&str; 2]> = text
        .lines()
        .filter(|line| !line.starts_with("#version"))
        .filter_map(|line| line.split_once(' ').map(|(a, b)| [a, b]))
        .collect();
    let mut added: Vec<Value> = Vec::new();
    let decoder = config.get("added_tokens_decoder").and_then(Value::as_object);
    for (id, token) in decoder.into_iter().flatten() {
        let (Ok(id), Value::Object(fields)) = (id.parse::<u64>(), token) else {
            continue;
        };
        let mut fields = fields.clone();
        fields.insert("id".to_owned(), json!(id));
        added.push(Value::Object(fields));
    }
    added.sort_by_key(|token| token.get("id").and_then(Value::as_u64));
    let origin = folder.display().to_string();
    from_description(&description(vocab, json!(merges), json!(added)), &origin)
}
