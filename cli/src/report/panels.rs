//! What the panels of the learning curves show: which metrics, under which names.

use super::canvas::palette;
use super::metrics::{Metrics, series};

/// One line of a panel.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub label: String,
    /// `(iteration, value)`, by iteration.
    pub points: Vec<(f64, f64)>,
}

/// How a panel's values are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Linear, fitted to the values.
    Linear,
    /// Linear from 0 to 1: shares.
    Share,
    /// Logarithmic; values that are not positive are left out.
    Log,
}

/// One panel.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// Heading.
    pub title: &'static str,
    /// Vertical axis.
    pub axis: Axis,
    /// Its lines.
    pub series: Vec<Series>,
}

/// The most lines of a panel: as many as there are colours.
const MOST: usize = palette::SERIES.len();

/// The four panels of a run.
pub fn panels(metrics: &[Metrics]) -> [Panel; 4] {
    let metrics: &[Metrics] = &metrics.iter().map(with_clipped_share).collect::<Vec<_>>();
    let names: std::collections::BTreeSet<&str> =
        metrics.iter().flat_map(|row| row.values.keys().map(String::as_str)).collect();
    let pick = |title, axis, choose: &dyn Fn(&str) -> Option<(u8, String)>| {
        let mut found: Vec<(u8, String, &str)> = names
            .iter()
            .filter_map(|name| choose(name).map(|(rank, label)| (rank, label, *name)))
            .collect();
        found.sort();
        let line = |(_, label, name)| Series { label, points: series(metrics, name) };
        Panel { title, axis, series: found.into_iter().take(MOST).map(line).collect() }
    };
    [
        pick("Reward by branch", Axis::Linear, &branch),
        pick("Reward by component", Axis::Linear, &|name| {
            let component = name.strip_prefix("rewards/")?.strip_suffix("/mean")?;
            Some((0, component.replace('_', " ")))
        }),
        pick("Traces and groups", Axis::Share, &share),
        pick("Optimisers", Axis::Log, &optimiser),
    ]
}

/// Adds `clip_ratio/region_mean`, the share clipped on either side, where only the two sides are
/// told.
fn with_clipped_share(row: &Metrics) -> Metrics {
    let mut row = row.clone();
    let sums: Vec<(String, f64)> = row
        .values
        .iter()
        .filter_map(|(name, low)| {
            let stem = name.strip_suffix("clip_ratio/low_mean")?;
            let high = row.values.get(&format!("{stem}clip_ratio/high_mean"))?;
            Some((format!("{stem}clip_ratio/region_mean"), low + high))
        })
        .collect();
    for (name, sum) in sums {
        row.values.entry(name).or_insert(sum);
    }
    row
}

fn branch(name: &str) -> Option<(u8, String)> {
    let (rank, label) = match name {
        "reward/llm" => (0, "LLM (mean over images)"),
        "reward/dit" => (1, "DiT (per image)"),
        "reward" => (2, "both"),
        _ => return None,
    };
    Some((rank, label.to_owned()))
}

fn share(name: &str) -> Option<(u8, String)> {
    let (rank, label) = match name {
        _ if name.ends_with("well_formed") => (0, "well-formed traces"),
        "completions/clipped_ratio" => (1, "cut off at the limit"),
        "frac_reward_zero_std" => (2, "groups without spread"),
        "frac_reward_zero_std/llm" => (3, "LLM groups without spread"),
        "frac_reward_zero_std/dit" => (4, "DiT groups without spread"),
        _ => return None,
    };
    Some((rank, label.to_owned()))
}

fn optimiser(name: &str) -> Option<(u8, String)> {
    let parts: Vec<&str> = name.split('/').collect();
    let (rank, what) = match () {
        () if parts.contains(&"grad_norm") => (0, "gradient norm"),
        () if parts.contains(&"kl") => (2, "KL"),
        () if parts.contains(&"clip_ratio") && parts.contains(&"region_mean") => {
            (4, "clipped share")
        }
        () => return None,
    };
    Some(match () {
        () if parts.contains(&"llm") => (rank, format!("LLM {what}")),
        () if parts.contains(&"dit") => (rank + 1, format!("DiT {what}")),
        () => (rank, what.to_owned()),
    })
}
