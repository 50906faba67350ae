//! Prompt files: one JSON object a line, `{"prompt": "...", "meta": ...}`; where a person wants to
//! see something drawn, also plain text, one prompt a line.
//!
//! `meta` is whatever scorers need to know of the prompt; it is passed through untouched. Rows are
//! numbered in file order; empty lines are passed over.

use duet_core::work::PromptRow;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// The longest line that is read, in bytes.
pub const MAX_LINE_BYTES: u64 = 64 << 10;
/// The most prompts of a file.
pub const MAX_PROMPTS: usize = 10_000_000;

/// A prompt file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PromptsError {
    /// The system refused.
    #[error("cannot read prompts from {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// There is no prompt in it.
    #[error("{} has no prompts: give one JSON object a line, {{\"prompt\": \"...\"}}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A line is not a prompt.
    #[error("{}, line {line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Its line, from one.
        line: usize,
        /// What is wrong, and the fix.
        reason: String,
    },
}

/// A line as it is written.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Line {
    #[serde(alias = "text")]
    prompt: String,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    meta: Value,
}

/// Reads a prompt file.
///
/// # Errors
/// [`PromptsError`] naming the file, and the line where one is wrong.
pub fn read(path: &Path) -> Result<Vec<PromptRow>, PromptsError> {
    read_with(path, parse)
}

/// Reads a prompt file, or a text file: where the name does not end in `.jsonl`, each line is a
/// prompt.
///
/// # Errors
/// As [`read`]; a line of text that is a JSON object was not meant to be drawn, and is refused.
pub fn read_or_text(path: &Path) -> Result<Vec<PromptRow>, PromptsError> {
    let jsonl = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("jsonl"));
    read_with(path, if jsonl { parse } else { parse_text })
}

fn read_with(
    path: &Path,
    parse: fn(&[u8], u64) -> Result<PromptRow, String>,
) -> Result<Vec<PromptRow>, PromptsError> {
    let file = File::open(path);
    let file = file.map_err(|source| PromptsError::Io { path: path.to_owned(), source })?;
    lines(path, BufReader::new(file), parse)
}

/// Reads what a prompt file called `path` holds.
///
/// # Errors
/// As [`read`].
pub fn from_reader(path: &Path, from: impl BufRead) -> Result<Vec<PromptRow>, PromptsError> {
    lines(path, from, parse)
}

fn lines(
    path: &Path,
    mut file: impl BufRead,
    parse: fn(&[u8], u64) -> Result<PromptRow, String>,
) -> Result<Vec<PromptRow>, PromptsError> {
    let io = |source| PromptsError::Io { path: path.to_owned(), source };
    let mut rows = Vec::new();
    let mut number = 0;
    loop {
        let mut line = Vec::new();
        number += 1;
        let bad =
            |reason: String| PromptsError::Line { path: path.to_owned(), line: number, reason };
        // One byte more than is allowed tells a line that is too long from one that just fits.
        let read =
            file.by_ref().take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut line).map_err(io)?;
        if read == 0 {
            break;
        }
        if line.len() as u64 > MAX_LINE_BYTES {
            return Err(bad(format!("longer than {MAX_LINE_BYTES} bytes; is this a prompt file?")));
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        if rows.len() == MAX_PROMPTS {
            return Err(bad(format!("more than {MAX_PROMPTS} prompts; split the file")));
        }
        rows.push(parse(&line, rows.len() as u64).map_err(bad)?);
    }
    if rows.is_empty() {
        return Err(PromptsError::Empty { path: path.to_owned() });
    }
    Ok(rows)
}

fn parse(line: &[u8], row: u64) -> Result<PromptRow, String> {
    let line: Line = serde_json::from_slice(line)
        .map_err(|error| format!("{error}; expected {{\"prompt\": \"...\", \"meta\": ...}}"))?;
    if line.prompt.trim().is_empty() {
        return Err("`prompt` is empty: write what is to be drawn, or take the line out".to_owned());
    }
    let meta = match line.meta {
        Value::Null => String::new(),
        Value::String(meta) => meta,
        meta => meta.to_string(),
    };
    Ok(PromptRow { row, text: line.prompt, meta })
}

