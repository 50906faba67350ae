//! The diffusers pipeline folder: `model_index.json`, `text_encoder/`, `tokenizer/`, `transformer/`,
//! `vae/`, `scheduler/`. Whatever is in it and not run here (the vision tower, processor files, a
//! generation config) is carried through to the next folder untouched.

mod both;
mod files;
mod publish;
mod vision;

pub(crate) use files::{read_json, read_text, write_json};
pub use vision::{VisionConfig, init_vision_tower};

use crate::dit::{Dit, DitConfig};
use crate::error::{ModelError, Result};
use crate::flow::FlowConfig;
use crate::lm::{Layout, Lm, LmConfig, SpecialIds};
use crate::params::ParamSet;
use crate::tokenizer::Tokenizer;
use crate::vae::{Vae, VaeConfig};
use crate::weights;
use duet_torch::tensorfile::{Content, ShardedFile, TensorSource};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Stem of the weight files of the text encoder.
const LM_STEM: &str = "model";
/// Stem of the weight files of the transformer and the autoencoder.
const DIFFUSERS_STEM: &str = "diffusion_pytorch_model";

/// Where and as what the models are loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoadOptions {
    /// The device.
    pub device: Device,
    /// Dtype of the language model.
    pub lm: Kind,
    /// Dtype of the transformer.
    pub dit: Kind,
    /// Dtype of the autoencoder.
    pub vae: Kind,
}

impl Default for LoadOptions {
    /// The CPU, in fp32.
    fn default() -> Self {
        let kind = Kind::Float;
        LoadOptions { device: Device::Cpu, lm: kind, dit: kind, vae: kind }
    }
}

/// A whole think-then-generate model.
#[derive(Debug)]
pub struct Pipeline {
    /// The language model: it thinks, and it encodes the refined prompt.
    pub lm: Lm,
    /// The transformer: it denoises.
    pub dit: Dit,
    /// The autoencoder: it turns latents into pixels.
    pub vae: Vae,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The sampling schedule's config.
    pub flow: FlowConfig,
    carried: Carried,
}

/// What a folder holds beside what is run.
struct Carried {
    /// Tensors of the text encoder that are not the language model's.
    tensors: Tower,
    /// Files by sub-folder (empty: the root) and name.
    files: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
}

/// The vision tower, and whatever else the text encoder's file holds.
enum Tower {
    /// In memory, of a new pipeline.
    Made(BTreeMap<String, Tensor>),
    /// In the file it was read with, by name; never loaded.
    Mapped(ShardedFile, Vec<String>),
}

impl Tower {
    fn contents(&self) -> Result<BTreeMap<String, Content<'_>>> {
        match self {
            Tower::Made(tensors) => Ok(weights::contents(tensors)),
            Tower::Mapped(source, names) => names
                .iter()
                .map(|name| {
                    let (spec, data) = source.raw(name)?;
                    let (dtype, shape) = (spec.dtype, spec.shape);
                    Ok((name.clone(), Content::Raw { dtype, shape, data }))
                })
                .collect(),
        }
    }
}

impl std::fmt::Debug for Carried {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tensors = match &self.tensors {
            Tower::Made(tensors) => tensors.len(),
            Tower::Mapped(_, names) => names.len(),
        };
        f.debug_struct("Carried").field("tensors", &tensors).finish_non_exhaustive()
    }
}

const FOLDERS: [&str; 7] =
    ["", "text_encoder", "tokenizer", "transformer", "vae", "scheduler", "processor"];

impl Pipeline {
    /// Loads a folder in fp32 on the CPU.
    pub fn load(folder: &Path) -> Result<Pipeline> {
        Pipeline::load_with(folder, LoadOptions::default())
    }

    /// Loads a folder.
    pub fn load_with(folder: &Path, options: LoadOptions) -> Result<Pipeline> {
        if !folder.join("model_index.json").is_file() {
            let reason = "not a pipeline folder: `model_index.json` is missing";
            return Err(ModelError::bad_file(folder, reason));
        }
        let tokenizer = Tokenizer::load(&folder.join("tokenizer"))?;
        let scheduler = folder.join("scheduler/scheduler_config.json");
        let flow = FlowConfig::from_json(&read_json(&scheduler)?, &text(&scheduler))?;
        let (lm, tensors) = load_lm(&folder.join("text_encoder"), options)?;
        if (tokenizer.size() as i64) > lm.config().vocab_size {
            let origin = text(&folder.join("text_encoder/config.json"));
            let reason = format!("the tokenizer has {} tokens, more than this", tokenizer.size());
            return Err(ModelError::bad_config(origin, "vocab_size", reason));
        }
        let dit = load_dit(&folder.join("transformer"), options)?;
        let vae = load_vae(&folder.join("vae"), options)?;
        let mut files = BTreeMap::new();
        for name in FOLDERS {
            files.insert(name.to_owned(), files::carry(&folder.join(name))?);
        }
        both::readable(&mut files, &tokenizer)?;
        files::complete(&mut files, &preprocessor());
        let pipeline =
            Pipeline { lm, dit, vae, tokenizer, flow, carried: Carried { tensors, files } };
        pipeline.check(&text(folder))?;
        Ok(pipeline)
    }

