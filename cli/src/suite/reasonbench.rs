//! T2I-ReasonBench: `prompts/*.json` with their `deepseek_evaluation_qs/*.json` of
//! <https://github.com/KaiyueSun98/T2I-ReasonBench>.

use super::{Item, list, words, wrong};
use crate::CliError;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// The four dimensions, and what tells their files.
pub const DIMENSIONS: [(&str, &str); 4] = [
    ("idiom", "idiom"),
    ("textual", "textual"),
    ("entity", "entity"),
    ("scientific", "scientific"),
];

/// What the accuracy of a dimension is made of: reasoning alone, or 0.7 of it with 0.3 of the other
/// details (`evaluation/Qwen2.5-VL/eval_*.py`).
pub fn details_count(category: &str) -> bool {
    matches!(category, "entity" | "scientific")
}

/// The dimension of a file, by its name.
fn dimension(path: &Path) -> Result<&'static str, CliError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let found = DIMENSIONS.iter().find(|(_, part)| name.contains(part));
    found.map(|(name, _)| *name).ok_or_else(|| {
        wrong(
            path,
            "is named after none of T2I-ReasonBench's dimensions: its name must have `idiom`, \
             `textual`, `entity` or `scientific` in it",
        )
    })
}

/// The prompts of a file; they are numbered from one, as the benchmark's images are.
///
/// # Errors
/// An entry lacks its prompt, or the file's name tells no dimension.
pub fn items(path: &Path, text: &str) -> Result<Vec<Item>, CliError> {
    let category = dimension(path)?;
    let one = |(at, entry): (usize, Value)| {
        let prompt = words(path, at, &entry, "prompt")?.to_owned();
        let id = format!("{category}-{:04}", at + 1);
        Ok(Item { id, prompt, category: category.to_owned(), meta: json!({ "prompt": entry }) })
    };
    list(path, text)?.into_iter().enumerate().map(one).collect()
}

/// Gives each prompt its questions, for the scorer.
///
/// # Errors
/// An entry has no `id`, or is about a prompt that is not there.
pub fn ask(path: &Path, text: &str, items: &mut [Item]) -> Result<(), CliError> {
    let category = dimension(path)?;
    let mut places: BTreeMap<String, usize> =
        items.iter().enumerate().map(|(at, item)| (item.id.clone(), at)).collect();
    for (at, entry) in list(path, text)?.into_iter().enumerate() {
        let id = entry.get("id").and_then(Value::as_u64);
        let id = id.ok_or_else(|| wrong(path, &format!("entry {}: `id` is no number", at + 1)))?;
        let place = places.remove(&format!("{category}-{id:04}")).ok_or_else(|| {
            wrong(path, &format!("entry {}: there is no {category} prompt {id}, or twice", at + 1))
        })?;
        items[place].meta["questions"] = entry;
    }
    let unasked = places.keys().find(|id| id.starts_with(category));
    match unasked {
        Some(id) => Err(wrong(path, &format!("has no questions for prompt {id}"))),
        None => Ok(()),
    }
}
