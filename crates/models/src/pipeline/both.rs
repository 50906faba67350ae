//! A folder that older and newer libraries read alike.
//!
//! transformers 5.x and diffusers after 0.36 write keys that their predecessors do not know, and leave out
//! what those look for; read by transformers 4.57, an untied head would even be tied without a word. What is
//! carried from such a folder is completed here: nothing that the newer ones read is changed.

use crate::error::Result;
use crate::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Files by sub-folder and name.
type Files = BTreeMap<String, BTreeMap<String, Vec<u8>>>;

/// Keys of the transformer and the autoencoder that diffusers 0.36 does not know. With these values they
/// say what their absence says.
fn newer(part: &str) -> Vec<(&'static str, Value)> {
    match part {
        "transformer" => ["use_additional_t_cond", "use_layer3d_rope", "zero_cond_t"]
            .map(|key| (key, json!(false)))
            .to_vec(),
        _ => vec![("input_channels", json!(3))],
    }
}

/// Completes what is carried from a folder.
pub(super) fn readable(files: &mut Files, tokenizer: &Tokenizer) -> Result<()> {
    let own = files.entry("tokenizer".to_owned()).or_default();
    // The slow tokenizer that `model_index.json` names reads these two.
    if !(own.contains_key("vocab.json") && own.contains_key("merges.txt")) {
        own.extend(tokenizer.files()?);
    }
    edit(files, "text_encoder", encoder);
    for part in ["transformer", "vae"] {
        edit(files, part, |config| {
            for (key, default) in newer(part) {
                if config.get(key) == Some(&default) {
                    config.remove(key);
                }
            }
        });
    }
    Ok(())
}

/// Changes a part's `config.json`, which stays as it is, byte for byte, where there is nothing to change.
fn edit(files: &mut Files, part: &str, change: impl Fn(&mut Map<String, Value>)) {
    let Some(bytes) = files.get_mut(part).and_then(|own| own.get_mut("config.json")) else {
        return;
    };
    // It was read before: what is no JSON object has been refused.
    let Ok(before) = serde_json::from_slice::<Map<String, Value>>(bytes) else { return };
    let mut after = before.clone();
    change(&mut after);
    if after != before {
        *bytes = format!("{:#}\n", Value::Object(after)).into_bytes();
    }
}

/// transformers 4.57 looks for these inside `text_config`, under the names it had for them.
fn encoder(config: &mut Map<String, Value>) {
    let tied = config.get("tie_word_embeddings").cloned();
    let Some(text) = config.get_mut("text_config").and_then(Value::as_object_mut) else { return };
    if let Some(tied) = tied {
        text.entry("tie_word_embeddings").or_insert(tied);
    }
    let Some(rope) = text.get("rope_parameters").and_then(Value::as_object).cloned() else {
        return;
    };
    if let Some(theta) = rope.get("rope_theta") {
        text.entry("rope_theta").or_insert_with(|| theta.clone());
    }
    let section = rope.get("mrope_section").cloned().unwrap_or(Value::Null);
    text.entry("rope_scaling").or_insert_with(
        || json!({"type": "default", "rope_type": "default", "mrope_section": section}),
    );
}
