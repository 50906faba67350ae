//! Low-rank adapters (LoRA, arXiv 2106.09685) with PEFT's names and files.
//!
//! The reference policy is the same model with its adapter switched off.

use crate::dit::Dit;
use crate::error::{ModelError, Result};
use crate::lm::Lm;
use crate::nn::{Adapter, Linear};
use crate::params::{Init, ParamSet, ParamSpec};
use crate::pipeline::{read_json, write_json};
use crate::weights;
use duet_core::Seed;
use duet_torch::tensorfile::TensorSource;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tch::{Kind, Tensor};

/// What PEFT puts before module names.
const PREFIX: &str = "base_model.model.";

/// Which layers get an adapter, and how large.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank.
    pub rank: i64,
    /// The adapter is scaled by alpha / rank.
    pub alpha: f64,
    /// Layers: whole names, or what names end with after a dot (`attn.to_q`).
    pub targets: Vec<String>,
}

impl LoraConfig {
    /// The twelve layers of every block that Flow-GRPO trains in Qwen-Image.
    pub fn dit_targets() -> Vec<String> {
        let attention = ["q", "k", "v"].into_iter();
        let joint = attention.flat_map(|x| [format!("attn.to_{x}"), format!("attn.add_{x}_proj")]);
        let rest = [
            "attn.to_out.0",
            "attn.to_add_out",
            "img_mlp.net.0.proj",
            "img_mlp.net.2",
            "txt_mlp.net.0.proj",
            "txt_mlp.net.2",
        ];
        joint.chain(rest.map(str::to_owned)).collect()
    }

    fn wants(&self, name: &str) -> bool {
        self.targets.iter().any(|target| {
            name == target || name.strip_suffix(target.as_str()).is_some_and(|s| s.ends_with('.'))
        })
    }
}

/// A model of the pipeline that can have an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The language model.
    Llm,
    /// The transformer.
    Dit,
}

/// A model that adapters can be put on.
pub trait Adaptable {
    /// Its linear layers.
    fn linears(&mut self) -> Vec<&mut Linear>;
    /// The name that PEFT knows a layer by: the module's path in the published implementation.
    fn module(&self, layer: &str) -> String;
    /// That name, from the one that a file may have it under.
    fn today(&self, module: &str) -> String {
        module.to_owned()
    }
}

impl Adaptable for Dit {
    fn linears(&mut self) -> Vec<&mut Linear> {
        self.linears_mut()
    }

    fn module(&self, layer: &str) -> String {
        layer.to_owned()
    }
}

impl Adaptable for Lm {
    fn linears(&mut self) -> Vec<&mut Linear> {
        self.linears_mut()
    }

    /// In memory, transformers nests the language model whatever the file's layout.
    fn module(&self, layer: &str) -> String {
        match layer.strip_prefix(self.layout().prefix()) {
            Some(rest) => format!("{}{rest}", crate::lm::Layout::Nested.prefix()),
            None => layer.to_owned(),
        }
    }

    /// Before 4.52 transformers had no `language_model` in between; the text model alone has none,
    /// nor `model`.
    fn today(&self, module: &str) -> String {
        let nested = crate::lm::Layout::Nested.prefix();
        for older in ["model.layers.", "language_model.layers.", "layers."] {
            if let Some(rest) = module.strip_prefix(older) {
                return format!("{nested}layers.{rest}");
            }
        }
        module.to_owned()
    }
}

/// An adapter on a model. Its tensors are fp32, whatever the model's dtype.
#[derive(Debug)]
pub struct Lora {
    config: LoraConfig,
    params: ParamSet,
    on: Arc<AtomicBool>,
}

impl Lora {
    /// Puts a new adapter on `model`: A gaussian with standard deviation 1 / rank, B zero (PEFT's
    /// `init_lora_weights = "gaussian"`), so it changes nothing until it is trained.
    ///
    /// # Errors
    /// When a target matches no layer, or a layer has an adapter already.
    pub fn attach(model: &mut impl Adaptable, config: LoraConfig, seed: &Seed) -> Result<Lora> {
        let specs = specs(model, &config)?;
        let params = ParamSet::init(&specs, seed);
        Lora::put(model, config, params)
    }

    /// Puts an adapter that PEFT or [`Lora::save`] wrote on `model`.
    ///
    /// # Errors
    /// [`ModelError`] naming the file and the tensor or key that does not fit.
    pub fn load(model: &mut impl Adaptable, folder: &Path) -> Result<Lora> {
        let path = folder.join("adapter_config.json");
        let source = weights::open(folder, "adapter_model")?;
        let written = modules(&source.names());
        // By the names of today, whatever the file calls the layers.
        let layers: Vec<String> = written.iter().map(|name| model.today(name)).collect();
        let config = read_config(&read_json(&path)?, &path, &layers)?;
        let specs = specs(model, &config)?;
        let olds: Vec<ParamSpec> = specs
            .iter()
            .map(|spec| {
                let name = match module(&spec.name).and_then(|m| layers.iter().position(|l| l == m))
                {
                    Some(at) => spec.name.replacen(&layers[at], &written[at], 1),
                    None => spec.name.clone(),
                };
                ParamSpec { name, ..spec.clone() }
            })
            .collect();
        let unknown = |name: &&str| olds.iter().all(|spec| spec.name != **name);
        if let Some(name) = source.names().into_iter().find(unknown) {
            let reason = format!("tensor `{name}` belongs to no layer that the config targets");
            return Err(ModelError::bad_file(source.label(), reason));
        }
        let read = weights::read(&source, &olds, tch::Device::Cpu, Kind::Float)?;
        let named = specs.iter().zip(&olds).filter_map(|(spec, old)| {
            Some((spec.name.clone(), read.get(&old.name)?.shallow_clone()))
        });
        Lora::put(model, config, named.collect())
    }

