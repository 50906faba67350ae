//! What `duet-rollout-worker eval` leaves behind: `eval.json` and the pictures beside it.

use super::ReportError;
use image::RgbImage;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// The three accuracies of a set of prompts, each in [0, 1].
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, serde::Serialize)]
pub struct Accuracy {
    /// Share of images in which the judge sees the prompt's true digit in its true colour.
    pub semantic_accuracy: f64,
    /// Share of traces whose refined prompt names the true digit and colour.
    pub trace_accuracy: f64,
    /// Share of images in which the judge sees what the refined prompt names.
    pub render_accuracy: f64,
}

/// A digit in a colour.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Subject {
    /// `0` to `9`.
    pub digit: u8,
    /// Colour word.
    pub colour: String,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.colour, self.digit)
    }
}

/// One judged image.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct JudgedImage {
    /// Its file, relative to `eval.json`.
    pub file: PathBuf,
    /// What the judge sees; nothing when the model folder has no judge.
    pub judged: Option<Subject>,
    /// Whether that is the prompt's true target.
    pub semantic: Option<bool>,
}

/// One prompt of an evaluation.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct EvaluatedPrompt {
    /// Row in the prompt file.
    pub row: u64,
    /// The raw prompt.
    pub prompt: String,
    /// Kind of reasoning it needs.
    #[serde(default)]
    pub category: String,
    /// What it asks for, where that is known.
    #[serde(default)]
    pub target: Option<Subject>,
    /// What the LLM made of it.
    pub refined_prompt: String,
    /// Its images, in order.
    pub images: Vec<JudgedImage>,
}

/// An evaluation, as far as the report needs it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Evaluation {
    /// Accuracies over everything.
    pub totals: Accuracy,
    /// Accuracies by category.
    #[serde(default)]
    pub categories: BTreeMap<String, Accuracy>,
    /// Every prompt, in file order.
    pub prompts: Vec<EvaluatedPrompt>,
    /// Where `eval.json` lies.
    #[serde(skip)]
    pub folder: PathBuf,
}

impl Evaluation {
    /// Reads `folder/eval.json`.
    ///
    /// # Errors
    /// The file is missing or is not an evaluation.
    pub fn read(folder: &Path) -> Result<Evaluation, ReportError> {
        let path = folder.join("eval.json");
        let bytes =
            std::fs::read(&path).map_err(|source| ReportError::io("read", &path, source))?;
        let mut evaluation: Evaluation = serde_json::from_slice(&bytes)
            .map_err(|source| ReportError::Json { path: path.clone(), line: 0, source })?;
        evaluation.folder = folder.to_owned();
        Ok(evaluation)
    }

    /// The picture of an image.
    ///
    /// # Errors
    /// The file is missing or is no PNG.
    pub fn picture(&self, image: &JudgedImage) -> Result<RgbImage, ReportError> {
        let path = self.folder.join(&image.file);
        let bytes =
            std::fs::read(&path).map_err(|source| ReportError::io("read", &path, source))?;
        let picture = image::load_from_memory_with_format(&bytes, image::ImageFormat::Png)
            .map_err(|source| ReportError::Picture { path, source })?;
        Ok(picture.to_rgb8())
    }
}
