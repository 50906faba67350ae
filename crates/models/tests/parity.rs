//! Equality with transformers, diffusers and PEFT, on fixtures that `scripts/parity/generate.py` wrote
//! with them: forward and backward, float32 on the CPU.
//!
//! `DUET_FIXTURES` names another folder of fixtures, for instance a fresh one.

mod common;

use duet_models::decoder::Decoder;
use duet_models::dit::{Dit, DitConfig};
use duet_models::embed::Embedder;
use duet_models::flow::FlowSchedule;
use duet_models::generate::{SampleOptions, generate};
use duet_models::lm::{Lm, LmConfig};
use duet_models::logprob::token_log_probs;
use duet_models::lora::{Lora, Part};
use duet_models::params::ParamSet;
use duet_models::pipeline::{LoadOptions, Pipeline};
use duet_models::render::{Condition, RenderOptions, Sampler, decode};
use duet_models::sde::{SdeKind, step};
use duet_models::vae::{Vae, VaeConfig};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use tch::{IndexOp, Kind, Tensor};

/// Largest error, relative to the output's own scale.
const TOLERANCE: f64 = 2e-5;

fn folder() -> PathBuf {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    std::env::var_os("DUET_FIXTURES").map_or_else(|| PathBuf::from(own), PathBuf::from)
}

struct Case {
    config: Value,
    tensors: BTreeMap<String, Tensor>,
}

impl Case {
    fn open(name: &str) -> Case {
        common::one_thread();
        let path = folder().join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let config = header.metadata().as_ref().unwrap()["config"].clone();
        let tensors = Tensor::read_safetensors(path).unwrap().into_iter().collect();
        Case { config: serde_json::from_str(&config).unwrap(), tensors }
    }

    fn get(&self, name: &str) -> Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("no `{name}`")).shallow_clone()
    }

    fn below(&self, prefix: &str) -> BTreeMap<String, Tensor> {
        let inside = self.tensors.iter().filter_map(|(name, tensor)| {
            name.strip_prefix(prefix).map(|name| (name.to_owned(), tensor.shallow_clone()))
        });
        inside.collect()
    }

    fn weights(&self) -> ParamSet {
        self.below("w.").into_iter().collect()
    }

    fn near(&self, got: &Tensor, name: &str) {
        near(got, &self.get(name), name);
    }

    /// Every gradient of the fixture, and none beside them (zero counts as none).
    fn gradients(&self, params: &ParamSet, prefix: &str) {
        let want = self.below(prefix);
        assert!(!want.is_empty(), "no gradients under {prefix}");
        for (name, tensor) in params.iter() {
            let grad = tensor.grad();
            match (want.get(name), grad.defined()) {
                (Some(want), true) => near(&grad, want, name),
                (Some(want), false) => near(&want.zeros_like(), want, name),
                (None, true) => near(&grad, &grad.zeros_like(), name),
                (None, false) => {}
            }
        }
    }
}

fn near(got: &Tensor, want: &Tensor, name: &str) {
    near_at(got, want, want.abs().max().double_value(&[]).max(1e-3), name);
}

fn near_at(got: &Tensor, want: &Tensor, scale: f64, name: &str) {
    assert_eq!(got.size(), want.size(), "{name}");
    let error = (got - want).abs().max().double_value(&[]) / scale;
    assert!(error <= TOLERANCE, "{name}: relative error {error:e} at scale {scale}");
}

fn language(name: &str) {
    let case = Case::open(name);
    let config = LmConfig::from_json(&case.config, name).unwrap();
    let lm = Lm::new(config, case.weights(), name).unwrap();
    let tokens = case.get("in.tokens");
    let plain = lm.hidden(&tokens, None);
    case.near(&plain, "out.hidden.none");
    case.near(&lm.logits(&plain), "out.logits.none");
    for side in ["left", "right"] {
        let mask = case.get(&format!("in.{side}"));
        let hidden = lm.hidden(&tokens, Some(&mask));
        let real = mask.unsqueeze(-1).to_kind(Kind::Float);
        let logits = lm.logits(&hidden);
        for (what, got) in [("hidden", hidden), ("logits", logits)] {
            let want = case.get(&format!("out.{what}.{side}"));
            near(&(got * &real), &(want * &real), what);
        }
    }
    // Right padding needs no mask.
    let mask = case.get("in.right").unsqueeze(-1);
    near(&(plain * &mask), &(case.get("out.hidden.right") * &mask), "right without mask");

    let rows: Vec<Vec<i64>> = Vec::try_from(&tokens).unwrap();
    let weigh = case.get("in.weigh");
    lm.params().set_trainable(|_| true);
    for (index, row) in rows.iter().enumerate() {
        let got = token_log_probs(&lm, &row[..1], &[row[1..].to_vec()], 1.0, false).unwrap();
        (got.values * weigh.i(index as i64)).sum(Kind::Float).backward();
    }
    case.gradients(lm.params(), "grad.");
    lm.params().set_trainable(|_| false);

    let options =
        SampleOptions { traces: 2, max_new_tokens: 24, temperature: 0.0, eos: Vec::new() };
    let seed = duet_core::Seed::root(0);
    let answers = generate(&Decoder::new(&lm).unwrap(), &rows[0], &seed, &options).unwrap();
    let want: Vec<i64> = Vec::try_from(case.get("out.greedy").flatten(0, 1)).unwrap();
    assert_eq!([rows[0].clone(), answers[1].tokens.clone()].concat(), want);
}

