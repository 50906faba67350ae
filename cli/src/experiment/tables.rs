//! The raw numbers, as Parquet.

use super::{Experiment, RowResult, read_evaluation};
use crate::CliError;
use crate::report::metrics;
use arrow::array::{ArrayRef, BooleanArray, Float64Array, RecordBatch, StringArray, UInt32Array};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use std::path::Path;
use std::sync::Arc;

/// A column under its name.
type Column = (&'static str, ArrayRef);

fn words(name: &'static str, list: Vec<String>) -> Column {
    (name, Arc::new(StringArray::from(list)))
}

fn counts(name: &'static str, list: Vec<u32>) -> Column {
    (name, Arc::new(UInt32Array::from(list)))
}

fn numbers(name: &'static str, list: Vec<f64>) -> Column {
    (name, Arc::new(Float64Array::from(list)))
}

fn flags(name: &'static str, list: Vec<Option<bool>>) -> Column {
    (name, Arc::new(BooleanArray::from(list)))
}

/// Writes `rows.parquet`, `images.parquet` and `curves.parquet` into `folder`.
///
/// # Errors
/// An evaluation cannot be read, or a file not be written.
pub fn write(
    experiment: &Experiment,
    results: &[RowResult],
    folder: &Path,
) -> Result<(), CliError> {
    std::fs::create_dir_all(folder).map_err(|e| CliError::io("create", folder, e))?;
    file(&folder.join("rows.parquet"), rows(results))?;
    file(&folder.join("images.parquet"), images(experiment, results)?)?;
    file(&folder.join("curves.parquet"), curves(experiment, results)?)
}

fn file(path: &Path, columns: Vec<Column>) -> Result<(), CliError> {
    let wrong = |error: String| CliError::io("write", path, std::io::Error::other(error));
    let columns = columns.into_iter().map(|(name, column)| (name, column, true));
    let batch = RecordBatch::try_from_iter_with_nullable(columns);
    let batch = batch.map_err(|error| wrong(error.to_string()))?;
    let out = std::fs::File::create(path).map_err(|e| CliError::io("create", path, e))?;
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .build();
    let write = || -> Result<(), parquet::errors::ParquetError> {
        let mut writer = ArrowWriter::try_new(out, batch.schema(), Some(properties))?;
        writer.write(&batch)?;
        writer.close().map(drop)
    };
    write().map_err(|error| wrong(error.to_string()))
}

/// An evaluation a line.
fn rows(results: &[RowResult]) -> Vec<Column> {
    let all: Vec<(&RowResult, u32, &super::Accuracies)> = results
        .iter()
        .flat_map(|result| (0u32..).zip(&result.evaluations).map(move |(i, e)| (result, i, e)))
        .collect();
    let share = |of: fn(&super::Accuracies) -> f64| all.iter().map(|(_, _, e)| of(e)).collect();
    vec![
        words("row", all.iter().map(|(r, _, _)| r.row.clone()).collect()),
        counts("seed", all.iter().map(|(r, _, _)| r.seed).collect()),
        counts("evaluation", all.iter().map(|(_, i, _)| *i).collect()),
        numbers("image_right", share(|e| e.semantic_accuracy)),
        numbers("refined_prompt_right", share(|e| e.trace_accuracy)),
        numbers("image_as_refined", share(|e| e.render_accuracy)),
        numbers("well_formed", share(|e| e.well_formed)),
        numbers("training_images", all.iter().map(|(r, _, _)| r.training_images as f64).collect()),
        numbers("training_seconds", all.iter().map(|(r, _, _)| r.seconds).collect()),
    ]
}

/// An image a line.
fn images(experiment: &Experiment, results: &[RowResult]) -> Result<Vec<Column>, CliError> {
    let (mut row, mut prompt, mut category, mut refined) = (vec![], vec![], vec![], vec![]);
    let (mut target, mut judged) = (vec![], vec![]);
    let (mut seed, mut evaluation, mut number, mut image) = (vec![], vec![], vec![], vec![]);
    let mut right = Vec::new();
    let name = |subject: &Option<_>| -> String {
        subject.as_ref().map_or_else(String::new, crate::report::evaluation::Subject::to_string)
    };
    for result in results {
        for repeat in 0..result.evaluations.len() as u32 {
            let folder = experiment.evaluation(result.seed, &result.row, repeat);
            for one in read_evaluation(&folder)?.prompts {
                for (k, shown) in (0u32..).zip(&one.images) {
                    row.push(result.row.clone());
                    seed.push(result.seed);
                    evaluation.push(repeat);
                    number.push(one.row as u32);
                    image.push(k);
                    prompt.push(one.prompt.clone());
                    category.push(one.category.clone());
                    refined.push(one.refined_prompt.clone());
                    target.push(name(&one.target));
                    judged.push(name(&shown.judged));
                    right.push(shown.semantic);
                }
            }
        }
    }
    Ok(vec![
        words("row", row),
        counts("seed", seed),
        counts("evaluation", evaluation),
        counts("prompt_row", number),
        counts("image", image),
        words("category", category),
        words("prompt", prompt),
        words("refined_prompt", refined),
        words("target", target),
        words("judged", judged),
        flags("right", right),
    ])
}

/// A metric of an iteration a line.
fn curves(experiment: &Experiment, results: &[RowResult]) -> Result<Vec<Column>, CliError> {
    let (mut row, mut metric) = (vec![], vec![]);
    let (mut seed, mut iteration, mut value) = (vec![], vec![], vec![]);
    for result in results.iter().filter(|result| result.iterations > 0) {
        let folder = experiment.row_folder(result.seed, &result.row);
        for line in metrics::read(&folder.join("metrics.jsonl"))? {
            for (name, number) in line.values {
                row.push(result.row.clone());
                seed.push(result.seed);
                iteration.push(line.iteration);
                metric.push(name);
                value.push(number);
            }
        }
    }
    Ok(vec![
        words("row", row),
        counts("seed", seed),
        counts("iteration", iteration),
        words("metric", metric),
        numbers("value", value),
    ])
}
