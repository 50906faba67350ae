//! From a model folder and a command line to an engine, for `eval` and `sample`.

use crate::args::{AdapterArg, SamplingArgs};
use crate::engine::{Adapters, Engine, Sampling};
use crate::error::WorkError;
use crate::policies::WeightFiles;
use duet_core::work::Weights;
use duet_core::{ArtifactRef, Digest, PolicyVersion};
use duet_models::ModelError;
use duet_models::defaults::Defaults;
use duet_models::lora::{Adaptable, Lora, Part};
use duet_models::pipeline::Pipeline;
use duet_models::render::RenderOptions;
use duet_models::sde::SdeKind;
use duet_torch::Tensors;
use duet_torch::tensorfile::{Assembly, TensorFile, encode};
use std::path::Path;

/// The engine of a folder, set to the weights that the command line names.
///
/// # Errors
/// The folder, a weights file or an option does not fit.
pub fn engine(folder: &Path, args: &SamplingArgs) -> Result<Engine, WorkError> {
    let sampling = sampling(folder, args)?;
    let mut pipeline = Pipeline::load(folder)?;
    for AdapterArg { part, folder } in &args.adapter {
        match part.map_or_else(|| Lora::made_for(folder), Ok)? {
            Part::Llm => merge(&mut pipeline.lm, folder)?,
            Part::Dit => merge(&mut pipeline.dit, folder)?,
        }
    }
    let mut engine = Engine::new(pipeline, sampling, Adapters::default(), 1)?;
    let weights = weights(args)?;
    if let Some((weights, files)) = weights {
        engine.hold(&weights, files)?;
        engine.activate(&weights)?;
    }
    Ok(engine)
}

/// Adds an adapter to a model's weights.
fn merge(model: &mut impl Adaptable, folder: &Path) -> Result<(), ModelError> {
    let lora = Lora::load(model, folder)?;
    lora.merge(model);
    // Off again, so that there is room for the next one.
    lora.detach(model);
    Ok(())
}

/// What the command line says, and the model's defaults where it is silent.
fn sampling(folder: &Path, args: &SamplingArgs) -> Result<Sampling, ModelError> {
    let defaults = Defaults::read(folder)?;
    let instruction = match &args.instruction {
        Some(path) => std::fs::read_to_string(path).map_err(|error| ModelError::io(path, error))?,
        None => defaults.instruction,
    };
    let (width, height) = args.size.unwrap_or((defaults.width, defaults.height));
    Ok(Sampling {
        instruction,
        temperature: args.temperature,
        max_new_tokens: args.max_new_tokens.unwrap_or(defaults.max_new_tokens),
        render: RenderOptions {
            steps: args.steps.unwrap_or(defaults.steps),
            guidance: args.cfg.unwrap_or(defaults.guidance_scale),
            sde: SdeKind::FlowGrpo,
            noise_level: 0.0,
            width,
            height,
        },
        keep_last: false,
    })
}

/// The files of the command line as a policy of their own.
fn weights(args: &SamplingArgs) -> Result<Option<(Weights, WeightFiles)>, ModelError> {
    let read = |path: &Option<std::path::PathBuf>| -> Result<Option<Vec<u8>>, ModelError> {
        let read = |path| std::fs::read(path).map_err(|error| ModelError::io(path, error));
        path.as_ref().map(read).transpose()
    };
    let files = WeightFiles { llm: read(&args.llm_weights)?, dit: read(&args.dit_weights)? };
    let named = |path: &Option<std::path::PathBuf>, bytes: &Option<Vec<u8>>| {
        let (path, bytes) = (path.as_ref()?, bytes.as_ref()?);
        let (digest, key) = (Digest::of(bytes), path.display().to_string());
        Some(ArtifactRef { key, digest, bytes: bytes.len() as u64 })
    };
    let (llm, dit) = (named(&args.llm_weights, &files.llm), named(&args.dit_weights, &files.dit));
    let Some(digest) = llm.as_ref().or(dit.as_ref()).map(|file| file.digest) else {
        return Ok(None);
    };
    Ok(Some((Weights { version: PolicyVersion(1), llm, dit, digest }, files)))
}

/// The moving averages in the shards of a checkpoint, as a policy of their own.
///
/// # Errors
/// A shard cannot be read, or none holds an average.
pub fn averages(shards: &[std::path::PathBuf]) -> Result<(Weights, WeightFiles), WorkError> {
    let mut found = [("llm", Tensors::new()), ("dit", Tensors::new())];
    let open = |shard| TensorFile::open(shard).map_err(ModelError::from);
    let opened = shards.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let metadata = opened.last().map(|file| file.metadata().clone()).unwrap_or_default();
    let state = Assembly::new(opened).map_err(ModelError::from)?;
    for (branch, tensors) in &mut found {
        let prefix = format!("{branch}/ema/");
        for name in state.names() {
            if let Some(own) = name.strip_prefix(&prefix) {
                tensors.insert(own.to_owned(), state.load(name).map_err(ModelError::from)?);
            }
        }
    }
    let mut files = WeightFiles { llm: None, dit: None };
    for (branch, tensors) in &found {
        if tensors.is_empty() {
            continue;
        }
        let own = metadata.iter().filter_map(|(key, value)| {
            Some((key.strip_prefix(branch)?.strip_prefix('.')?.to_owned(), value.clone()))
        });
        let bytes = encode(tensors, &own.collect()).map_err(ModelError::from)?;
        *(if *branch == "llm" { &mut files.llm } else { &mut files.dit }) = Some(bytes);
    }
    let named = |branch: &str, bytes: &Option<Vec<u8>>| {
        let bytes = bytes.as_ref()?;
        let key = format!("the average of the {branch}");
        Some(ArtifactRef { key, digest: Digest::of(bytes), bytes: bytes.len() as u64 })
    };
    let (llm, dit) = (named("llm", &files.llm), named("dit", &files.dit));
    let Some(digest) = llm.as_ref().or(dit.as_ref()).map(|file| file.digest) else {
        let reason = "the checkpoint holds no moving averages: trainer.ema was 0 in that run";
        return Err(ModelError::BadInput(reason.to_owned()).into());
    };
    Ok((Weights { version: PolicyVersion(1), llm, dit, digest }, files))
}