#[test]
fn language_model_tied_one_key_head_per_head() {
    language("lm_ratio1_tied");
}

#[test]
fn language_model_two_heads_per_key_head() {
    language("lm_ratio2");
}

#[test]
fn language_model_seven_heads_per_key_head() {
    language("lm_ratio7");
}

#[test]
fn transformer() {
    let case = Case::open("dit");
    let config = DitConfig::from_json(&case.config, "dit").unwrap();
    let dit = Dit::new(config, case.weights(), "dit").unwrap();
    let names = case.config["cases"].as_array().unwrap();
    for name in names.iter().map(|name| name.as_str().unwrap()) {
        let input = |what: &str| case.get(&format!("{name}.in.{what}"));
        let latents = input("latents").set_requires_grad(true);
        let embeds = input("embeds").set_requires_grad(true);
        let grid: Vec<i64> = Vec::try_from(input("grid")).unwrap();
        let (times, mask) = (input("times"), input("mask"));
        dit.params().set_trainable(|_| true);
        dit.params().iter().for_each(|(_, tensor)| tensor.shallow_clone().zero_grad());
        let text = dit.text(&embeds, Some(&mask)).unwrap();
        let positions = dit.positions(embeds.size()[1], (grid[0], grid[1]));
        let mods = dit.modulations(&times);
        let out = dit.forward(&latents, &text, &positions, &mods, None).unwrap();
        case.near(&out, &format!("{name}.out"));
        (out * input("weigh")).sum(Kind::Float).backward();
        case.near(&latents.grad(), &format!("{name}.grad.latents"));
        case.near(&embeds.grad(), &format!("{name}.grad.embeds"));
        if !case.below(&format!("{name}.grad.w.")).is_empty() {
            case.gradients(dit.params(), &format!("{name}.grad.w."));
        }
        // One row of modulations for all samples takes the fused path.
        if times.min() == times.max() {
            let mods = dit.modulations(&times.narrow(0, 0, 1));
            let out = dit.forward(&latents, &text, &positions, &mods, Some(0)).unwrap();
            case.near(&out, &format!("{name}.out"));
        }
    }
}

fn autoencoder(name: &str) {
    let case = Case::open(name);
    let config = VaeConfig::from_json(&case.config, name).unwrap();
    let vae = Vae::new(config, case.weights(), name).unwrap();
    vae.params().set_trainable(|_| true);
    let images = case.get("in.images").set_requires_grad(true);
    let (mean, logvar) = vae.encode(&images).unwrap();
    case.near(&mean, "out.mean");
    case.near(&logvar, "out.logvar");
    ((mean + logvar) * case.get("in.weigh")).sum(Kind::Float).backward();
    case.near(&images.grad(), "grad.images");
    let latents = case.get("in.latents").set_requires_grad(true);
    let raw = vae.decode_unclamped(&latents);
    case.near(&raw, "out.raw");
    // Clamping hides the scale that the error is relative to.
    let scale = raw.abs().max().double_value(&[]);
    near_at(&vae.decode(&latents), &case.get("out.decoded"), scale, "out.decoded");
    (raw * case.get("in.weigh_decoder")).sum(Kind::Float).backward();
    case.near(&latents.grad(), "grad.latents");
    if !case.below("grad.encoder.").is_empty() {
        case.gradients(vae.params(), "grad.");
    }
}

#[test]
fn autoencoder_that_halves_twice() {
    autoencoder("vae_two");
}

#[test]
fn autoencoder_that_halves_three_times() {
    autoencoder("vae_three");
}

