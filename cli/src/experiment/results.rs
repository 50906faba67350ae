//! `docs/results`: the table, the curves, the commands, the raw numbers.

use super::rows::{ORDERINGS, Row};
use super::statistics::{Comparison, Mean, compare};
use super::{Accuracies, Experiment, RowResult, tables};
use crate::CliError;
use crate::report::metrics::{self, Metrics};
use crate::report::panels::{Axis, Panel, Series};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Cell, CellAlignment, Table};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

/// A row over all seeds.
#[derive(Clone, Debug, Serialize)]
pub struct RowSummary {
    /// Its name in files.
    pub row: String,
    /// Its name for people.
    pub label: String,
    /// Images in which the judge sees the right digit in the right colour, of each seed.
    pub seeds: Vec<f64>,
    /// Their mean: what the rows are compared by.
    pub image_right: Mean,
    /// Refined prompts that name the right thing.
    pub refined_prompt_right: Mean,
    /// Images that show what the refined prompt names.
    pub image_as_refined: Mean,
    /// Answers with a refined prompt.
    pub well_formed: Mean,
    /// Images of training, the same for every seed.
    pub training_images: u64,
    /// Seconds of training, over all seeds.
    pub training_seconds: f64,
    /// WISE of the paper.
    pub paper_wise: String,
    /// T2I-ReasonBench, accuracy, of the paper.
    pub paper_reason: String,
}

/// `table.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The rows, in order.
    pub rows: Vec<RowSummary>,
    /// What the paper orders, as it came out.
    pub orderings: Vec<Comparison>,
}

impl Summary {
    /// Adds up what every seed came to.
    pub fn new(rows: &[Row], results: &[RowResult]) -> Summary {
        let rows: Vec<RowSummary> = rows.iter().filter_map(|row| summary(row, results)).collect();
        let of = |name: &str| rows.iter().find(|row| row.row == name).map(|row| &row.seeds);
        let orderings = ORDERINGS
            .iter()
            .filter_map(|(below, above)| compare((below, above), of(below)?, of(above)?));
        let orderings = orderings.collect();
        Summary { rows, orderings }
    }
}

fn summary(row: &Row, results: &[RowResult]) -> Option<RowSummary> {
    let own: Vec<&RowResult> = results.iter().filter(|result| result.row == row.id).collect();
    let each = |of: fn(&Accuracies) -> f64| -> Vec<f64> {
        let mean = |result: &&RowResult| {
            let sum: f64 = result.evaluations.iter().map(of).sum();
            sum / result.evaluations.len().max(1) as f64
        };
        own.iter().map(mean).collect()
    };
    let mean = |of| Mean::of(&each(of));
    Some(RowSummary {
        row: row.id.to_owned(),
        label: row.label.to_owned(),
        seeds: each(|e| e.semantic_accuracy),
        image_right: mean(|e| e.semantic_accuracy)?,
        refined_prompt_right: mean(|e| e.trace_accuracy)?,
        image_as_refined: mean(|e| e.render_accuracy)?,
        well_formed: mean(|e| e.well_formed)?,
        training_images: own.first().map_or(0, |result| result.training_images),
        training_seconds: own.iter().map(|result| result.seconds).sum(),
        paper_wise: row.wise.to_owned(),
        paper_reason: row.reason.to_owned(),
    })
}

const HEAD: [&str; 8] = [
    "row",
    "image right, %",
    "refined prompt right, %",
    "image as refined, %",
    "answers in form, %",
    "training images",
    "paper: WISE",
    "paper: T2I-Reason",
];

fn cells(row: &RowSummary) -> [String; 8] {
    let dash = |text: &str| if text.is_empty() { "–".to_owned() } else { text.to_owned() };
    [
        row.label.clone(),
        row.image_right.percent(),
        row.refined_prompt_right.percent(),
        row.image_as_refined.percent(),
        row.well_formed.percent(),
        row.training_images.to_string(),
        dash(&row.paper_wise),
        dash(&row.paper_reason),
    ]
}

/// The table of the terminal.
pub fn table(summary: &Summary) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(HEAD);
    for row in &summary.rows {
        let mut line: Vec<Cell> = Vec::new();
        for (at, text) in cells(row).into_iter().enumerate() {
            let cell = Cell::new(text);
            line.push(if at == 0 { cell } else { cell.set_alignment(CellAlignment::Right) });
        }
        table.add_row(line);
    }
    let mut orders = Table::new();
    orders.load_style(UTF8_FULL_CONDENSED);
    orders.set_header(["the paper's order", "difference, points", "beyond two standard errors"]);
    for one in &summary.orderings {
        let order = format!("{} < {}", one.below, one.above);
        let difference = Cell::new(one.difference.percent()).set_alignment(CellAlignment::Right);
        orders.add_row([Cell::new(order), difference, Cell::new(one.verdict)]);
    }
    format!("{table}\n{orders}")
}

