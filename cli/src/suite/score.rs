//! From the scorers' components to a suite's own scores: per image, per category, overall.

use super::{Format, Item, Suite, reasonbench, wise};
use crate::CliError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A line of `scores.jsonl`, as the reward worker writes it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct ImageScores {
    /// The prompt's place in the suite.
    pub row: u64,
    /// Which of its images.
    pub image: usize,
    /// Scores by component, in [0, 1].
    pub scores: BTreeMap<String, f64>,
    /// Why there is none, by component.
    #[serde(default)]
    pub failed: BTreeMap<String, String>,
}

/// Which component plays which part of a suite's score.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roles(BTreeMap<String, String>);

impl Roles {
    /// The usual ones with `changes`, each `ROLE=COMPONENT`.
    ///
    /// WISE's consistency, realism and aesthetic quality are Duet's `semantic`, `consistency` (is what
    /// is shown plausible) and `aesthetic`.
    ///
    /// # Errors
    /// A change is no such thing, or the suite has no such role.
    pub fn new(format: Format, changes: &[String]) -> Result<Roles, CliError> {
        let usual: &[(&str, &str)] = match format {
            Format::Wise => &[
                ("consistency", "semantic"),
                ("realism", "consistency"),
                ("aesthetic", "aesthetic"),
            ],
            Format::T2iReasonbench => {
                &[("reasoning", "semantic"), ("details", "details"), ("quality", "quality")]
            }
            Format::Duet => &[],
        };
        let mut roles: BTreeMap<String, String> =
            usual.iter().map(|(role, name)| ((*role).to_owned(), (*name).to_owned())).collect();
        for change in changes {
            let known = || {
                let known: Vec<&str> = usual.iter().map(|(role, _)| *role).collect();
                match known.is_empty() {
                    true => format!("a {format} takes the components as they are"),
                    false => format!("the roles of {format} are {}", known.join(", ")),
                }
            };
            let wrong = || CliError::Usage(format!("--role {change}: {}", known()));
            let (role, component) = change.split_once('=').ok_or_else(wrong)?;
            let place = roles.get_mut(role.trim()).ok_or_else(wrong)?;
            component.trim().clone_into(place);
        }
        Ok(Roles(roles))
    }

    fn of(&self, role: &str, scores: &BTreeMap<String, f64>) -> Option<f64> {
        scores.get(self.0.get(role)?).copied()
    }
}

/// The columns of a suite, the one that counts first; those of a prompt file are its components.
pub fn columns(format: Format, scores: &[ImageScores]) -> Vec<String> {
    let fixed: &[&str] = match format {
        Format::Wise => &["wiscore", "consistency", "realism", "aesthetic"],
        Format::T2iReasonbench => &["accuracy", "quality"],
        Format::Duet => {
            let all = scores.iter().flat_map(|one| one.scores.keys().chain(one.failed.keys()));
            let mut names: Vec<String> = all.cloned().collect();
            names.sort_by_key(|name| (name != "semantic", name.clone()));
            names.dedup();
            return names;
        }
    };
    fixed.iter().map(|name| (*name).to_owned()).collect()
}

/// A suite's scores of one image; what cannot be told is absent.
pub fn of_image(
    format: Format,
    item: &Item,
    scores: &BTreeMap<String, f64>,
    roles: &Roles,
) -> BTreeMap<String, f64> {
    let mut out = BTreeMap::new();
    match format {
        Format::Wise => {
            let parts = ["consistency", "realism", "aesthetic"].map(|role| roles.of(role, scores));
            for (name, part) in ["consistency", "realism", "aesthetic"].into_iter().zip(parts) {
                out.extend(part.map(|value| (name.to_owned(), value)));
            }
            if let [Some(c), Some(r), Some(a)] = parts {
                // WISE halves marks from 0 to 2; these are from 0 to 1.
                out.insert("wiscore".to_owned(), 0.7 * c + 0.2 * r + 0.1 * a);
            }
        }
        Format::T2iReasonbench => {
            let reasoning = roles.of("reasoning", scores);
            let details = roles.of("details", scores);
            let accuracy = match (reasoning, details) {
                (Some(reasoning), Some(details)) if reasonbench::details_count(&item.category) => {
                    Some(0.7 * reasoning + 0.3 * details)
                }
                (reasoning, _) => reasoning,
            };
            // Without a judge of quality, what is known of it: looks and plausibility.
            let both = || Some((scores.get("aesthetic")? + scores.get("consistency")?) / 2.0);
            let quality = roles.of("quality", scores).or_else(both);
            out.extend(accuracy.map(|value| ("accuracy".to_owned(), value)));
            out.extend(quality.map(|value| ("quality".to_owned(), value)));
        }
        Format::Duet => out.clone_from(scores),
    }
    out
}

