//! `export`: a whole pipeline folder with the trained weights put on.

use crate::args::ExportArgs;
use crate::error::WorkError;
use crate::load;

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
    engine.pipeline().publish(&args.model, &args.out)?;
    Ok(())
}