#[test]
fn whole_pipeline() {
    let case = Case::open("pipeline");
    let pipeline = Pipeline::load(&folder().join("pipeline")).unwrap();
    for (index, text) in case.config["texts"].as_array().unwrap().iter().enumerate() {
        let want: Vec<i64> = Vec::try_from(case.get(&format!("out.ids.{index}"))).unwrap();
        assert_eq!(pipeline.tokenizer.encode(text.as_str().unwrap()).unwrap(), want, "{text}");
    }
    let embedder = Embedder::new(&pipeline.lm, &pipeline.tokenizer).unwrap();
    let negative = embedder.embed(" ").unwrap();
    case.near(&negative, "out.negative");
    let long = embedder.embed(case.config["long"].as_str().unwrap()).unwrap();
    assert_eq!(long.size()[long.dim() - 2], 512, "the cap");
    case.near(&long, "out.embeds.long");
    let size: Vec<i64> = serde_json::from_value(case.config["size"].clone()).unwrap();
    let grid = pipeline.grid(size[0], size[1]).unwrap();
    let options = RenderOptions {
        steps: 6,
        guidance: 4.0,
        sde: SdeKind::FlowGrpo,
        noise_level: 0.0,
        width: size[0],
        height: size[1],
    };
    for (index, name) in ["a", "b"].into_iter().enumerate() {
        let prompt = case.config["prompts"][index].as_str().unwrap();
        let embeds = embedder.embed(prompt).unwrap();
        case.near(&embeds, &format!("out.embeds.{name}"));
        let condition = Condition { embeds: &embeds, negative: Some(&negative) };
        let schedule = FlowSchedule::new(&pipeline.flow, 6, grid.0 * grid.1).unwrap();
        let sigmas = Tensor::from_slice(schedule.sigmas());
        case.near(&sigmas, "out.sigmas");
        let window = Default::default();
        let sampler =
            Sampler::new(&pipeline.dit, schedule, condition, (1, grid), window, &options).unwrap();
        let mut x = case.get("in.noise").narrow(0, index as i64, 1);
        for at in 0..6 {
            let velocity = sampler.velocity(&x, at).unwrap();
            x = step(&sampler.coefficients(at), &x, &velocity, None).next;
        }
        let close = |got: &Tensor, want: Tensor| {
            let error = (got - want.narrow(0, index as i64, 1)).abs().max().double_value(&[]);
            assert!(error < 1e-3, "prompt {name}: {error}");
        };
        close(&x, case.get("out.latents"));
        let image = decode(&pipeline, &x, grid).to_kind(Kind::Float) / 255.0;
        let error = (image - case.get("out.images").narrow(0, index as i64, 1)).abs().max();
        assert!(error.double_value(&[]) <= 0.5 / 255.0 + 1e-3);
    }
}

#[test]
fn adapter_that_peft_wrote() {
    let case = Case::open("adapter");
    let mut pipeline = Pipeline::load(&folder().join("pipeline")).unwrap();
    let lora = Lora::load(&mut pipeline.dit, &folder().join("adapter")).unwrap();
    lora.params().set_trainable(|_| true);
    let dit = &pipeline.dit;
    let text = dit.text(&case.get("in.embeds"), None).unwrap();
    let mods = dit.modulations(&Tensor::from_slice(&[0.6f32]));
    let positions = dit.positions(5, (2, 3));
    let out = dit.forward(&case.get("in.latents"), &text, &positions, &mods, Some(0)).unwrap();
    case.near(&out, "out");
    out.square().sum(Kind::Float).backward();
    case.gradients(lora.params(), "grad.");
}

/// Its layers are given by a pattern, as PEFT allows.
#[test]
fn adapter_that_peft_wrote_for_the_language_model() {
    let case = Case::open("adapter_lm");
    let mut pipeline = Pipeline::load(&folder().join("pipeline")).unwrap();
    let from = folder().join("adapter_lm");
    assert_eq!(Lora::made_for(&from).unwrap(), Part::Llm);
    assert_eq!(Lora::made_for(&folder().join("adapter")).unwrap(), Part::Dit);
    let lora = Lora::load(&mut pipeline.lm, &from).unwrap();
    lora.params().set_trainable(|_| true);
    let tokens = case.get("in.tokens");
    let out = pipeline.lm.hidden(&tokens, None);
    case.near(&out, "out");
    out.square().sum(Kind::Float).backward();
    case.gradients(lora.params(), "grad.");
    lora.params().set_trainable(|_| false);
    lora.merge(&mut pipeline.lm);
    case.near(&pipeline.lm.hidden(&tokens, None), "out");
    lora.unmerge(&mut pipeline.lm);
    case.near(&pipeline.lm.hidden(&tokens, None), "out");
}

/// bf16 has no "equal": what our kernels lose against fp32 may not be more than what the libraries' own
/// lose. Root mean squares, relative to the fp32 output's.
#[test]
fn bfloat16_loses_no_more_than_the_libraries_do() {
    let case = Case::open("bfloat16");
    let kind = Kind::BFloat16;
    let options = LoadOptions { lm: kind, dit: kind, ..LoadOptions::default() };
    let pipeline = Pipeline::load_with(&folder().join("pipeline"), options).unwrap();
    let hidden = pipeline.lm.hidden(&case.get("in.tokens"), None);
    let embeds = case.get("in.embeds").to_kind(kind);
    let dit = &pipeline.dit;
    let text = dit.text(&embeds, None).unwrap();
    let mods = dit.modulations(&case.get("in.times").narrow(0, 0, 1));
    let positions = dit.positions(20, (4, 6));
    let latents = case.get("in.latents").to_kind(kind);
    let drawn = dit.forward(&latents, &text, &positions, &mods, Some(0)).unwrap();
    for (what, got) in [("hidden", hidden), ("drawn", drawn)] {
        let exact = case.get(&format!("out.{what}.float32"));
        let size = |t: &Tensor| t.square().mean(Kind::Double).sqrt().double_value(&[]);
        let lost = |t: &Tensor| size(&(t.to_kind(Kind::Float) - &exact)) / size(&exact);
        let (ours, theirs) = (lost(&got), lost(&case.get(&format!("out.{what}.bfloat16"))));
        println!("{what}: bf16 against fp32: {ours:.2e} here, {theirs:.2e} in the libraries");
        assert!(ours <= 1.2 * theirs, "{what}: {ours} against {theirs}");
    }
}
