//! A trained pipeline in place of the folder that it came from.

use super::Pipeline;
use crate::error::{ModelError, Result};
use std::path::Path;

/// What the folder of a base model holds besides the pipeline, and the trained one shall keep.
const BESIDES: [&str; 2] = ["miniworld", "duet.json"];

impl Pipeline {
    /// Writes the folder `out`, whole or not at all, in place of a folder of that name, and takes
    /// over what lies in the base model's folder `base` besides the pipeline.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn publish(&self, base: &Path, out: &Path) -> Result<()> {
        let partial = out.with_extension("partial");
        remove(&partial)?;
        self.save(&partial)?;
        for name in BESIDES {
            copy(&base.join(name), &partial.join(name))?;
        }
        remove(out)?;
        std::fs::rename(&partial, out).map_err(|error| ModelError::io(out, error))
    }
}

fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(ModelError::io(folder, error))
        }
        _ => Ok(()),
    }
}

/// Copies a file or a folder; what is not there is passed over.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let io = |path: &Path, error| ModelError::io(path, error);
    if from.is_dir() {
        std::fs::create_dir_all(to).map_err(|error| io(to, error))?;
        for entry in std::fs::read_dir(from).map_err(|error| io(from, error))? {
            let entry = entry.map_err(|error| io(from, error))?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
    } else if from.is_file() && !to.exists() {
        std::fs::copy(from, to).map_err(|error| io(to, error))?;
    }
    Ok(())
}
