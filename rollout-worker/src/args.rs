//! The command line.

use clap::{Args, Parser, Subcommand};
use duet_models::lora::Part;
use duet_service::place::PlaceArgs;
use std::path::PathBuf;

/// Thinks and draws: samples traces and images for a run, evaluates a model, makes one image.
#[derive(Debug, Parser)]
#[command(name = "duet-rollout-worker", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Work for a run until its coordinator says that it is over.
    Run(RunArgs),
    /// Make and judge images of a file of prompts.
    Eval(EvalArgs),
    /// Think, refine and draw: one prompt, or a file of prompts.
    Sample(SampleArgs),
    /// Write a whole pipeline folder with trained weights put onto the base model.
    Export(ExportArgs),
}

/// `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The run's configuration.
    #[arg(long)]
    pub config: PathBuf,
    /// Overrides a key, as `section.key=value`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Where the coordinator listens, as `http://HOST:PORT`.
    #[arg(long)]
    pub coordinator: String,
    /// Who this is.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// An adapter to merge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterArg {
    /// The model that it is for, where the command line says so.
    pub part: Option<Part>,
    /// Its folder.
    pub folder: PathBuf,
}

/// How to sample: what is left out is as the model's `duet.json` has it.
#[derive(Clone, Debug, Default, Args)]
pub struct SamplingArgs {
    /// Denoising steps.
    #[arg(long)]
    pub steps: Option<usize>,
    /// Classifier-free guidance scale; 1 turns it off.
    #[arg(long)]
    pub cfg: Option<f64>,
    /// Pixels, as `WIDTHxHEIGHT` or one number for a square.
    #[arg(long, value_parser = size)]
    pub size: Option<(i64, i64)>,
    /// Most tokens of a trace.
    #[arg(long)]
    pub max_new_tokens: Option<usize>,
    /// File with the instruction that is put before the prompt.
    #[arg(long)]
    pub instruction: Option<PathBuf>,
    /// Temperature of the traces; 0 takes the most probable token each time.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Draw the raw prompt without thinking about it.
    #[arg(long)]
    pub no_think: bool,
    /// Weights file to put onto the LLM, as a run publishes them.
    #[arg(long, value_name = "FILE")]
    pub llm_weights: Option<PathBuf>,
    /// Weights file to put onto the DiT, as a run publishes them.
    #[arg(long, value_name = "FILE")]
    pub dit_weights: Option<PathBuf>,
    /// Folder of a LoRA adapter to merge into the model that it was made for; `llm=DIR` or `dit=DIR`
    /// says which that is. May be repeated.
    #[arg(long, value_name = "[PART=]DIR", value_parser = adapter)]
    pub adapter: Vec<AdapterArg>,
    /// Threads of the arithmetic; the same number gives the same bits.
    #[arg(long, default_value_t = 1)]
    pub threads: u32,
}

/// `eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Pipeline folder.
    #[arg(long)]
    pub model: PathBuf,
    /// Prompts, one JSON object a line.
    #[arg(long)]
    pub prompts: PathBuf,
    /// Folder for `eval.json` and `images/`.
    #[arg(long)]
    pub out: PathBuf,
    /// Folder whose judge is asked, where it is not the model's own.
    #[arg(long)]
    pub judge: Option<PathBuf>,
    /// Images of each prompt.
    #[arg(long, default_value_t = 1)]
    pub images_per_prompt: usize,
    /// Only the first prompts.
    #[arg(long)]
    pub limit: Option<usize>,
    /// Seed of all noise.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// How to sample.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// `sample`.
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// Pipeline folder, or the URL of one (`s3://...`, `file://...`), which is fetched into the cache.
    #[arg(long)]
    pub model: String,
    /// What to draw.
    #[arg(long, required_unless_present = "prompts", conflicts_with = "prompts")]
    pub prompt: Option<String>,
    /// File of prompts to draw: one JSON object a line where it is called `.jsonl`, else text, one
    /// prompt a line.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// The PNG file to write; of a file of prompts, the folder for `00000.png`, `00001.png`, ...
    #[arg(long)]
    pub out: PathBuf,
    /// Seed of all noise, for each prompt the same: a prompt in a file is drawn as it is alone.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// How to sample.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// `export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Pipeline folder of the base model.
    #[arg(long)]
    pub model: PathBuf,
    /// Take the moving averages in these shards of a checkpoint as the weights.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["llm_weights", "dit_weights"])]
    pub average: Vec<PathBuf>,
    /// The folder to write; one of that name is replaced.
    #[arg(long)]
    pub out: PathBuf,
    /// Weights file to put onto the LLM, as a run publishes them.
    #[arg(long, value_name = "FILE")]
    pub llm_weights: Option<PathBuf>,
    /// Weights file to put onto the DiT, as a run publishes them.
    #[arg(long, value_name = "FILE")]
    pub dit_weights: Option<PathBuf>,
    /// Folder of a LoRA adapter to merge into the model that it was made for; `llm=DIR` or `dit=DIR`
    /// says which that is. May be repeated.
    #[arg(long, value_name = "[PART=]DIR", value_parser = adapter)]
    pub adapter: Vec<AdapterArg>,
}

impl ExportArgs {
    /// The same choice of weights as `eval` and `sample` make.
    pub fn sampling(&self) -> SamplingArgs {
        SamplingArgs {
            llm_weights: self.llm_weights.clone(),
            dit_weights: self.dit_weights.clone(),
            adapter: self.adapter.clone(),
            threads: 1,
            ..SamplingArgs::default()
        }
    }
}

/// `llm=DIR`, `dit=DIR` or `DIR`. A folder whose own name begins so is given as `./llm=...`.
fn adapter(text: &str) -> Result<AdapterArg, String> {
    let (part, folder) = match text.split_once('=') {
        Some(("llm", folder)) => (Some(Part::Llm), folder),
        Some(("dit", folder)) => (Some(Part::Dit), folder),
        _ => (None, text),
    };
    match folder {
        "" => Err("a folder is missing".to_owned()),
        folder => Ok(AdapterArg { part, folder: folder.into() }),
    }
}

/// `640x480` or `512`.
fn size(text: &str) -> Result<(i64, i64), String> {
    let (width, height) = text.split_once(['x', 'X']).unwrap_or((text, text));
    let side = |text: &str| text.trim().parse::<i64>().ok().filter(|side| *side > 0);
    match (side(width), side(height)) {
        (Some(width), Some(height)) => Ok((width, height)),
        _ => Err("expected WIDTHxHEIGHT in pixels, such as 640x480, or one number".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        assert_eq!(size("640x480"), Ok((640, 480)));
        assert_eq!(size("32"), Ok((32, 32)));
        let parsed = |text: &str| adapter(text).map(|a| (a.part, a.folder.display().to_string()));
        assert_eq!(parsed("a"), Ok((None, "a".to_owned())));
        assert_eq!(parsed("llm=a=b"), Ok((Some(Part::Llm), "a=b".to_owned())));
        assert_eq!(parsed("dit=a"), Ok((Some(Part::Dit), "a".to_owned())));
        assert_eq!(parsed("./llm=a"), Ok((None, "./llm=a".to_owned())));
        assert!(adapter("llm=").is_err() && adapter("").is_err());
        for bad in ["", "x", "0", "-3x4", "3x", "big"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
