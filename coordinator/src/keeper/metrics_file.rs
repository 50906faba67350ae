//! `metrics.jsonl`: one line for each committed iteration, in order, each once, in the folder of the
//! run. Stores that are no folder have the same numbers in their tables only.

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
    /// Opens it, or makes it; a last line that a crash cut off is taken away.
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
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        file.set_len(whole as u64).map_err(failed)?;
        file.seek(SeekFrom::End(0)).map_err(failed)?;
        let iterations = bytes[..whole].split(|byte| *byte == b'\n').filter_map(|line| {
            serde_json::from_slice::<Value>(line).ok()?.get("iteration")?.as_u64()
        });
        let last = iterations.max();
        Ok(MetricsFile { path, file, last })
    }

    /// Appends an iteration's line, unless it is there.
    ///
    /// # Errors
    /// The system refuses; the next line makes good for a torn one when the file is opened again.
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
            self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data()).inspect_err(
                |_| {
                    // Half a line in the middle would spoil the file for its readers.
                    drop(self.file.set_len(before));
                    drop(self.file.seek(SeekFrom::Start(before)));
                },
            )
        });
        written.map_err(|source| CoordinatorError::File {
            path: self.path.display().to_string(),
            source,
        })?;
        self.last = Some(iteration);
        Ok(())
    }
}