fn parse_text(line: &[u8], row: u64) -> Result<PromptRow, String> {
    let text = std::str::from_utf8(line)
        .map_err(|error| format!("{error}; a text file in UTF-8 expected, one prompt a line"))?;
    // Some editors begin a file with a byte order mark.
    let text = text.trim_start_matches('\u{feff}').trim();
    if text.starts_with('{') && serde_json::from_str::<Value>(text).is_ok() {
        return Err("a JSON object in a text file: name the file `.jsonl`".to_owned());
    }
    if text.is_empty() {
        return Err("nothing but a byte order mark: take the line out".to_owned());
    }
    Ok(PromptRow { row, text: text.to_owned(), meta: String::new() })
}

/// The text of a prompt file with these rows, in this order.
pub fn to_text(rows: &[PromptRow]) -> String {
    let line = |row: &PromptRow| {
        // As a value only where that reads back as the same text: a text may look like a number, and
        // come back rounded.
        let value = serde_json::from_str(&row.meta).ok();
        let value = value.filter(|value: &Value| {
            let text = value.to_string();
            !value.is_null() && !value.is_string() && text == row.meta
        });
        let text = || match row.meta.as_str() {
            "" => Value::Null,
            meta => Value::String(meta.to_owned()),
        };
        let meta = value.unwrap_or_else(text);
        let line = Line { prompt: row.text.clone(), meta };
        serde_json::to_string(&line).unwrap_or_default() + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: impl AsRef<[u8]>) -> Result<Vec<PromptRow>, PromptsError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.jsonl");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    fn row(row: u64, text: &str, meta: &str) -> PromptRow {
        PromptRow { row, text: text.to_owned(), meta: meta.to_owned() }
    }

    #[test]
    fn rows_are_numbered_and_meta_is_passed_through() {
        let text = "{\"prompt\": \"a red seven\", \"meta\": {\"digit\": 7}}\n\n{\"text\":\"b\"}\r\n\
                    {\"prompt\": \"c\", \"meta\": \"plain words\"}";
        let rows = of(text).unwrap();
        let expected =
            [row(0, "a red seven", "{\"digit\":7}"), row(1, "b", ""), row(2, "c", "plain words")];
        assert_eq!(rows, expected);
        assert_eq!(of(to_text(&rows)).unwrap(), rows);
    }

    #[test]
    fn a_text_file_has_a_prompt_on_each_line() {
        let folder = tempfile::tempdir().unwrap();
        let read = |name: &str, text: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            read_or_text(&path)
        };
        let text = "\u{feff}a red seven\r\n\n  três {pássaros}\n".as_bytes();
        let expected = [row(0, "a red seven", ""), row(1, "três {pássaros}", "")];
        assert_eq!(read("prompts.txt", text).unwrap(), expected);
        assert_eq!(read("prompts", text).unwrap(), expected);
        let json = b"{\"prompt\": \"a red seven\"}\n";
        assert_eq!(read("prompts.jsonl", json).unwrap(), [row(0, "a red seven", "")]);
        let said = |name: &str, text: &[u8]| read(name, text).unwrap_err().to_string();
        assert!(said("a.txt", json).contains("name the file `.jsonl`"));
        assert!(said("a.jsonl", b"a red seven").contains("a.jsonl, line 1"));
        assert!(said("a.txt", b"ok\n\xff\n").contains("a.txt, line 2"));
        assert!(said("a.txt", b"\n").contains("has no prompts"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let said = |text: &[u8]| of(text).unwrap_err().to_string();
        assert!(said(b"").contains("has no prompts"));
        assert!(said(b"\n \n").contains("has no prompts"));
        assert!(said(b"{\"prompt\":\"a\"}\nnot json\n").contains("line 2"));
        assert!(said(b"{\"prompt\":\"a\",\"digit\":7}\n").contains("unknown field `digit`"));
        assert!(said(b"{\"prompt\":\"  \"}\n").contains("`prompt` is empty"));
        assert!(said(b"{\"meta\":{}}\n").contains("missing field `prompt`"));
        assert!(said(b"{\"prompt\":\"\xff\"}\n").contains("line 1"));
        let huge = vec![b'x'; MAX_LINE_BYTES as usize * 3];
        assert!(said(&huge).contains("longer than 65536 bytes"));
        let missing = read(Path::new("no/such/prompts.jsonl")).unwrap_err().to_string();
        assert!(missing.contains("no/such/prompts.jsonl"), "{missing}");
    }
}
