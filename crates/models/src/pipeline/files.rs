//! Small files of a pipeline folder.

use crate::error::{ModelError, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Files larger than this are not carried through a folder.
const MAX_BYTES: u64 = 64 << 20;

/// Hashes of a folder's files, as `duet digest --write` writes them: they say nothing of another
/// folder, so they are not carried through.
const SUMS: &str = "B3SUMS";

/// The text of a file of at most `max` bytes.
pub(crate) fn read_text(path: &Path, max: u64) -> Result<String> {
    let size = std::fs::metadata(path).map_err(|error| ModelError::io(path, error))?.len();
    if size > max {
        return Err(ModelError::bad_file(path, format!("{size} bytes; at most {max} expected")));
    }
    std::fs::read_to_string(path).map_err(|error| ModelError::io(path, error))
}

/// A JSON file.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = read_text(path, MAX_BYTES)?;
    serde_json::from_str(&text)
        .map_err(|error| ModelError::bad_file(path, format!("not valid JSON: {error}")))
}

/// Writes a JSON file, for people too.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    std::fs::write(path, format!("{value:#}\n")).map_err(|error| ModelError::io(path, error))
}

/// Puts what `AutoTokenizer` and `AutoProcessor` look for at a folder's root there, where it is only in
/// `tokenizer/` and `processor/` (or nowhere: published pipelines that make images from text alone have no
/// processor). What is at the root stays as it is.
pub(crate) fn complete(
    files: &mut BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    preprocessor: &Value,
) {
    let mut found = BTreeMap::new();
    for sub in ["tokenizer", "processor"] {
        found.extend(files.get(sub).into_iter().flatten().map(|(n, b)| (n.clone(), b.clone())));
    }
    let root = files.entry(String::new()).or_default();
    if root.contains_key("tokenizer_config.json") {
        // Files of one tokenizer, not parts of two.
        let of_processor = |name: &str| name.contains("processor_config");
        found.retain(|name, _| of_processor(name));
    }
    found
        .entry("preprocessor_config.json".to_owned())
        .or_insert_with(|| format!("{preprocessor:#}\n").into_bytes());
    for (name, bytes) in found {
        root.entry(name).or_insert(bytes);
    }
}

/// Every file of `folder` that is neither weights nor an index of weights, by name.
pub(crate) fn carry(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(files),
        Err(error) => return Err(ModelError::io(folder, error)),
    };
    for entry in entries {
        let entry = entry.map_err(|error| ModelError::io(folder, error))?;
        let (path, Ok(name)) = (entry.path(), entry.file_name().into_string()) else {
            continue;
        };
        let weights = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
        let size = entry.metadata().map_err(|error| ModelError::io(&path, error))?.len();
        if path.is_file() && !weights && name != SUMS && size <= MAX_BYTES && !name.starts_with('.')
        {
            let bytes = std::fs::read(&path).map_err(|error| ModelError::io(&path, error))?;
            files.insert(name, bytes);
        }
    }
    Ok(files)
}
