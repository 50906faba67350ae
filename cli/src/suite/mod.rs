//! Suites of evaluation prompts: what is asked, in which categories, and how the suite adds up.
//!
//! | format | files | category | score of an image |
//! |---|---|---|---|
//! | `wise` | a JSON list with `Prompt`, `Explanation`, `prompt_id` | culture, time, ... | WiScore |
//! | `t2i-reasonbench` | a JSON list with `prompt`; beside it, questions | its four dimensions | accuracy, quality |
//! | `duet` | a prompt file, one JSON object a line | `meta.category` | every component |
//!
//! The files are the user's: none of a suite's contents are part of this program.

mod reasonbench;
pub mod score;
mod wise;

use crate::CliError;
use serde_json::Value;
use std::fmt;
use std::path::{Path, PathBuf};

/// The largest file of a suite that is read, in bytes.
const MAX_BYTES: u64 = 256 << 20;

/// Whose suite it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// WISE (arXiv 2503.07265), as of its paper: WiScore.
    Wise,
    /// T2I-ReasonBench (arXiv 2508.17472).
    T2iReasonbench,
    /// A prompt file of Duet's own.
    Duet,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Wise => "WISE",
            Format::T2iReasonbench => "T2I-ReasonBench",
            Format::Duet => "prompt file",
        })
    }
}

/// A prompt of a suite.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// What the suite calls it.
    pub id: String,
    /// What is to be drawn.
    pub prompt: String,
    /// The category it counts for; empty when the suite does not say.
    pub category: String,
    /// Whatever a scorer needs to know of it.
    pub meta: Value,
}

/// A suite, read.
#[derive(Clone, Debug, PartialEq)]
pub struct Suite {
    /// Whose it is.
    pub format: Format,
    /// Its prompts, in order.
    pub items: Vec<Item>,
}

/// Reads the files of a suite; what they are is seen from their contents where it is not said.
///
/// # Errors
/// A file is missing or broken; the error names it, and the entry.
pub fn read(
    files: &[PathBuf],
    questions: &[PathBuf],
    format: Option<Format>,
) -> Result<Suite, CliError> {
    let mut suite: Option<Suite> = None;
    for path in files {
        let text = text(path)?;
        let format = format.map_or_else(|| guess(path, &text), Ok)?;
        let items = match format {
            Format::Wise => wise::items(path, &text)?,
            Format::T2iReasonbench => reasonbench::items(path, &text)?,
            Format::Duet => own(path)?,
        };
        match &mut suite {
            None => suite = Some(Suite { format, items }),
            Some(suite) if suite.format == format => suite.items.extend(items),
            Some(suite) => {
                let first = suite.format;
                return Err(wrong(path, &format!("is of {format}, the files before of {first}")));
            }
        }
    }
    let mut suite =
        suite.ok_or_else(|| CliError::Usage("no suite: give --suite FILE".to_owned()))?;
    for path in questions {
        if suite.format != Format::T2iReasonbench {
            return Err(wrong(path, "only T2I-ReasonBench has questions"));
        }
        reasonbench::ask(path, &text(path)?, &mut suite.items)?;
    }
    if suite.items.is_empty() {
        return Err(CliError::Usage("the suite has no prompts".to_owned()));
    }
    Ok(suite)
}

fn text(path: &Path) -> Result<String, CliError> {
    let size = std::fs::metadata(path).map_err(|e| CliError::io("read", path, e))?.len();
    if size > MAX_BYTES {
        return Err(wrong(path, &format!("has {size} bytes; is it a suite?")));
    }
    std::fs::read_to_string(path).map_err(|e| CliError::io("read", path, e))
}

/// The format that a file seems to have.
fn guess(path: &Path, text: &str) -> Result<Format, CliError> {
    if !text.trim_start().starts_with('[') {
        return Ok(Format::Duet);
    }
    let list = list(path, text)?;
    let has = |key: &str| list.first().is_some_and(|first| first.get(key).is_some());
    match (has("Prompt"), has("prompt")) {
        (true, _) => Ok(Format::Wise),
        (false, true) => Ok(Format::T2iReasonbench),
        _ => Err(wrong(
            path,
            "is a JSON list whose entries have neither `Prompt` (WISE) nor `prompt` \
             (T2I-ReasonBench)",
        )),
    }
}

/// The entries of a JSON list of objects.
fn list(path: &Path, text: &str) -> Result<Vec<Value>, CliError> {
    let list: Vec<Value> = serde_json::from_str(text)
        .map_err(|error| wrong(path, &format!("is no JSON list: {error}")))?;
    match list.iter().position(|entry| !entry.is_object()) {
        Some(at) => Err(wrong(path, &format!("entry {} is no object", at + 1))),
        None => Ok(list),
    }
}

/// A text of an entry, with something in it.
fn words<'a>(path: &Path, at: usize, entry: &'a Value, key: &str) -> Result<&'a str, CliError> {
    let found = entry.get(key).and_then(Value::as_str).filter(|text| !text.trim().is_empty());
    found.ok_or_else(|| wrong(path, &format!("entry {}: `{key}` is missing or empty", at + 1)))
}

fn wrong(path: &Path, reason: &str) -> CliError {
    CliError::Usage(format!("{} {reason}", path.display()))
}

/// A prompt file of Duet's own.
fn own(path: &Path) -> Result<Vec<Item>, CliError> {
    let rows =
        duet_config::prompts::read(path).map_err(|error| CliError::Usage(error.to_string()))?;
    let item = |row: duet_core::work::PromptRow| {
        let meta: Value = serde_json::from_str(&row.meta).unwrap_or(Value::String(row.meta));
        let category = meta.get("category").and_then(Value::as_str).unwrap_or_default();
        Item { id: row.row.to_string(), prompt: row.text, category: category.to_owned(), meta }
    };
    Ok(rows.into_iter().map(item).collect())
}

#[cfg(test)]
mod tests;