    /// Which model an adapter's folder is for, by the names of the layers in it.
    ///
    /// # Errors
    /// The folder holds no adapter, or layers of neither model.
    pub fn made_for(folder: &Path) -> Result<Part> {
        let source = weights::open(folder, "adapter_model")?;
        let names = modules(&source.names());
        let Some(first) = names.first() else {
            return Err(ModelError::bad_file(source.label(), "no adapter's tensors are in it"));
        };
        let language = |name: &String| {
            ["model.", "language_model.", "layers.", "lm_head"]
                .iter()
                .any(|own| name.starts_with(own))
        };
        match (names.iter().all(language), names.iter().any(language)) {
            (true, _) => Ok(Part::Llm),
            (_, false) => Ok(Part::Dit),
            _ => Err(ModelError::bad_file(
                source.label(),
                format!("layers of more than one model are in it: `{first}` and others"),
            )),
        }
    }

    fn put(model: &mut impl Adaptable, config: LoraConfig, params: ParamSet) -> Result<Lora> {
        let names: Vec<String> = model.linears().iter().map(|l| l.name.clone()).collect();
        let keys: Vec<[String; 2]> =
            names.iter().map(|name| key_pair(&model.module(name))).collect();
        let on = Arc::new(AtomicBool::new(true));
        let device = model.linears().first().map_or(tch::Device::Cpu, |l| l.weight.device());
        let params = params.to(device, Kind::Float);
        for (linear, [a, b]) in model.linears().into_iter().zip(&keys) {
            let (Some(a), Some(b)) = (params.get(a), params.get(b)) else {
                continue;
            };
            if linear.adapter.is_some() {
                let reason = format!("layer `{}` has an adapter already", linear.name);
                return Err(ModelError::BadInput(reason));
            }
            let (a, b) = (a.shallow_clone(), b.shallow_clone());
            let scale = config.alpha / config.rank as f64;
            linear.adapter = Some(Adapter { a, b, scale, on: Arc::clone(&on) });
        }
        Ok(Lora { config, params, on })
    }

    /// Its config.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Its tensors, by PEFT's names.
    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    /// Runs `work` with the adapter off: under the reference policy.
    pub fn without<T>(&self, work: impl FnOnce() -> T) -> T {
        let was = self.on.swap(false, Ordering::Relaxed);
        let out = work();
        self.on.store(was, Ordering::Relaxed);
        out
    }

    /// Adds the adapter to the weights of `model` and switches it off: the same policy, faster to
    /// sample with.
    pub fn merge(&self, model: &mut impl Adaptable) {
        if self.on.swap(false, Ordering::Relaxed) {
            self.add(model, 1.0);
        }
    }

    /// Takes the adapter out of the weights of `model` again (up to rounding) and switches it on.
    pub fn unmerge(&self, model: &mut impl Adaptable) {
        if !self.on.swap(true, Ordering::Relaxed) {
            self.add(model, -1.0);
        }
    }

    /// Takes the adapter off the model without merging it.
    pub fn detach(self, model: &mut impl Adaptable) -> ParamSet {
        for linear in model.linears() {
            if linear.adapter.as_ref().is_some_and(|adapter| Arc::ptr_eq(&adapter.on, &self.on)) {
                linear.adapter = None;
            }
        }
        self.params
    }

    fn add(&self, model: &mut impl Adaptable, sign: f64) {
        tch::no_grad(|| {
            for linear in model.linears() {
                let Some(adapter) = &linear.adapter else {
                    continue;
                };
                let delta = adapter.b.matmul(&adapter.a) * (adapter.scale * sign);
                let sum = linear.weight.to_kind(Kind::Float) + delta;
                linear.weight.shallow_clone().copy_(&sum);
            }
        });
    }

    /// Writes `adapter_model.safetensors` and `adapter_config.json`, which PEFT loads.
    pub fn save(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(|error| ModelError::io(folder, error))?;
        let tensors = self.params.to_map();
        weights::write(folder, "adapter_model", weights::contents(&tensors))?;
        write_json(&folder.join("adapter_config.json"), &config_json(&self.config))
    }
}

/// The layer that a tensor of an adapter belongs to.
fn module(tensor: &str) -> Option<&str> {
    let inner = tensor.strip_prefix(PREFIX)?;
    inner.strip_suffix(".lora_A.weight").or_else(|| inner.strip_suffix(".lora_B.weight"))
}

