//! `duet plan`, whose parameters must be those of the models that are really built.

use duet_tests::{base_model, bin, root, text};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn plan(arguments: &[&str]) -> Output {
    let mut command = Command::new(bin("duet"));
    command.current_dir(root()).arg("plan").args(arguments);
    command.output().expect("duet starts")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(output)))
}

/// Elements of the tensors of a part's one file, by its header, but for the vision tower's.
fn elements(folder: &Path) -> u64 {
    let named =
        |entry: &std::fs::DirEntry| entry.path().extension().is_some_and(|e| e == "safetensors");
    let file = std::fs::read_dir(folder).expect("a part").flatten().find(named).expect("weights");
    let bytes = std::fs::read(file.path()).expect("weights");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("a length")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    let tensors = header.as_object().expect("an object").iter();
    let own = tensors.filter(|(name, _)| !name.starts_with("visual.") && *name != "__metadata__");
    own.map(|(_, t)| {
        let shape = t["shape"].as_array().expect("a shape").iter();
        shape.map(|side| side.as_u64().expect("a side")).product::<u64>()
    })
    .sum()
}

#[test]
fn parameters_are_those_of_the_built_model_and_little_memory_does_not_fit() {
    let path = format!("model.path=\"{}\"", base_model().display());
    let all = ["configs/test.toml", "--set", &path, "--json", "--gpu-memory"];
    let fits = plan(&[&all[..], &["80GiB"]].concat());
    let got = json(&fits);
    for (part, name) in [("llm", "text_encoder"), ("dit", "transformer"), ("vae", "vae")] {
        let counted = got["parameters"][part].as_u64();
        assert_eq!(counted, Some(elements(&base_model().join(name))), "{name}");
    }
    assert_eq!((fits.status.code(), got["fits"].as_bool()), (Some(0), Some(true)));
    let tight = plan(&[&all[..], &["10MiB"]].concat());
    assert_eq!((tight.status.code(), json(&tight)["fits"].as_bool()), (Some(1), Some(false)));
}

#[test]
fn the_papers_settings_fit_the_gpus_that_their_files_name() {
    for config in ["configs/qwen-image-8gpu.toml", "configs/qwen-image-64gpu.toml"] {
        let told = plan(&[config, "--published", "--json", "--gpu-memory", "131GiB"]);
        assert_eq!(told.status.code(), Some(0), "{}", text(&told));
        assert_eq!(json(&told)["fits"].as_bool(), Some(true), "{config}");
        let head = std::fs::read_to_string(root().join(config)).expect("a configuration");
        let command = format!("duet plan {config} --published --gpu-memory 131GiB");
        assert!(head.contains(&command), "{config} does not say `{command}`");
    }
}

#[test]
fn the_published_model_is_planned_without_its_folder() {
    let config = ["configs/qwen-image-8gpu.toml", "--published", "--gpu-memory", "80GiB"];
    let told = plan(&config);
    let said = text(&told);
    assert_eq!(told.status.code(), Some(1), "{said}");
    for part in ["7.6156 G", "20.4304 G", "trainer rank does not fit", "[llm.lora]"] {
        assert!(said.contains(part), "`{part}` is not in: {said}");
    }
    let told = plan(&["configs/qwen-image-8gpu.toml"]);
    assert_eq!(told.status.code(), Some(64));
    assert!(text(&told).contains("--published"), "{}", text(&told));
}
