//! `metrics.jsonl`: one line for each committed iteration, in order, each once, in the folder of the
//! run. Stores that are no folder have the same numbers in their tables only.
//!
//! Like the tables, lines are synced before the next checkpoint: until then the scheduler's state can tell
//! the iterations again.

use super::metrics;
use crate::clock;
use crate::error::CoordinatorError;
use duet_core::scheduler::IterationLineage;
use serde_json::{Map, Value};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Its name.
pub const NAME: &str = "metrics.jsonl";

/// The open file.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
    /// The newest iteration in it.
    last: Option<u64>,
}

impl MetricsFile {
    /// Opens it, or makes it. What a crash left of lines that were not synced is taken away, with all after
    /// it.
    ///
    /// # Errors
    /// The system refuses.
    pub fn open(folder: &Path) -> Result<MetricsFile, CoordinatorError> {
        let path = folder.join(NAME);
        let failed = |source| CoordinatorError::File { path: path.display().to_string(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed)?;
        let (mut whole, mut last) = (0, None);
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            let of = |line: &[u8]| {
                serde_json::from_slice::<Value>(line).ok()?.get("iteration")?.as_u64()
            };
            let Some(iteration) = of(line).filter(|_| line.ends_with(b"\n")) else { break };
            whole += line.len();
            last = Some(iteration);
        }
        if whole < bytes.len() {
            let (lost, path) = (bytes.len() - whole, path.display());
            tracing::warn!(%path, lost, "a line is damaged: it and what follows are taken away, and told again as far back as the last checkpoint; the tables have all");
        }
        file.set_len(whole as u64).map_err(failed)?;
        file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(MetricsFile { path, file, last })
    }

    /// Appends an iteration's line, unless it is there. It is not synced.
    ///
    /// # Errors
    /// The system refuses.
    pub fn append(&mut self, lineage: &IterationLineage) -> Result<(), CoordinatorError> {
        let iteration = u64::from(lineage.iteration);
        if self.last.is_some_and(|last| iteration <= last) {
            return Ok(());
        }
        let mut object = Map::new();
        object.insert("iteration".to_owned(), iteration.into());
        object.insert("time_ms".to_owned(), clock::unix_now().0.into());
        for (name, value) in metrics::row(lineage) {
            object.insert(name, value.into());
        }
        let line = format!("{}\n", Value::Object(object));
        let before = self.file.stream_position();
        let written = before.and_then(|before| {
            self.file.write_all(line.as_bytes()).inspect_err(|_| {
                // Half a line in the middle would spoil the file for its readers.
                drop(self.file.set_len(before));
                drop(self.file.seek(SeekFrom::Start(before)));
            })
        });
        written.map_err(|source| self.failed(source))?;
        self.last = Some(iteration);
        Ok(())
    }

    /// Makes all lines durable.
    ///
    /// # Errors
    /// The system refuses.
    pub fn sync(&self) -> Result<(), CoordinatorError> {
        self.file.sync_data().map_err(|source| self.failed(source))
    }

    fn failed(&self, source: std::io::Error) -> CoordinatorError {
        CoordinatorError::File { path: self.path.display().to_string(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use duet_core::work::{Gates, Weights, Window};
    use duet_core::{Digest, PolicyVersion};

    fn iteration(iteration: u32) -> IterationLineage {
        let version = PolicyVersion(u64::from(iteration) + 1);
        IterationLineage {
            iteration,
            sampled_with: PolicyVersion(u64::from(iteration)),
            gates: Gates { llm: 0.5, dit: 0.5 },
            window: Window::default(),
            weights: Weights { version, llm: None, dit: None, digest: Digest([0; 32]) },
            metrics: [("loss".to_owned(), 0.25)].into(),
            trees: Vec::new(),
        }
    }

    fn iterations(path: &Path) -> Vec<u64> {
        let text = std::fs::read_to_string(path).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|line| line["iteration"].as_u64().unwrap()).collect()
    }

    #[test]
    fn each_iteration_stands_there_once_also_after_a_crash_in_the_middle_of_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(NAME);
        let mut file = MetricsFile::open(folder.path()).unwrap();
        (0..3).for_each(|i| file.append(&iteration(i)).unwrap());
        drop(file);
        let text = std::fs::read(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 5]).unwrap();
        let mut file = MetricsFile::open(folder.path()).unwrap();
        assert_eq!(iterations(&path), [0, 1]);
        (0..4).for_each(|i| file.append(&iteration(i)).unwrap());
        assert_eq!(iterations(&path), [0, 1, 2, 3]);
        // A loss of power may leave zeros where a line should be, and sound lines after it.
        let mut text = std::fs::read(&path).unwrap();
        let second = text.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        text[second..second + 8].fill(0);
        std::fs::write(&path, &text).unwrap();
        let mut file = MetricsFile::open(folder.path()).unwrap();
        assert_eq!(iterations(&path), [0]);
        (0..4).for_each(|i| file.append(&iteration(i)).unwrap());
        file.sync().unwrap();
        assert_eq!(iterations(&path), [0, 1, 2, 3]);
    }
}
