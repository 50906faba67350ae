//! Worked examples from a file: JSON lines or Parquet, with the same fields.
//!
//! | field | also called | |
//! |---|---|---|
//! | `prompt` | `text` | what a user types |
//! | `reasoning` | `cot`, `chain_of_thought` | what is thought about it |
//! | `refined` | `refined_prompt`, `revised_prompt` | what the image is drawn from |
//! | `response` | | the whole answer, in place of the two |
//!
//! Other fields are passed over: data sets carry much that is not learned.

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::DataType;
use duet_models::template::MARKER;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::Deserialize;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// The longest line that is read, in bytes.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// A file of worked examples that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The system refused.
    #[error("cannot read worked examples from {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file is no Parquet, or lacks a column.
    #[error("{}: {reason}", path.display())]
    Table {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the fix.
        reason: String,
    },
    /// A row is no worked example.
    #[error("{}, {unit} {row}: {reason}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// `line` or `row`.
        unit: &'static str,
        /// Which, from one.
        row: usize,
        /// What is wrong, and the fix.
        reason: String,
    },
    /// There is nothing in it.
    #[error(
        "{} has no worked examples: give {{\"prompt\": \"...\", \"reasoning\": \"...\", \
         \"refined\": \"...\"}}, one a line",
        path.display()
    )]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// A prompt and what is to be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worked {
    /// What a user types.
    pub prompt: String,
    /// All that the assistant says.
    pub response: String,
}

/// A row as it is written.
#[derive(Debug, Default, Deserialize)]
struct Row {
    #[serde(alias = "text")]
    prompt: Option<String>,
    #[serde(alias = "cot", alias = "chain_of_thought")]
    reasoning: Option<String>,
    #[serde(alias = "refined_prompt", alias = "revised_prompt")]
    refined: Option<String>,
    response: Option<String>,
}

/// The fields with their other names, for Parquet.
const FIELDS: [&[&str]; 4] = [
    &["prompt", "text"],
    &["reasoning", "cot", "chain_of_thought"],
    &["refined", "refined_prompt", "revised_prompt"],
    &["response"],
];

impl Row {
    fn worked(self) -> Result<Worked, String> {
        let full = |text: Option<String>| text.filter(|text| !text.trim().is_empty());
        let prompt = full(self.prompt).ok_or("`prompt` is missing or empty")?;
        let response = match (full(self.response), full(self.refined), full(self.reasoning)) {
            (Some(_), Some(_), _) => {
                return Err("has `response` and `refined`; give one of them".to_owned());
            }
            (Some(response), None, _) => response,
            (None, Some(refined), Some(reasoning)) => {
                format!("{reasoning}\n{MARKER}\n{refined}")
            }
            (None, Some(refined), None) => format!("{MARKER}\n{refined}"),
            (None, None, _) => {
                return Err("has neither `refined` nor `response` to learn".to_owned());
            }
        };
        Ok(Worked { prompt, response })
    }
}

/// Reads a file: Parquet where its name ends so, else JSON lines.
///
/// # Errors
/// [`DataError`] naming the file, and the row where one is wrong.
pub fn read(path: &Path) -> Result<Vec<Worked>, DataError> {
    let table = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("parquet"));
    let list = if table { parquet(path)? } else { lines(path)? };
    if list.is_empty() {
        return Err(DataError::Empty { path: path.to_owned() });
    }
    Ok(list)
}

fn open(path: &Path) -> Result<File, DataError> {
    File::open(path).map_err(|source| DataError::Io { path: path.to_owned(), source })
}

fn lines(path: &Path) -> Result<Vec<Worked>, DataError> {
    let mut file = BufReader::new(open(path)?);
    let mut list = Vec::new();
    for number in 1.. {
        let bad =
            |reason| DataError::Row { path: path.to_owned(), unit: "line", row: number, reason };
        let mut line = Vec::new();
        let read = file.by_ref().take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut line);
        let read = read.map_err(|source| DataError::Io { path: path.to_owned(), source })?;
        if read == 0 {
            break;
        }
        if read as u64 > MAX_LINE_BYTES {
            return Err(bad(format!("longer than {MAX_LINE_BYTES} bytes")));
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let row: Row = serde_json::from_slice(&line).map_err(|error| bad(error.to_string()))?;
        list.push(row.worked().map_err(bad)?);
    }
    Ok(list)
}

fn parquet(path: &Path) -> Result<Vec<Worked>, DataError> {
    let table = |reason: String| DataError::Table { path: path.to_owned(), reason };
    let builder = ParquetRecordBatchReaderBuilder::try_new(open(path)?)
        .map_err(|error| table(format!("not a Parquet file: {error}")))?;
    let schema = builder.schema().clone();
    let wanted: Vec<usize> = schema
        .fields()
        .iter()
        .enumerate()
        .filter(|(_, field)| FIELDS.iter().any(|names| names.contains(&field.name().as_str())))
        .map(|(index, _)| index)
        .collect();
    let mask = ProjectionMask::roots(builder.parquet_schema(), wanted);
    let reader = builder.with_projection(mask).build();
    let mut list = Vec::new();
    for batch in reader.map_err(|error| table(error.to_string()))? {
        let batch = batch.map_err(|error| table(error.to_string()))?;
        let columns = FIELDS.map(|names| column(&batch, names));
        let [prompt, reasoning, refined, response] = columns.map(|column| column.map_err(table));
        let columns = [prompt?, reasoning?, refined?, response?];
        for row in 0..batch.num_rows() {
            let [prompt, reasoning, refined, response] =
                [0, 1, 2, 3].map(|field: usize| columns[field].get(row).cloned().flatten());
            let worked = Row { prompt, reasoning, refined, response }.worked();
            list.push(worked.map_err(|reason| DataError::Row {
                path: path.to_owned(),
                unit: "row",
                row: list.len() + 1,
                reason,
            })?);
        }
    }
    Ok(list)
}

/// The texts of a column that has one of these names; nothing where there is none.
fn column(batch: &RecordBatch, names: &[&str]) -> Result<Vec<Option<String>>, String> {
    let Some((name, column)) =
        names.iter().find_map(|name| Some((name, batch.column_by_name(name)?)))
    else {
        return Ok(Vec::new());
    };
    let texts = cast(column, &DataType::Utf8)
        .map_err(|_| format!("column `{name}` holds {}, not text", column.data_type()))?;
    let texts = texts.as_string_opt::<i32>().ok_or_else(|| format!("column `{name}`: no text"))?;
    let text = |row| texts.is_valid(row).then(|| texts.value(row).to_owned());
    Ok((0..texts.len()).map(text).collect())
}
