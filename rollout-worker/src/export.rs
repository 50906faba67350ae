//! `export`: a whole pipeline folder with the trained weights put on.

use crate::args::ExportArgs;
use crate::error::WorkError;
use crate::load;
use duet_models::ModelError;
use std::path::Path;

/// What the folder of a base model holds besides the pipeline, and the trained one shall keep.
const BESIDES: [&str; 2] = ["miniworld", "duet.json"];

/// Writes `args.out`: whole or not at all, in place of a folder of that name.
///
/// # Errors
/// The base model or a weights file cannot be read, or the folder not be written.
pub fn export(args: &ExportArgs) -> Result<(), WorkError> {
    let mut engine = load::engine(&args.model, &args.sampling())?;
    if !args.average.is_empty() {
        let (weights, files) = load::averages(&args.average)?;
        engine.hold(&weights, files)?;
        engine.activate(&weights)?;
    }
    let partial = args.out.with_extension("partial");
    remove(&partial)?;
    engine.pipeline().save(&partial)?;
    for name in BESIDES {
        copy(&args.model.join(name), &partial.join(name))?;
    }
    remove(&args.out)?;
    std::fs::rename(&partial, &args.out).map_err(|error| ModelError::io(&args.out, error))?;
    Ok(())
}

fn remove(folder: &Path) -> Result<(), ModelError> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(ModelError::io(folder, error))
        }
        _ => Ok(()),
    }
}

/// Copies a file or a folder; what is not there is passed over.
fn copy(from: &Path, to: &Path) -> Result<(), ModelError> {
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
