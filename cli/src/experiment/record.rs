//! What a row of the experiment leaves behind, and what it reads.

use crate::CliError;
use crate::report::evaluation::EvaluatedPrompt;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// `result.json`: a row of one seed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RowResult {
    /// What it was made by: another recipe is done again.
    pub recipe: String,
    /// The row.
    pub row: String,
    /// The seed.
    pub seed: u32,
    /// Images that reinforcement learning rendered and scored.
    pub training_images: u64,
    /// Optimiser steps of reinforcement learning.
    pub iterations: u64,
    /// Seconds of reinforcement learning.
    pub seconds: f64,
    /// The evaluations.
    pub evaluations: Vec<Accuracies>,
    /// The commands that make it again, in order.
    pub commands: Vec<String>,
}

/// What an evaluation came to, each a share.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Accuracies {
    /// Images in which the judge sees the prompt's true digit in its true colour.
    pub semantic_accuracy: f64,
    /// Refined prompts that name it.
    pub trace_accuracy: f64,
    /// Images in which the judge sees what the refined prompt names.
    pub render_accuracy: f64,
    /// Traces with the marker.
    pub well_formed: f64,
}

/// What is read of `eval.json`.
#[derive(Debug, Deserialize)]
pub(super) struct Evaluated {
    /// The accuracies.
    pub totals: Accuracies,
    /// Every prompt, in file order.
    pub prompts: Vec<EvaluatedPrompt>,
}

/// Reads an evaluation's folder.
///
/// # Errors
/// It holds none.
pub(super) fn read_evaluation(folder: &Path) -> Result<Evaluated, CliError> {
    let path = folder.join("eval.json");
    let bytes = std::fs::read(&path).map_err(|e| CliError::io("read", &path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| CliError::Usage(format!("{}: {e}", path.display())))
}
