//! `summary.json`: what a run was and what it achieved, for programs; and as a table for people.

use super::ReportError;
use super::evaluation::{Accuracy, Evaluation};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Cell, CellAlignment, Table};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// What only the launcher of a run knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Name of the run.
    pub name: String,
    /// The seed it was started with.
    pub seed: u64,
    /// Committed optimiser steps.
    pub iterations: u32,
    /// Images that were rendered and scored for training.
    pub images: u64,
    /// Images a second, over the training alone.
    pub images_per_second: f64,
    /// From start to end: bootstrap, evaluations and training together.
    pub wall_seconds: f64,
    /// Seconds by phase (`bootstrap`, `evaluate before`, `train`, `evaluate after`).
    pub phases: BTreeMap<String, f64>,
    /// The most memory all processes together had resident, in MiB.
    pub peak_rss_mib: f64,
    /// How many workers of each role.
    pub workers: BTreeMap<String, u32>,
    /// Hash over all trained tensors in name order, after the last step.
    pub weights_digest: String,
}

/// One side of the comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Side {
    /// Accuracies over all held-out prompts.
    #[serde(flatten)]
    pub accuracy: Accuracy,
    /// How many prompts.
    pub prompts: usize,
    /// How many images.
    pub images: usize,
    /// Accuracies by category.
    pub categories: BTreeMap<String, Accuracy>,
}

impl From<&Evaluation> for Side {
    fn from(evaluation: &Evaluation) -> Side {
        Side {
            accuracy: evaluation.totals,
            prompts: evaluation.prompts.len(),
            images: evaluation.prompts.iter().map(|prompt| prompt.images.len()).sum(),
            categories: evaluation.categories.clone(),
        }
    }
}

/// The held-out prompts before and after training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldOut {
    /// The base model.
    pub before: Side,
    /// The trained model.
    pub after: Side,
}

/// `summary.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The run.
    #[serde(flatten)]
    pub facts: Facts,
    /// What it achieved.
    pub held_out: HeldOut,
    /// What lies beside `summary.json`, by what it is.
    pub files: BTreeMap<String, String>,
}

impl Summary {
    /// File name in the run's folder.
    pub const NAME: &'static str = "summary.json";

    /// Puts a summary together.
    pub fn new(facts: Facts, before: &Evaluation, after: &Evaluation) -> Summary {
        let held_out = HeldOut { before: before.into(), after: after.into() };
        Summary { facts, held_out, files: BTreeMap::new() }
    }

    /// Writes `folder/summary.json`, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), ReportError> {
        let path = folder.join(Self::NAME);
        let mut text = serde_json::to_vec_pretty(self).map_err(|source| ReportError::Json {
            path: path.clone(),
            line: 0,
            source,
        })?;
        text.push(b'\n');
        super::write_whole(&path, &text)
    }

    /// Reads `folder/summary.json`.
    ///
    /// # Errors
    /// The file is missing or is not a summary.
    pub fn read(folder: &Path) -> Result<Summary, ReportError> {
        let path = folder.join(Self::NAME);
        let bytes =
            std::fs::read(&path).map_err(|source| ReportError::io("read", &path, source))?;
        serde_json::from_slice(&bytes).map_err(|source| ReportError::Json { path, line: 0, source })
    }
}

/// The final table of the terminal: accuracies before and after, then the facts of the run.
pub fn table(summary: &Summary) -> String {
    format!("{}\n{}", accuracies(&summary.held_out), facts(&summary.facts))
}

fn new_table() -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table
}

fn percent(share: f64) -> Cell {
    Cell::new(format!("{:.1} %", 100.0 * share)).set_alignment(CellAlignment::Right)
}

fn points(before: f64, after: f64) -> Cell {
    Cell::new(format!("{:+.1}", 100.0 * (after - before))).set_alignment(CellAlignment::Right)
}

fn accuracies(held_out: &HeldOut) -> Table {
    let mut table = new_table();
    let (before, after) = (&held_out.before, &held_out.after);
    let title = format!("held-out accuracy ({} prompts)", after.prompts);
    table.set_header([title.as_str(), "before", "after", "points"]);
    let mut row = |name: &str, before: f64, after: f64| {
        table.add_row([Cell::new(name), percent(before), percent(after), points(before, after)]);
    };
    let (b, a) = (&before.accuracy, &after.accuracy);
    row("image shows the right thing", b.semantic_accuracy, a.semantic_accuracy);
    for (category, b) in &before.categories {
        if let Some(a) = after.categories.get(category) {
            let name = format!("  {}", category.replace(['_', '-'], " "));
            row(&name, b.semantic_accuracy, a.semantic_accuracy);
        }
    }
    row("refined prompt names the right thing", b.trace_accuracy, a.trace_accuracy);
    row("image shows what is named", b.render_accuracy, a.render_accuracy);
    table
}

fn facts(facts: &Facts) -> Table {
    let mut table = new_table();
    let workers: Vec<String> =
        facts.workers.iter().map(|(role, count)| format!("{count} {role}")).collect();
    let phases: Vec<String> =
        facts.phases.iter().map(|(phase, seconds)| format!("{phase} {seconds:.0} s")).collect();
    let mut row = |name: &str, value: String| {
        if !value.is_empty() {
            table.add_row([Cell::new(name), Cell::new(value)]);
        }
    };
    row("iterations", facts.iterations.to_string());
    row("training images", format!("{} ({:.1} a second)", facts.images, facts.images_per_second));
    row("wall time", format!("{:.0} s", facts.wall_seconds));
    row("of which", phases.join(", "));
    row("peak memory, all processes", format!("{:.0} MiB", facts.peak_rss_mib));
    row("workers", workers.join(", "));
    row("seed", facts.seed.to_string());
    row("weights", facts.weights_digest.clone());
    table
}