/// Writes everything into the experiment's results folder.
///
/// # Errors
/// A file cannot be read or written.
pub fn write(
    experiment: &Experiment,
    summary: &Summary,
    results: &[RowResult],
) -> Result<(), CliError> {
    let out = &experiment.out;
    std::fs::create_dir_all(out).map_err(|e| CliError::io("create", out, e))?;
    tables::write(experiment, results, &out.join("raw"))?;
    let curves = curves(experiment, summary, results)?;
    let title = format!("the experiment, mean of {} seeds", experiment.seeds);
    let drawn = !curves.is_empty();
    if drawn {
        let panels = panels(&curves);
        crate::report::curves::save_panels(&out.join("curves.png"), &title, &panels)?;
    }
    let text = |path: &Path, text: String| {
        std::fs::write(path, text).map_err(|e| CliError::io("write", path, e))
    };
    let json = serde_json::to_string_pretty(summary).unwrap_or_default() + "\n";
    text(&out.join("table.json"), json)?;
    text(&out.join("commands.sh"), commands(experiment, results))?;
    text(&out.join("README.md"), page(experiment, summary, drawn))
}

/// Mean curves over seeds, of each row that was trained.
fn curves(
    experiment: &Experiment,
    summary: &Summary,
    results: &[RowResult],
) -> Result<Vec<(String, Vec<Metrics>)>, CliError> {
    let mut all = Vec::new();
    for row in &summary.rows {
        let mut sums: BTreeMap<u32, BTreeMap<String, (f64, f64)>> = BTreeMap::new();
        let own = results.iter().filter(|one| one.row == row.row && one.iterations > 0);
        for result in own {
            let folder = experiment.row_folder(result.seed, &result.row);
            for line in metrics::read(&folder.join("metrics.jsonl"))? {
                let place = sums.entry(line.iteration).or_default();
                for (name, value) in line.values {
                    let (sum, count) = place.entry(name).or_default();
                    (*sum, *count) = (*sum + value, *count + 1.0);
                }
            }
        }
        let mean = |(iteration, values): (u32, BTreeMap<String, (f64, f64)>)| Metrics {
            iteration,
            at: 0.0,
            values: values.into_iter().map(|(name, (sum, n))| (name, sum / n)).collect(),
        };
        if !sums.is_empty() {
            all.push((row.label.clone(), sums.into_iter().map(mean).collect()));
        }
    }
    Ok(all)
}

fn panels(curves: &[(String, Vec<Metrics>)]) -> [Panel; 4] {
    let panel = |title, axis, name: &str| {
        let line = |(label, rows): &(String, Vec<Metrics>)| Series {
            label: label.clone(),
            points: metrics::series(rows, name),
        };
        Panel { title, axis, series: curves.iter().map(line).collect() }
    };
    [
        panel("Semantic reward (is it what was asked for)", Axis::Linear, "rewards/semantic/mean"),
        panel("Aesthetic reward", Axis::Linear, "rewards/aesthetic/mean"),
        panel(
            "Consistency reward (is it where it should be)",
            Axis::Linear,
            "rewards/consistency/mean",
        ),
        panel("Well-formed answers", Axis::Share, "well_formed"),
    ]
}

/// Every command, row by row, each once.
fn commands(experiment: &Experiment, results: &[RowResult]) -> String {
    let mut text = format!(
        "#!/bin/sh\n# What `{}` did, step by step.\n# The binaries lie in target/debug.\nset -e\n",
        experiment.again()
    );
    let mut seen = std::collections::BTreeSet::new();
    for result in results {
        let _ = write!(text, "\n# seed {}, {}\n", result.seed, result.row);
        for command in &result.commands {
            if seen.insert(command) {
                text.push_str(command);
                text.push('\n');
            }
        }
    }
    text
}

fn page(experiment: &Experiment, summary: &Summary, drawn: bool) -> String {
    let mut page = String::from("# The paper's experiment in the small world\n\n");
    let seeds = experiment.seeds;
    let _ = write!(
        page,
        "`{}` wrote this page. It repeats, with {seeds} seed{} and a model of the small world, the rows \
         of tables 1, 4 and 5 of arXiv 2601.10332, and two that the paper does not show. Every row of \
         reinforcement learning renders and scores the same number of images. What is measured: of \
         held-out prompts, whose items no training prompt asks for, the share of images in which a judge, \
         which is never a reward, sees the right digit in the right colour. Mean over seeds ± standard \
         error.\n\n",
        experiment.again(),
        if seeds == 1 { "" } else { "s" }
    );
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    page += &line(&HEAD.map(str::to_owned));
    page += &line(&HEAD.map(|_| "---".to_owned()));
    for row in &summary.rows {
        page += &line(&cells(row));
    }
    page.push_str(
        "\nThe paper's columns are of other prompts, other models and other judges: only orders can be \
         compared. They are, seed by seed:\n\n| the paper's order | difference, points | beyond two \
         standard errors |\n|---|---|---|\n",
    );
    for one in &summary.orderings {
        let order = format!("{} < {}", one.below, one.above);
        page += &line(&[order, one.difference.percent(), one.verdict.to_owned()]);
    }
    if drawn {
        page.push_str(
            "\n![Rewards during training, mean of the seeds](curves.png)\n\n*Rewards on training \
             prompts.*\n",
        );
    }
    let seconds: f64 = summary.rows.iter().map(|row| row.training_seconds).sum();
    let _ = write!(
        page,
        "\nThe reinforcement learning of all rows and seeds took {} on the machine that wrote this. \
         `commands.sh` has every step as a command; `raw/` has every evaluation (`rows.parquet`), every \
         image with what was refined, asked and seen (`images.parquet`) and every metric of every \
         iteration (`curves.parquet`); `table.json` has this page's numbers.\n",
        crate::show::span(seconds)
    );
    page
}
