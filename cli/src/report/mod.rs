//! What a run leaves behind for people: the before/after grid, the learning curves, TensorBoard
//! event files, `summary.json` and the final table. Files in, files out; no network, no libtorch.

pub mod canvas;
pub mod curves;
pub mod evaluation;
pub mod grid;
pub mod metrics;
pub mod panels;
pub mod summary;
pub mod tensorboard;
#[cfg(test)]
mod tests;

pub use evaluation::{Accuracy, Evaluation};
pub use summary::{Facts, Summary, table};

use image::RgbImage;
use metrics::Metrics;
use std::path::{Path, PathBuf};

/// What can go wrong while a report is made.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A file cannot be read or written.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// `read` or `write`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not the JSON it should be.
    #[error("{}{} is not what it should be: {source}", path.display(), at(*line))]
    Json {
        /// The file.
        path: PathBuf,
        /// Its line, from one; zero when the file is one value.
        line: usize,
        /// Why.
        source: serde_json::Error,
    },
    /// A line of `metrics.jsonl` names no iteration.
    #[error("{}, line {line}: no `iteration`, a whole number from zero", path.display())]
    NoIteration {
        /// The file.
        path: PathBuf,
        /// Its line, from one.
        line: usize,
    },
    /// A picture cannot be read or encoded.
    #[error("cannot use the picture {}: {source}", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// Why.
        source: image::ImageError,
    },
    /// The compiled-in font files are damaged.
    #[error("the fonts in this program are damaged: build it again")]
    Font,
}

fn at(line: usize) -> String {
    if line == 0 { String::new() } else { format!(", line {line},") }
}

impl ReportError {
    fn io(what: &'static str, path: &Path, source: std::io::Error) -> ReportError {
        ReportError::Io { what, path: path.to_owned(), source }
    }
}

/// Where a run's report goes and what it is made from, all below one folder.
#[derive(Clone, Debug)]
pub struct Places {
    /// The run's folder, `runs/<name>`.
    pub run: PathBuf,
    /// `metrics.jsonl`.
    pub metrics: PathBuf,
    /// Folder of the evaluation of the base model.
    pub before: PathBuf,
    /// Folder of the evaluation of the trained model.
    pub after: PathBuf,
}

/// The most prompts in the grid.
pub const GRID_ROWS: usize = 6;

/// Writes `grid.png`, `curves.png`, `tensorboard/` and `summary.json` into the run's folder.
///
/// `files` are further things that lie there (`model`, `lineage`, ...), listed in the summary as
/// they are given.
///
/// # Errors
/// An input is missing or broken, or a file cannot be written.
pub fn write(
    places: &Places,
    facts: Facts,
    files: &[(&str, &str)],
) -> Result<Summary, ReportError> {
    let before = Evaluation::read(&places.before)?;
    let after = Evaluation::read(&places.after)?;
    let metrics = metrics::read(&places.metrics)?;
    let pictures = grid::draw(&grid::of_run(&before, &after, GRID_ROWS)?)?;
    save_png(&places.run.join("grid.png"), &pictures)?;
    curves::save(&places.run.join("curves.png"), &facts.name, &metrics)?;
    write_tensorboard(&places.run.join("tensorboard"), &metrics, &before, &after)?;
    let mut summary = Summary::new(facts, &before, &after);
    let own = [("grid", "grid.png"), ("curves", "curves.png"), ("tensorboard", "tensorboard")];
    let named = |(what, path): &(&str, &str)| ((*what).to_owned(), (*path).to_owned());
    summary.files = own.iter().chain(files).map(named).collect();
    summary.write(&places.run)?;
    Ok(summary)
}

/// Writes the event file of a run: all metrics, and the images of the grid's prompts at step 0 and
/// after the last.
fn write_tensorboard(
    folder: &Path,
    metrics: &[Metrics],
    before: &Evaluation,
    after: &Evaluation,
) -> Result<(), ReportError> {
    let mut writer = tensorboard::EventWriter::create(folder)?;
    for row in metrics {
        writer.scalars(row)?;
    }
    let first = metrics.first().map_or(0.0, |row| row.at);
    let last = metrics.last().map_or((1, first), |row| (row.iteration + 1, row.at));
    for (was, is) in grid::choose(before, after, GRID_ROWS) {
        let sides = [(before, was, (0, first)), (after, is, last)];
        for (evaluation, prompt, (step, at)) in sides {
            if let Some(image) = prompt.images.first() {
                let tag = format!("held_out/{:03} {}", prompt.row, prompt.prompt);
                writer.image(&tag, step, at, &evaluation.picture(image)?)?;
            }
        }
    }
    writer.finish()
}

/// The PNG bytes of a picture; `path` is named in an error.
fn png(path: &Path, picture: &RgbImage) -> Result<Vec<u8>, ReportError> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, image::ImageFormat::Png)
        .map_err(|source| ReportError::Picture { path: path.to_owned(), source })?;
    Ok(bytes.into_inner())
}

/// Writes a picture, whole or not at all.
fn save_png(path: &Path, picture: &RgbImage) -> Result<(), ReportError> {
    write_whole(path, &png(path, picture)?)
}

/// Writes a file beside its place, then moves it there.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), ReportError> {
    let beside = path.with_extension("partial");
    let moved = std::fs::write(&beside, bytes).and_then(|()| std::fs::rename(&beside, path));
    moved.map_err(|source| ReportError::io("write", path, source))
}
