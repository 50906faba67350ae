//! `eval.json`: what was made of each prompt, what the judge saw, and the accuracies.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A digit in a colour.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// `0` to `9`.
    pub digit: u8,
    /// Colour word.
    pub colour: String,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Its file, relative to `eval.json`.
    pub file: String,
    /// What the judge sees; `None` without a judge.
    pub judged: Option<Subject>,
    /// Whether that is the prompt's true target; `None` without a judge or a target.
    pub semantic: Option<bool>,
    /// Whether that is what the refined prompt names; `None` without a judge, `false` when the
    /// refined prompt names nothing.
    pub render: Option<bool>,
}

/// One prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PromptRecord {
    /// Row in the prompt file, from zero.
    pub row: u64,
    /// The raw prompt.
    pub prompt: String,
    /// Kind of reasoning it needs; empty when the file does not say.
    pub category: String,
    /// The true target, where the file says.
    pub target: Option<Subject>,
    /// All the LLM wrote; empty when it was not asked to think.
    pub trace: String,
    /// The prompt that the image was made from.
    pub refined_prompt: String,
    /// Whether the trace had the `Revised Prompt:` marker.
    pub well_formed: bool,
    /// What the refined prompt names; `None` when no digit or no colour, or several.
    pub named: Option<Subject>,
    /// Whether that is the true target; `None` without a target.
    pub trace_right: Option<bool>,
    /// Its images, in order.
    pub images: Vec<ImageRecord>,
}

/// Accuracies of a set of prompts. A share of nothing is `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// How many prompts.
    pub prompts: usize,
    /// How many images.
    pub images: usize,
    /// Share of images in which the judge sees the true target.
    pub semantic_accuracy: Option<f64>,
    /// Share of traces whose refined prompt names the true target.
    pub trace_accuracy: Option<f64>,
    /// Share of images in which the judge sees what the refined prompt names.
    pub render_accuracy: Option<f64>,
    /// Share of traces with the marker.
    pub well_formed: Option<f64>,
}

impl Totals {
    /// The totals of `prompts`.
    pub fn of<'a>(prompts: impl IntoIterator<Item = &'a PromptRecord>) -> Totals {
        let prompts: Vec<&PromptRecord> = prompts.into_iter().collect();
        let images: Vec<&ImageRecord> = prompts.iter().flat_map(|p| &p.images).collect();
        Totals {
            prompts: prompts.len(),
            images: images.len(),
            semantic_accuracy: share(images.iter().filter_map(|image| image.semantic)),
            trace_accuracy: share(prompts.iter().filter_map(|prompt| prompt.trace_right)),
            render_accuracy: share(images.iter().filter_map(|image| image.render)),
            well_formed: share(prompts.iter().map(|prompt| prompt.well_formed)),
        }
    }
}

/// Share of `true`.
fn share(values: impl Iterator<Item = bool>) -> Option<f64> {
    let (right, all) = values.fold((0u32, 0u32), |(r, n), v| (r + u32::from(v), n + 1));
    (all > 0).then(|| f64::from(right) / f64::from(all))
}

/// How the images were made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Seed of the evaluation.
    pub seed: u64,
    /// Whether the LLM thought before the image was made.
    pub think: bool,
    /// Sampling temperature of the traces; zero: the most probable token each time.
    pub temperature: f64,
    /// Denoising steps.
    pub steps: usize,
    /// Classifier-free guidance scale.
    pub guidance_scale: f64,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Images of each prompt.
    pub images_per_prompt: usize,
}

/// `eval.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// `duet-eval-1`.
    pub format: String,
    /// How the images were made.
    pub settings: Settings,
    /// Over all prompts.
    pub totals: Totals,
    /// By category.
    pub categories: BTreeMap<String, Totals>,
    /// Every prompt, in file order.
    pub prompts: Vec<PromptRecord>,
}

impl Evaluation {
    /// The format this program writes.
    pub const FORMAT: &'static str = "duet-eval-1";

    /// Adds everything up.
    pub fn new(settings: Settings, prompts: Vec<PromptRecord>) -> Evaluation {
        let mut groups: BTreeMap<&str, Vec<&PromptRecord>> = BTreeMap::new();
        for prompt in prompts.iter().filter(|prompt| !prompt.category.is_empty()) {
            groups.entry(&prompt.category).or_default().push(prompt);
        }
        let categories =
            groups.into_iter().map(|(name, list)| (name.to_owned(), Totals::of(list))).collect();
        Evaluation {
            format: Self::FORMAT.to_owned(),
            settings,
            totals: Totals::of(&prompts),
            categories,
            prompts,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(digit: u8) -> Option<Subject> {
        Some(Subject { digit, colour: "green".to_owned() })
    }

    fn record(row: u64, category: &str, named: u8, judged: u8) -> PromptRecord {
        PromptRecord {
            row,
            prompt: "seven minus three, in the colour of grass".to_owned(),
            category: category.to_owned(),
            target: subject(4),
            trace: "Seven minus three is four.\nRevised Prompt:\nA green 4.".to_owned(),
            refined_prompt: "A green 4.".to_owned(),
            well_formed: true,
            named: subject(named),
            trace_right: Some(named == 4),
            images: vec![ImageRecord {
                file: format!("images/{row:05}-0.png"),
                judged: subject(judged),
                semantic: Some(judged == 4),
                render: Some(judged == named),
            }],
        }
    }

    fn settings() -> Settings {
        Settings {
            seed: 17,
            think: true,
            temperature: 0.0,
            steps: 10,
            guidance_scale: 4.0,
            width: 32,
            height: 32,
            images_per_prompt: 1,
        }
    }

    #[test]
    fn accuracies_are_shares_of_what_was_judged() {
        let prompts = vec![
            record(0, "facts", 4, 4),
            record(1, "facts", 4, 7),
            record(2, "arithmetic", 7, 7),
            record(3, "", 7, 4),
        ];
        let all = Evaluation::new(settings(), prompts);
        assert_eq!(all.totals.semantic_accuracy, Some(0.5));
        assert_eq!(all.totals.trace_accuracy, Some(0.5));
        assert_eq!(all.totals.render_accuracy, Some(0.5));
        assert_eq!(all.categories["facts"].semantic_accuracy, Some(0.5));
        assert_eq!(all.categories["facts"].trace_accuracy, Some(1.0));
        assert_eq!(all.categories.len(), 2);
        assert_eq!(Evaluation::new(settings(), Vec::new()).totals.semantic_accuracy, None);
    }

    /// The report reads this very file (`cli/src/report`): the two must not drift apart.
    #[test]
    fn the_format_is_the_one_in_the_golden_file() {
        let all = Evaluation::new(settings(), vec![record(0, "facts", 4, 4), record(1, "", 4, 7)]);
        let golden = include_str!("../../tests/golden/eval.json");
        let text = serde_json::to_string_pretty(&all).unwrap() + "\n";
        assert_eq!(text, golden);
        assert_eq!(serde_json::from_str::<Evaluation>(golden).unwrap(), all);
    }
}