/// The layers that tensors belong to, each once.
fn modules(tensors: &[&str]) -> Vec<String> {
    let found: BTreeSet<&str> = tensors.iter().filter_map(|tensor| module(tensor)).collect();
    found.into_iter().map(str::to_owned).collect()
}

fn key_pair(module: &str) -> [String; 2] {
    ["A", "B"].map(|part| format!("{PREFIX}{module}.lora_{part}.weight"))
}

/// The adapter's tensors for every layer that the config targets.
fn specs(model: &mut impl Adaptable, config: &LoraConfig) -> Result<Vec<ParamSpec>> {
    if config.rank < 1 || !config.alpha.is_finite() {
        let reason = format!("an adapter of rank {} and alpha {}", config.rank, config.alpha);
        return Err(ModelError::BadInput(format!("{reason} cannot be; give a rank above zero")));
    }
    let layers: Vec<(String, Vec<i64>)> =
        model.linears().iter().map(|linear| (linear.name.clone(), linear.weight.size())).collect();
    let mut out = Vec::new();
    let mut unmet: Vec<&String> = config.targets.iter().collect();
    for (name, shape) in &layers {
        let module = model.module(name);
        if !config.wants(&module) {
            continue;
        }
        unmet.retain(|target| {
            let one = LoraConfig { targets: vec![(*target).clone()], ..config.clone() };
            !one.wants(&module)
        });
        let [a, b] = key_pair(&module);
        let gaussian = Init::Normal(1.0 / config.rank as f64);
        out.push(ParamSpec::new(a, &[config.rank, shape[1]], gaussian));
        out.push(ParamSpec::new(b, &[shape[0], config.rank], Init::Zeros));
    }
    match unmet.first() {
        Some(target) => Err(ModelError::BadInput(format!(
            "adapter target `{target}` matches no linear layer of the model"
        ))),
        None if out.is_empty() => {
            Err(ModelError::BadInput("an adapter needs at least one target layer".to_owned()))
        }
        None => Ok(out),
    }
}

fn config_json(config: &LoraConfig) -> Value {
    json!({
        "peft_type": "LORA",
        "task_type": null,
        "base_model_name_or_path": null,
        "inference_mode": true,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": "gaussian",
        "target_modules": config.targets,
        "modules_to_save": null,
        "use_rslora": false,
        "use_dora": false,
    })
}

/// `layers`: those that the adapter's file has tensors for.
fn read_config(config: &Value, path: &Path, layers: &[String]) -> Result<LoraConfig> {
    let bad = |key: &str, reason: &str| {
        Err(ModelError::bad_config(path.display().to_string(), key, reason))
    };
    for key in ["use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"] {
        if config.get(key).and_then(Value::as_bool).unwrap_or(false) {
            return bad(key, "this kind of adapter is not implemented");
        }
    }
    for key in ["rank_pattern", "alpha_pattern"] {
        if config.get(key).and_then(Value::as_object).is_some_and(|map| !map.is_empty()) {
            return bad(key, "ranks that differ by layer are not implemented");
        }
    }
    let Some(rank) = config.get("r").and_then(Value::as_i64) else {
        return bad("r", "missing, or not a whole number");
    };
    let Some(alpha) = config.get("lora_alpha").and_then(Value::as_f64) else {
        return bad("lora_alpha", "missing, or not a number");
    };
    if config.get("bias").and_then(Value::as_str).is_some_and(|bias| bias != "none") {
        return bad("bias", "biases that are trained beside the adapter are not implemented");
    }
    let whole = |key: &str| config.get(key).is_some_and(|value| !value.is_null());
    if whole("modules_to_save") {
        return bad("modules_to_save", "layers that are trained whole are not implemented");
    }
    // A pattern, `all-linear`, or a part of the layers: what it came to is in the file.
    let narrowed = ["layers_to_transform", "exclude_modules"].into_iter().any(whole);
    let targets = match config.get("target_modules") {
        Some(Value::Array(targets)) if !narrowed => {
            targets.iter().filter_map(Value::as_str).map(str::to_owned).collect()
        }
        Some(Value::Array(_) | Value::String(_)) => layers.to_vec(),
        _ => return bad("target_modules", "a list of layer names, or a pattern, expected"),
    };
    Ok(LoraConfig { rank, alpha, targets })
}

/// `y + scale x A' B'`, in the adapter's dtype, then in `y`'s.
pub(crate) fn add_low_rank(adapter: &Adapter, x: &Tensor, y: Tensor) -> Tensor {
    let kind = adapter.a.kind();
    let low = x.to_kind(kind).linear::<Tensor>(&adapter.a, None) * adapter.scale;
    if y.kind() == kind {
        // Added by the product itself: no pass over the wide output for it.
        let rows = |x: &Tensor| x.reshape([-1, x.size()[x.dim() - 1]]);
        return rows(&y).addmm(&rows(&low), &adapter.b.tr()).view_as(&y);
    }
    let low = low.linear::<Tensor>(&adapter.b, None);
    let added = low.to_kind(y.kind());
    y + added
}
