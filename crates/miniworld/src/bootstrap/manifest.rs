//! What a finished folder says of itself, and whether it can be used again.

use super::Profile;
use crate::error::{Result, WorldError};
use duet_core::Digest;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Where it lies in the pipeline folder.
const NAME: &str = "miniworld/manifest.json";

/// All that decides what is made, apart from the model code: a change makes old folders stale.
const RECIPE: [&str; 10] = [
    include_str!("budget.rs"),
    include_str!("drawing.rs"),
    include_str!("language.rs"),
    include_str!("seeing.rs"),
    include_str!("../corpus.rs"),
    include_str!("../digits.rs"),
    include_str!("../facts.rs"),
    include_str!("../learn.rs"),
    include_str!("../nets.rs"),
    include_str!("../prompts.rs"),
];

/// How good each part is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Recogniser (semantic reward): digit and colour right, on unseen hands.
    pub recogniser_accuracy: f64,
    /// Critic (aesthetic reward): spoilt told from drawn, on unseen hands.
    pub critic_accuracy: f64,
    /// Judge: digit and colour right, on unseen hands.
    pub judge_accuracy: f64,
    /// Autoencoder: mean squared error of reconstructions, pixels in [-1, 1].
    pub vae_mean_squared_error: f64,
    /// Language model: refined prompts that name the right target, on validation prompts, sampled.
    pub trace_accuracy: f64,
    /// Transformer: images in which the judge sees what the caption says.
    pub render_accuracy: f64,
}

/// How far a base model was taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Pre-trained only: the worked examples lie beside it, unused.
    Pretrained,
    /// Fine-tuned on the worked examples.
    #[default]
    Sft,
}

impl Stage {
    fn is_default(&self) -> bool {
        *self == Stage::default()
    }
}

/// A finished base model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The seed it was made from.
    pub seed: u64,
    /// How much work went into it.
    pub profile: Profile,
    /// How far it was taken.
    #[serde(default, skip_serializing_if = "Stage::is_default")]
    pub stage: Stage,
    /// BLAKE3 of the recipe (the program text that decides what is made).
    pub recipe: String,
    /// BLAKE3 over every other file of the folder, in name order.
    pub content: String,
    /// How good it is.
    pub measured: Measured,
}

impl Manifest {
    /// The manifest of `folder` if it holds, whole, what this seed, profile, stage and recipe make.
    ///
    /// # Errors
    /// The folder holds something that is not a base model of the small world.
    pub(super) fn of(
        folder: &Path,
        (seed, profile, stage): (u64, Profile, Stage),
    ) -> Result<Option<Manifest>> {
        let Some(manifest) = Manifest::read(folder)? else {
            return Ok(None);
        };
        let same = (manifest.seed, manifest.profile, manifest.stage) == (seed, profile, stage)
            && manifest.recipe == recipe();
        Ok((same && manifest.content == content(folder)?).then_some(manifest))
    }

    /// The manifest of `folder`; `None` where there is no folder yet, or an empty one.
    ///
    /// # Errors
    /// The folder holds other things.
    pub fn read(folder: &Path) -> Result<Option<Manifest>> {
        let path = folder.join(NAME);
        if !path.is_file() {
            return match std::fs::read_dir(folder) {
                Ok(mut entries) => match entries.next() {
                    None => Ok(None),
                    Some(_) => Err(WorldError::BadFile {
                        path: folder.to_owned(),
                        reason:
                            "the folder is not empty and holds no base model of the small world; \
                             name another folder"
                                .to_owned(),
                    }),
                },
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(WorldError::io(folder, error)),
            };
        }
        let text = std::fs::read_to_string(&path).map_err(|error| WorldError::io(&path, error))?;
        // A manifest of another version of this program: the folder is ours, and stale.
        Ok(serde_json::from_str(&text).ok())
    }

    pub(super) fn write(
        folder: &Path,
        (seed, profile, stage): (u64, Profile, Stage),
        measured: Measured,
    ) -> Result<Manifest> {
        let content = content(folder)?;
        let manifest = Manifest { seed, profile, stage, recipe: recipe(), content, measured };
        let path = folder.join(NAME);
        let text = serde_json::to_string_pretty(&manifest).unwrap_or_default() + "\n";
        std::fs::write(&path, text).map_err(|error| WorldError::io(&path, error))?;
        Ok(manifest)
    }
}

fn recipe() -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(env!("CARGO_PKG_VERSION").as_bytes());
    for part in RECIPE {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// BLAKE3 over names and bytes of all files but the manifest, in name order.
fn content(folder: &Path) -> Result<String> {
    let mut files = Vec::new();
    list(folder, &mut files)?;
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for path in files {
        let name = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy().into_owned();
        if name == NAME {
            continue;
        }
        let bytes = std::fs::read(&path).map_err(|error| WorldError::io(&path, error))?;
        hasher.update(name.as_bytes());
        hasher.update(&[0]);
        hasher.update(&Digest::of(&bytes).0);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn list(folder: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(folder).map_err(|error| WorldError::io(folder, error))?;
    for entry in entries {
        let path = entry.map_err(|error| WorldError::io(folder, error))?.path();
        if path.is_dir() {
            list(&path, into)?;
        } else {
            into.push(path);
        }
    }
    Ok(())
}

/// Puts the finished folder in its place; an older base model that lies there goes.
pub(super) fn replace(part: &Path, out: &Path) -> Result<()> {
    if out.exists() {
        std::fs::remove_dir_all(out).map_err(|error| WorldError::io(out, error))?;
    }
    std::fs::rename(part, out).map_err(|error| WorldError::io(out, error))
}