    /// A new pipeline from new parts, with a vision tower to carry along.
    pub fn assemble(
        lm: Lm,
        dit: Dit,
        vae: Vae,
        tokenizer: Tokenizer,
        flow: FlowConfig,
        vision: (&VisionConfig, ParamSet),
    ) -> Result<Pipeline> {
        let id = |token: &str| tokenizer.id(token).unwrap_or_default();
        let ids = SpecialIds {
            image: id("<|image_pad|>"),
            video: id("<|video_pad|>"),
            vision_start: id("<|vision_start|>"),
            vision_end: id("<|vision_end|>"),
        };
        let config = lm.config().to_json(vision.0.to_json(), &ids);
        let generation = json!({
            "bos_token_id": tokenizer.end_of_text(),
            "eos_token_id": [tokenizer.im_end(), tokenizer.end_of_text()],
            "pad_token_id": tokenizer.end_of_text(),
            "do_sample": false,
        });
        let json = |value: &Value| format!("{value:#}\n").into_bytes();
        let one = |name: &str, bytes: Vec<u8>| BTreeMap::from([(name.to_owned(), bytes)]);
        let mut encoder = one("config.json", json(&config));
        encoder.insert("generation_config.json".to_owned(), json(&generation));
        // `AutoTokenizer` and `AutoProcessor` look at the root.
        let mut root = tokenizer.files()?;
        root.insert("model_index.json".to_owned(), json(&model_index()));
        root.insert("preprocessor_config.json".to_owned(), json(&preprocessor()));
        let files = BTreeMap::from([
            (String::new(), root),
            ("text_encoder".to_owned(), encoder),
            ("tokenizer".to_owned(), tokenizer.files()?),
            ("transformer".to_owned(), one("config.json", json(&dit.config().to_json()))),
            ("vae".to_owned(), one("config.json", json(&vae.config().to_json()))),
            ("scheduler".to_owned(), one("scheduler_config.json", json(&flow.to_json()))),
        ]);
        let carried = Carried { tensors: Tower::Made(vision.1.to_map()), files };
        let pipeline = Pipeline { lm, dit, vae, tokenizer, flow, carried };
        pipeline.check("a new pipeline")?;
        Ok(pipeline)
    }

    /// Whether the parts fit one another.
    fn check(&self, origin: &str) -> Result<()> {
        let (text, joint) = (self.lm.config().hidden_size, self.dit.config().joint_attention_dim);
        let dit = self.dit.config();
        let reason = if text != joint {
            format!("joint_attention_dim is {joint}, the text encoder's hidden_size {text}")
        } else if self.vae.config().z_dim != dit.out_channels {
            format!(
                "out_channels is {}, the vae's z_dim {}",
                dit.out_channels,
                self.vae.config().z_dim
            )
        } else if dit.patch_size != 2 || dit.in_channels != 4 * dit.out_channels {
            "patches of 2 x 2 expected: in_channels = 4 x out_channels".to_owned()
        } else {
            return Ok(());
        };
        Err(ModelError::bad_config(origin, "transformer", reason))
    }

    /// How many pixels a token of the transformer spans on each side.
    pub fn pixels_per_token(&self) -> i64 {
        self.vae.config().scale_factor() * self.dit.config().patch_size
    }

    /// Tokens (height, width) of an image of `width` x `height` pixels.
    pub fn grid(&self, width: i64, height: i64) -> Result<(i64, i64)> {
        let side = self.pixels_per_token();
        if width < side || height < side || width % side != 0 || height % side != 0 {
            return Err(ModelError::BadInput(format!(
                "an image of {width} x {height} pixels cannot be made; this model wants multiples \
                 of {side}"
            )));
        }
        Ok((height / side, width / side))
    }

