//! Files: a checkpoint's manifest, a configuration, prompts, checksums, tensors.

use duet_config::Config;
use duet_models::artifact::{RenderArtifact, ThinkArtifact};
use duet_store::Manifest;
use duet_store::folder::Sums;
use duet_torch::tensorfile::{TensorFile, TensorSource};
use std::collections::BTreeMap;
use std::path::Path;
use tch::Device;

/// A manifest. Its own hash guards it, so what is accepted is exactly what was written.
pub fn manifest(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::from_bytes(bytes) {
        let written = manifest.to_bytes().expect("what was read can be written");
        assert!(Manifest::from_bytes(&written) == Ok(manifest), "a manifest changes when written");
    }
}

/// The small world's.
pub fn manifests() -> Vec<Vec<u8>> {
    vec![include_bytes!("../corpus/manifest.json").to_vec()]
}

/// A configuration: what is accepted comes back the same from the form that `--print-config` gives.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let read = |text: &str| Config::from_text("fuzz", text, &BTreeMap::new(), &[]);
    match read(text) {
        Ok(config) => {
            let printed = config.to_toml();
            let again = read(&printed).map(|config| config.to_toml());
            assert!(
                again.is_ok_and(|again| again == printed),
                "what is printed is not what it was"
            );
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// The shipped configurations.
pub fn configs() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    files.filter_map(|file| std::fs::read(file.path()).ok()).collect()
}

/// A file of prompts.
pub fn prompts(bytes: &[u8]) {
    let path = Path::new("fuzz.jsonl");
    let Ok(rows) = duet_config::prompts::from_reader(path, bytes) else { return };
    let text = duet_config::prompts::to_text(&rows);
    let again = duet_config::prompts::from_reader(path, text.as_bytes());
    assert!(again.is_ok_and(|again| again == rows), "prompts change when written");
}

/// Prompts with and without what may come with them.
pub fn prompt_files() -> Vec<Vec<u8>> {
    let text = "{\"prompt\": \"two plus three\", \"meta\": {\"answer\": [5, null, 0.1]}}\n\n{\"prompt\": \"\\u00e9\", \"meta\": \"x\"}\n";
    vec![text.as_bytes().to_vec()]
}

/// A list of checksums of a folder.
pub fn sums(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(sums) = Sums::parse("fuzz", text) else { return };
    let again = Sums::parse("fuzz", &sums.to_text());
    assert!(again.is_ok_and(|again| again.to_text() == sums.to_text()), "sums change when written");
}

/// Checksums of two files.
pub fn sum_files() -> Vec<Vec<u8>> {
    let line = |name: &str| format!("{}  {name}\n", "0a".repeat(32));
    vec![(line("config.json") + &line("vae/model.safetensors")).into_bytes()]
}

/// A safetensors file, and what a trace's and its images' artifacts make of it.
pub fn tensors(bytes: &[u8]) {
    if let Ok(file) = TensorFile::from_bytes("fuzz", bytes.to_vec()) {
        for name in file.names() {
            let (spec, raw) = file.raw(name).expect("what is listed is there");
            assert!(raw.len() <= bytes.len() && spec.shape.iter().all(|n| *n >= 0));
        }
    }
    let think = ThinkArtifact::decode("fuzz", bytes.to_vec(), Device::Cpu);
    if let Ok(artifact) = think {
        let written = artifact.encode().expect("what was read can be written");
        let again = ThinkArtifact::decode("fuzz", written, Device::Cpu).expect("and read again");
        assert!(again.tokens.equal(&artifact.tokens), "tokens change when written");
    }
    if let Ok(artifact) = RenderArtifact::decode("fuzz", bytes.to_vec(), Device::Cpu) {
        drop(artifact.encode().expect("what was read can be written"));
    }
}

/// A plain file, and both artifacts.
pub fn tensor_files() -> Vec<Vec<u8>> {
    use tch::{Kind, Tensor};
    let header =
        br#"{"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let plain = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 8]].concat();
    let float = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let think = ThinkArtifact {
        tokens: Tensor::from_slice(&[1i64, 2, 3]),
        prompt_len: 1,
        log_probs: float(&[2]),
        embeds: float(&[2, 3]),
        negative_embeds: float(&[1, 3]),
    };
    let render = RenderArtifact {
        latents: float(&[1, 2, 4, 2]),
        log_probs: float(&[1, 1]),
        images: Tensor::zeros([1, 2, 2, 3], (Kind::Uint8, Device::Cpu)),
        last: Some(float(&[1, 4, 2])),
        window_start: 0,
    };
    [Ok(plain), think.encode(), render.encode()].into_iter().filter_map(Result::ok).collect()
}
