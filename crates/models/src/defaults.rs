//! How a model wants to be sampled when nobody says otherwise: `duet.json` at the root of its
//! pipeline folder. Other programs pass the file over; a folder without it is sampled as
//! Qwen-Image is published.

use crate::error::{ModelError, Result};
use crate::pipeline::{read_json, write_json};
use crate::template::INSTRUCTION;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The contents of `duet.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Defaults {
    /// What the LLM is told to do, before the raw prompt in the user's turn.
    pub instruction: String,
    /// Most tokens of a trace.
    pub max_new_tokens: usize,
    /// Denoising steps.
    pub steps: usize,
    /// True classifier-free guidance.
    pub guidance_scale: f64,
    /// Pixels.
    pub width: i64,
    /// Pixels.
    pub height: i64,
}

impl Default for Defaults {
    /// The instruction of [`INSTRUCTION`], 1024 tokens, 50 steps, guidance 4, 1024 x 1024 pixels.
    fn default() -> Self {
        Defaults {
            instruction: INSTRUCTION.to_owned(),
            max_new_tokens: 1024,
            steps: 50,
            guidance_scale: 4.0,
            width: 1024,
            height: 1024,
        }
    }
}

impl Defaults {
    /// Name of the file.
    pub const NAME: &'static str = "duet.json";

    /// Reads a folder's file; the defaults where there is none.
    ///
    /// # Errors
    /// The file is there and is not what it should be.
    pub fn read(folder: &Path) -> Result<Defaults> {
        let path = folder.join(Self::NAME);
        if !path.exists() {
            return Ok(Defaults::default());
        }
        serde_json::from_value(read_json(&path)?)
            .map_err(|error| ModelError::bad_file(path, error.to_string()))
    }

    /// Writes a folder's file.
    ///
    /// # Errors
    /// The system refuses.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(Self::NAME);
        let value = serde_json::to_value(self)
            .map_err(|error| ModelError::bad_file(&path, error.to_string()))?;
        write_json(&path, &value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_says_how_it_is_sampled_or_is_sampled_as_published() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Defaults::read(folder.path()).unwrap(), Defaults::default());
        let small = Defaults { steps: 8, width: 32, height: 32, ..Defaults::default() };
        small.write(folder.path()).unwrap();
        assert_eq!(Defaults::read(folder.path()).unwrap(), small);
        std::fs::write(folder.path().join(Defaults::NAME), "{\"step\": 8}").unwrap();
        let error = Defaults::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("duet.json") && error.contains("step"), "{error}");
    }
}