    /// Writes the whole folder. Parts are written beside each other; a folder with `model_index.json`
    /// is complete, since that file is written last.
    pub fn save(&self, folder: &Path) -> Result<()> {
        // What no published folder has (a `processor/`, say) is not made here either.
        let there = |(sub, files): &(&String, &BTreeMap<_, _>)| *sub == "vae" || !files.is_empty();
        for (sub, files) in self.carried.files.iter().filter(there) {
            let to = folder.join(sub);
            std::fs::create_dir_all(&to).map_err(|error| ModelError::io(&to, error))?;
            for (name, bytes) in files.iter().filter(|(name, _)| *name != "model_index.json") {
                let path = to.join(name);
                std::fs::write(&path, bytes).map_err(|error| ModelError::io(&path, error))?;
            }
        }
        self.save_vae_config(&folder.join("vae/config.json"))?;
        let (lm, dit, vae) =
            (self.lm.params().to_map(), self.dit.params().to_map(), self.vae.params().to_map());
        let mut encoder = weights::contents(&lm);
        encoder.extend(self.carried.tensors.contents()?);
        weights::write(&folder.join("text_encoder"), LM_STEM, encoder)?;
        weights::write(&folder.join("transformer"), DIFFUSERS_STEM, weights::contents(&dit))?;
        weights::write(&folder.join("vae"), DIFFUSERS_STEM, weights::contents(&vae))?;
        let index = folder.join("model_index.json");
        let bytes = self.carried.files.get("").and_then(|files| files.get("model_index.json"));
        match bytes {
            Some(bytes) => {
                std::fs::write(&index, bytes).map_err(|error| ModelError::io(&index, error))
            }
            None => write_json(&index, &model_index()),
        }
    }

    /// The statistics of latents may have been measured since the folder was read.
    fn save_vae_config(&self, path: &Path) -> Result<()> {
        let mut config = read_json(path)?;
        let own = self.vae.config();
        for (key, list) in [("latents_mean", &own.latents_mean), ("latents_std", &own.latents_std)]
        {
            config[key] = json!(list);
        }
        write_json(path, &config)
    }
}

fn load_lm(folder: &Path, options: LoadOptions) -> Result<(Lm, Tower)> {
    let path = folder.join("config.json");
    let mut config = LmConfig::from_json(&read_json(&path)?, &text(&path))?;
    let source = weights::open(folder, LM_STEM)?;
    let mut rest: BTreeSet<&str> = source.names().into_iter().collect();
    if config.tie_word_embeddings {
        // A tied head may still be written out; it is the table.
        rest.remove("lm_head.weight");
    } else if !rest.contains("lm_head.weight") {
        config.tie_word_embeddings = true;
    }
    let specs = Lm::specs(&config, Layout::of(rest.iter().copied()));
    let params = weights::read(&source, &specs, options.device, options.lm)?;
    for spec in &specs {
        rest.remove(spec.name.as_str());
    }
    let rest = rest.into_iter().map(str::to_owned).collect();
    let lm = Lm::new(config, params, &text(folder))?;
    Ok((lm, Tower::Mapped(source, rest)))
}

fn load_dit(folder: &Path, options: LoadOptions) -> Result<Dit> {
    let path = folder.join("config.json");
    let config = DitConfig::from_json(&read_json(&path)?, &text(&path))?;
    let source = weights::open(folder, DIFFUSERS_STEM)?;
    let params = weights::read(&source, &Dit::specs(&config), options.device, options.dit)?;
    Dit::new(config, params, &text(folder))
}

fn load_vae(folder: &Path, options: LoadOptions) -> Result<Vae> {
    let path = folder.join("config.json");
    let config = VaeConfig::from_json(&read_json(&path)?, &text(&path))?;
    let source = weights::open(folder, DIFFUSERS_STEM)?;
    let params = weights::read(&source, &Vae::specs(&config), options.device, options.vae)?;
    Vae::new(config, params, &text(folder))
}

/// How Qwen2.5-VL's processor prepares images: not used here, but `AutoProcessor` wants to know.
fn preprocessor() -> Value {
    json!({
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "do_resize": true,
        "do_rescale": true,
        "do_normalize": true,
        "min_pixels": 3136,
        "max_pixels": 12_845_056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.481_454_66, 0.457_827_5, 0.408_210_73],
        "image_std": [0.268_629_54, 0.261_302_58, 0.275_777_11],
    })
}

fn model_index() -> Value {
    json!({
        "_class_name": "QwenImagePipeline",
        "_diffusers_version": "0.37.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    })
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