/// Means of a category or of everything.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Means {
    /// How many prompts.
    pub prompts: usize,
    /// How many images.
    pub images: usize,
    /// Images that lack the score that counts.
    pub unscored: usize,
    /// Mean over images, by column; absent where no image has it.
    pub means: BTreeMap<String, f64>,
}

/// A suite, added up.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Totals {
    /// The columns, the one that counts first.
    pub columns: Vec<String>,
    /// By category, in the suite's order.
    pub categories: Vec<(String, Means)>,
    /// Everything, by the suite's weighting.
    pub overall: Means,
    /// What that weighting is.
    pub weighting: String,
    /// Categories of the suite that there was no score of: the overall score leaves them out.
    pub missing: Vec<String>,
}

/// Adds up the images of a suite: `images` has, for each item, the scores of each of its images.
pub fn totals(
    suite: &Suite,
    columns: Vec<String>,
    images: &[Vec<BTreeMap<String, f64>>],
) -> Totals {
    let main = columns.first().cloned().unwrap_or_default();
    let means = |keep: &dyn Fn(&Item) -> bool| {
        let kept = suite.items.iter().zip(images).filter(|(item, _)| keep(item));
        let lists: Vec<&Vec<_>> = kept.map(|(_, list)| list).collect();
        let all: Vec<&BTreeMap<String, f64>> = lists.iter().copied().flatten().collect();
        let mean = |name: &String| {
            let values: Vec<f64> = all.iter().filter_map(|one| one.get(name).copied()).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            (!values.is_empty()).then(|| (name.clone(), mean))
        };
        Means {
            prompts: lists.len(),
            images: all.len(),
            unscored: all.iter().filter(|one| !one.contains_key(&main)).count(),
            means: columns.iter().filter_map(mean).collect(),
        }
    };
    let order = order(suite);
    let of = |name: &String| (name.clone(), means(&|item: &Item| item.category == *name));
    let categories: Vec<(String, Means)> = order.iter().map(of).collect();
    let mut overall = means(&|_| true);
    let (weights, weighting): (BTreeMap<&str, f64>, &str) = match suite.format {
        Format::Wise => (
            wise::WEIGHTS.into(),
            "0.4 cultural + 0.167 time + 0.133 space + 0.1 (biology + physics + chemistry)",
        ),
        Format::T2iReasonbench => (
            reasonbench::DIMENSIONS.iter().map(|(name, _)| (*name, 0.25)).collect(),
            "mean of the four dimensions",
        ),
        Format::Duet => (BTreeMap::new(), "mean over all images"),
    };
    let mut missing = Vec::new();
    if !weights.is_empty() {
        let scored = |name: &str| {
            let found = categories.iter().find(|(category, _)| category == name);
            found.filter(|(_, means)| means.means.contains_key(&main))
        };
        missing =
            weights.keys().filter(|name| scored(name).is_none()).map(|n| (*n).to_owned()).collect();
        overall.means =
            columns.iter().filter_map(|name| weighted(name, &weights, &categories)).collect();
    }
    Totals { columns, categories, overall, weighting: weighting.to_owned(), missing }
}

/// The weighted mean of a column over the categories that have it.
fn weighted(
    column: &str,
    weights: &BTreeMap<&str, f64>,
    categories: &[(String, Means)],
) -> Option<(String, f64)> {
    let (mut sum, mut mass) = (0.0, 0.0);
    for (name, means) in categories {
        if let (Some(weight), Some(mean)) = (weights.get(name.as_str()), means.means.get(column)) {
            sum += weight * mean;
            mass += weight;
        }
    }
    (mass > 0.0).then(|| (column.to_owned(), sum / mass))
}

/// The categories in the suite's order; those of a prompt file in the alphabet's.
fn order(suite: &Suite) -> Vec<String> {
    let mut names: Vec<String> =
        suite.items.iter().map(|item| item.category.clone()).filter(|n| !n.is_empty()).collect();
    let known: Vec<&str> = match suite.format {
        Format::Wise => wise::WEIGHTS.iter().map(|(name, _)| *name).collect(),
        Format::T2iReasonbench => reasonbench::DIMENSIONS.iter().map(|(name, _)| *name).collect(),
        Format::Duet => Vec::new(),
    };
    let place = |name: &String| known.iter().position(|known| known == name);
    names.sort_by_key(|name| (place(name).unwrap_or(usize::MAX), name.clone()));
    names.dedup();
    names
}
