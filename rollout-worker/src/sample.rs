//! `sample`: thinks about, refines and draws one prompt or a file of prompts. Each picture says in
//! its metadata how it was made.
//!
//! A picture is a function of the model, the options, the seed and its prompt: what else is in the
//! file of prompts changes no byte of it.

use crate::args::{SampleArgs, SamplingArgs};
use crate::engine::Engine;
use crate::error::WorkError;
use crate::load;
use crate::picture::{Picture, PictureError};
use crate::place::{self, PlaceError};
use crate::progress::Progress;
use duet_config::prompts::{self, PromptsError};
use duet_core::Seed;
use duet_core::work::{PromptRow, Window};
use duet_models::ModelError;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// Making a picture failed.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The models refused.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// The file cannot be written.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// The model or the adapter cannot be found, fetched or verified.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The file of prompts cannot be used.
    #[error(transparent)]
    Prompts(#[from] PromptsError),
    /// A prompt cannot be drawn.
    #[error("`{prompt}`: {source}")]
    Prompt {
        /// Its first characters.
        prompt: String,
        /// Why.
        source: ModelError,
    },
    /// `--out` is not a place for what is to be written.
    #[error("--out {}: {reason}", path.display())]
    Out {
        /// The place.
        path: PathBuf,
        /// Why not, and the fix.
        reason: &'static str,
    },
    /// A folder cannot be made.
    #[error("cannot make {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

/// Draws what the command line asks for. What is going on is shown on standard error.
///
/// # Errors
/// [`SampleError`]; pictures that were finished before it stay.
pub fn sample(args: &SampleArgs) -> Result<(), SampleError> {
    let rows = rows(args)?;
    check_out(args)?;
    let progress = Progress::new();
    let model = place::model(&args.model, &progress)?;
    let mut common = vec![("Software".to_owned(), software()), ("model".to_owned(), model.digest)];
    common.extend(changes(&args.sampling)?);
    progress.say(&format!("loading {}", model.folder.display()));
    let engine = load::engine(&model.folder, &args.sampling)?;
    if args.prompts.is_some() {
        let make = |source| SampleError::Io { path: args.out.clone(), source };
        std::fs::create_dir_all(&args.out).map_err(make)?;
    }
    let think = !args.sampling.no_think;
    let mut artist = Artist { engine, think, seed: args.seed, common, progress };
    for (done, row) in rows.iter().enumerate() {
        if rows.len() > 1 {
            artist.progress.say(&format!("{} of {}: {}", done + 1, rows.len(), row.text));
        }
        let out = match args.prompts {
            Some(_) => args.out.join(format!("{:05}.png", row.row)),
            None => args.out.clone(),
        };
        let named = |source| SampleError::Prompt { prompt: brief(&row.text), source };
        artist.draw(&row.text).map_err(named)?.save(&out)?;
        artist.progress.say(&format!("wrote {}", out.display()));
    }
    Ok(())
}

fn software() -> String {
    concat!("Duet ", env!("CARGO_PKG_VERSION")).to_owned()
}

fn brief(text: &str) -> String {
    text.chars().take(60).collect()
}

fn rows(args: &SampleArgs) -> Result<Vec<PromptRow>, SampleError> {
    let alone = |text: &String| PromptRow { row: 0, text: text.clone(), meta: String::new() };
    match &args.prompts {
        Some(path) => Ok(prompts::read_or_text(path)?),
        None => Ok(args.prompt.iter().map(alone).collect()),
    }
}

/// Finds out before the model is loaded what would otherwise come up when the work is done.
fn check_out(args: &SampleArgs) -> Result<(), SampleError> {
    let bad = |reason| Err(SampleError::Out { path: args.out.clone(), reason });
    let parent = args.out.parent().filter(|parent| *parent != Path::new(""));
    match args.prompts {
        Some(_) if args.out.is_file() => bad("is a file; a file of prompts needs a folder"),
        None if args.out.is_dir() => bad("is a folder; give the name of a PNG file"),
        None if parent.is_some_and(|parent| !parent.is_dir()) => {
            bad("the folder that it is in does not exist; make it first")
        }
        _ => Ok(()),
    }
}

/// What of the command line was put onto the model, by its hash.
fn changes(args: &SamplingArgs) -> Result<Vec<(String, String)>, PlaceError> {
    let mut texts = Vec::new();
    let adapters = args.adapter.iter().map(|adapter| place::adapter(&adapter.folder));
    let adapters: Vec<String> = adapters.collect::<Result<_, _>>()?;
    if !adapters.is_empty() {
        texts.push(("adapter".to_owned(), adapters.join(" ")));
    }
    for (name, file) in [("llm weights", &args.llm_weights), ("dit weights", &args.dit_weights)] {
        if let Some(file) = file {
            texts.push((name.to_owned(), place::file(file)?));
        }
    }
    Ok(texts)
}

/// Draws prompts one after the other.
struct Artist {
    engine: Engine,
    think: bool,
    seed: u64,
    /// Texts that all pictures have.
    common: Vec<(String, String)>,
    progress: Progress,
}

impl Artist {
    /// A prompt's picture.
    fn draw(&mut self, prompt: &str) -> Result<Picture, ModelError> {
        let seed = Seed::root(self.seed);
        let options = self.engine.sampling().render.clone();
        let mut texts = self.common.clone();
        for (name, value) in [
            ("prompt", prompt.to_owned()),
            ("seed", self.seed.to_string()),
            ("steps", options.steps.to_string()),
            ("guidance", options.guidance.to_string()),
            ("size", format!("{}x{}", options.width, options.height)),
        ] {
            texts.push((name.to_owned(), value));
        }
        let embeds = match self.think {
            false => self.engine.embed(prompt)?,
            true => self.refine(prompt, &seed, &mut texts)?,
        };
        let (width, height, steps) = (options.width, options.height, options.steps);
        self.progress.begin("drawing", steps, &format!("{width} x {height} pixels, {steps} steps"));
        let progress = &self.progress;
        let mut watch = |done| progress.at(done);
        let window = (Window::default(), &seed);
        let rendered = self.engine.draw_watched(&embeds, 1, window, &mut watch);
        self.progress.end();
        picture(&rendered?.images, 0, texts)
    }

    /// Thinks about a prompt: embeddings of what comes of it, `[T, D]`. The trace goes into `texts`.
    fn refine(
        &self,
        prompt: &str,
        seed: &Seed,
        texts: &mut Vec<(String, String)>,
    ) -> Result<Tensor, ModelError> {
        let question = self.engine.question(prompt)?;
        let sampling = self.engine.sampling();
        let most = sampling.max_new_tokens;
        self.progress.begin("thinking", most, &format!("at most {most} tokens"));
        let mut watch = |done| self.progress.at(done);
        let thoughts = self.engine.think_watched(&question, 1, seed, &mut watch);
        self.progress.end();
        let Some(thought) = thoughts?.pop() else {
            return Err(ModelError::BadInput("no trace was sampled".to_owned()));
        };
        self.progress.say(&format!("{}\n", thought.text.trim()));
        texts.push(("temperature".to_owned(), sampling.temperature.to_string()));
        texts.push(("trace".to_owned(), thought.text));
        texts.push(("refined prompt".to_owned(), thought.refined_prompt));
        Ok(thought.embeds)
    }
}

/// Image `index` of `u8 [K, H, W, 3]`.
///
/// # Errors
/// libtorch cannot copy it.
pub fn picture(
    images: &Tensor,
    index: usize,
    texts: Vec<(String, String)>,
) -> Result<Picture, duet_models::ModelError> {
    let image = images.select(0, index as i64);
    let (height, width) = (image.size()[0] as u32, image.size()[1] as u32);
    Ok(Picture { width, height, pixels: duet_torch::bytes::to_bytes(&image)?, texts })
}
