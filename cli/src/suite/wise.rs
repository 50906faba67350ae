//! WISE: `data/cultural_common_sense.json`, `spatio-temporal_reasoning.json`, `natural_science.json` of
//! <https://github.com/PKU-YuanGroup/WISE>.

use super::{Item, list, words, wrong};
use crate::CliError;
use serde_json::Value;
use std::path::Path;

/// The six categories and their weights in the overall WiScore (`WISE_legacy/README.md`).
pub const WEIGHTS: [(&str, f64); 6] = [
    ("cultural", 0.4),
    ("time", 0.167),
    ("space", 0.133),
    ("biology", 0.1),
    ("physics", 0.1),
    ("chemistry", 0.1),
];

/// The category of a prompt: the benchmark's own scripts go by its number, and tell time from space by
/// the sub-category.
fn category(id: u64, subcategory: &str) -> Option<&'static str> {
    Some(match id {
        1..=400 => "cultural",
        401..=700 if subcategory.to_lowercase().contains("time") => "time",
        401..=700 => "space",
        701..=800 => "biology",
        801..=900 => "physics",
        901..=1000 => "chemistry",
        _ => return None,
    })
}

/// The prompts of a file.
///
/// # Errors
/// An entry lacks something, or its number is not WISE's.
pub fn items(path: &Path, text: &str) -> Result<Vec<Item>, CliError> {
    let one = |(at, entry): (usize, Value)| {
        let prompt = words(path, at, &entry, "Prompt")?.to_owned();
        words(path, at, &entry, "Explanation")?;
        let id = entry.get("prompt_id").and_then(Value::as_u64);
        let subcategory = entry.get("Subcategory").and_then(Value::as_str).unwrap_or_default();
        let category = id.and_then(|id| category(id, subcategory)).ok_or_else(|| {
            wrong(path, &format!("entry {}: `prompt_id` must be a number from 1 to 1000", at + 1))
        })?;
        let id = id.unwrap_or_default().to_string();
        Ok(Item { id, prompt, category: category.to_owned(), meta: entry })
    };
    list(path, text)?.into_iter().enumerate().map(one).collect()
}
