//! `sample` as a person runs it: a real process, a small random pipeline, pictures that are read back.

mod common;

use duet_models::defaults::Defaults;
use duet_models::lora::{Adaptable, Lora, LoraConfig};
use duet_store::folder::Sums;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The small pipeline as a folder.
fn model(folder: &Path) -> PathBuf {
    let path = folder.join("model");
    common::pipeline().save(&path).unwrap();
    let defaults =
        Defaults { max_new_tokens: 12, steps: 3, width: 32, height: 24, ..Defaults::default() };
    defaults.write(&path).unwrap();
    path
}

fn run(folder: &Path, arguments: &[&str]) -> (i32, String) {
    let Output { status, stderr, .. } = Command::new(env!("CARGO_BIN_EXE_duet-rollout-worker"))
        .arg("sample")
        .args(arguments)
        .current_dir(folder)
        .env("XDG_CACHE_HOME", folder.join("cache"))
        .output()
        .unwrap();
    (status.code().unwrap(), String::from_utf8_lossy(&stderr).into_owned())
}

fn draw(folder: &Path, arguments: &[&str]) -> String {
    let (code, said) = run(folder, arguments);
    assert_eq!(code, 0, "{said}");
    said
}

/// Width, height and texts of a picture.
fn read(path: &Path) -> ((u32, u32), BTreeMap<String, String>) {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
    reader.finish().unwrap();
    let info = reader.info();
    let latin = info.uncompressed_latin1_text.iter().map(|t| (t.keyword.clone(), t.text.clone()));
    let utf8 = info.utf8_text.iter().map(|t| (t.keyword.clone(), t.get_text().unwrap()));
    ((info.width, info.height), latin.chain(utf8).collect())
}

#[test]
fn a_prompt_gives_the_same_bytes_alone_and_in_a_file_and_says_how() {
    let temporary = tempfile::tempdir().unwrap();
    let here = temporary.path();
    let digest = Sums::of(&model(here)).unwrap().digest().to_string();
    std::fs::write(here.join("p.txt"), "a red seven\n\n三 birds\n").unwrap();
    let said =
        draw(here, &["--model", "model", "--prompts", "p.txt", "--out", "many", "--seed", "5"]);
    assert!(said.contains("2 of 2: 三 birds") && said.contains("thinking"), "{said}");
    assert!(!said.contains('\u{1b}'), "plain lines where there is no terminal: {said}");
    let one = ["--model", "model", "--prompt", "三 birds", "--out", "one.png", "--seed"];
    draw(here, &[&one[..], &["5"]].concat());
    let bytes = |name: &str| std::fs::read(here.join(name)).unwrap();
    assert_eq!(bytes("one.png"), bytes("many/00001.png"));
    draw(here, &[&one[..], &["6"]].concat());
    assert_ne!(bytes("one.png"), bytes("many/00001.png"));

    let (size, texts) = read(&here.join("many/00001.png"));
    assert_eq!(size, (32, 24));
    for (key, value) in [
        ("prompt", "三 birds"),
        ("seed", "5"),
        ("steps", "3"),
        ("guidance", "4"),
        ("size", "32x24"),
        ("model", &digest),
    ] {
        assert_eq!(texts.get(key).map(String::as_str), Some(value), "{key}");
    }
    assert!(texts.contains_key("trace") && texts.contains_key("refined prompt"));

    std::fs::write(here.join("p.jsonl"), "{\"prompt\": \"a red seven\"}\n").unwrap();
    let options = ["--no-think", "--steps", "2", "--cfg", "1.5", "--size", "16x32"];
    let all = ["--model", "model", "--prompts", "p.jsonl", "--out", "raw"];
    draw(here, &[&all[..], &options].concat());
    let (size, texts) = read(&here.join("raw/00000.png"));
    assert_eq!(size, (16, 32));
    assert_eq!((texts["steps"].as_str(), texts["guidance"].as_str()), ("2", "1.5"));
    assert!(!texts.contains_key("trace"));
}

/// An adapter that is not trained any more, in a folder.
fn adapter(model: &mut impl Adaptable, targets: Vec<String>, folder: &Path) {
    let config = LoraConfig { rank: 2, alpha: 4.0, targets };
    let lora = Lora::attach(model, config, &duet_core::Seed::root(1)).unwrap();
    tch::no_grad(|| {
        for (_, tensor) in lora.params().iter() {
            let _ = tensor.shallow_clone().fill_(0.2);
        }
    });
    lora.save(folder).unwrap();
}

#[test]
fn an_adapter_finds_its_model_by_the_names_of_its_layers() {
    let temporary = tempfile::tempdir().unwrap();
    let here = temporary.path();
    model(here);
    let mut pipeline = common::pipeline();
    adapter(&mut pipeline.dit, LoraConfig::dit_targets(), &here.join("drawn"));
    adapter(
        &mut pipeline.lm,
        vec!["q_proj".to_owned(), "down_proj".to_owned()],
        &here.join("said"),
    );
    let draw_with = |name: &str, adapters: &[&str]| {
        let mut all =
            vec!["--model", "model", "--prompt", "a red seven", "--no-think", "--out", name];
        all.extend(adapters.iter().flat_map(|folder| ["--adapter", *folder]));
        draw(here, &all);
        std::fs::read(here.join(name)).unwrap()
    };
    let pixels = |name: &str, adapters: &[&str]| {
        draw_with(name, adapters);
        let file = std::fs::File::open(here.join(name)).unwrap();
        let mut reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().unwrap();
        let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut bytes).unwrap();
        bytes
    };
    let plain = pixels("plain.png", &[]);
    let said = pixels("said.png", &["said"]);
    let both = pixels("both.png", &["said", "drawn"]);
    assert!(plain != said && said != both);
    assert_eq!(draw_with("a.png", &["llm=said"]), draw_with("b.png", &["said"]));
    assert_eq!(both, pixels("named.png", &["dit=drawn", "llm=said"]));
    assert_ne!(both, pixels("twice.png", &["said", "drawn", "drawn"]), "a second one adds to it");
    let digests =
        ["said", "drawn"].map(|name| Sums::of(&here.join(name)).unwrap().digest().to_string());
    assert_eq!(read(&here.join("both.png")).1["adapter"], digests.join(" "));

    let wrong = ["--model", "model", "--prompt", "x", "--out", "no.png", "--adapter", "dit=said"];
    let (code, error) = run(here, &wrong);
    assert!(code == 78 && error.contains("q_proj") && error.contains("no linear layer"), "{error}");
    assert!(!here.join("no.png").exists());
}

#[test]
fn an_adapter_changes_the_picture_and_is_named_in_it() {
    let temporary = tempfile::tempdir().unwrap();
    let here = temporary.path();
    model(here);
    adapter(&mut common::pipeline().dit, LoraConfig::dit_targets(), &here.join("adapter"));
    let all = ["--model", "model", "--prompt", "a red seven", "--no-think", "--out"];
    draw(here, &[&all[..], &["plain.png"]].concat());
    draw(here, &[&all[..], &["adapted.png", "--adapter", "adapter"]].concat());
    let bytes = |name: &str| std::fs::read(here.join(name)).unwrap();
    assert_ne!(bytes("plain.png"), bytes("adapted.png"));
    let digest = Sums::of(&here.join("adapter")).unwrap().digest().to_string();
    assert_eq!(read(&here.join("adapted.png")).1["adapter"], digest);
    assert!(!read(&here.join("plain.png")).1.contains_key("adapter"));
}

#[test]
fn a_model_by_url_is_fetched_once_and_verified() {
    let temporary = tempfile::tempdir().unwrap();
    let here = temporary.path();
    let folder = model(here);
    let url = format!("file://{}", folder.display());
    let all = ["--no-think", "--prompt", "a red seven", "--out"];
    let at = |model: &str, out: &str| run(here, &[&["--model", model][..], &all, &[out]].concat());
    let (code, said) = at(&url, "a.png");
    assert!(code == 74 && said.contains("B3SUMS") && said.contains("duet digest"), "{said}");

    let sums = Sums::of(&folder).unwrap();
    sums.write(&folder).unwrap();
    assert_eq!(at("model", "local.png").0, 0);
    let (code, said) = at(&url, "a.png");
    assert!(code == 0 && said.contains("fetching"), "{said}");
    let (code, said) = at(&url, "b.png");
    assert!(code == 0 && !said.contains("fetching"), "{said}");
    let bytes = |name: &str| std::fs::read(here.join(name)).unwrap();
    assert!(bytes("a.png") == bytes("b.png") && bytes("a.png") == bytes("local.png"));

    // What was damaged in the cache is fetched again, and nothing else.
    let cached = here.join("cache/duet/models").join(sums.digest().to_string());
    let (name, _) = sums.iter().find(|(name, _)| name.contains("transformer/")).unwrap();
    std::fs::write(cached.join(name), b"cut short").unwrap();
    let (code, said) = at(&url, "c.png");
    assert!(code == 0 && said.contains("fetching"), "{said}");
    assert_eq!(bytes("c.png"), bytes("a.png"));

    // What was tampered with on the store is refused by name, and does not reach the cache.
    let weights = "vae/diffusion_pytorch_model.safetensors";
    let mut changed = std::fs::read(folder.join(weights)).unwrap();
    *changed.last_mut().unwrap() ^= 1;
    std::fs::write(folder.join(weights), changed).unwrap();
    std::fs::remove_file(cached.join(weights)).unwrap();
    let (code, said) = at(&url, "d.png");
    assert!(code == 74 && said.contains(weights) && said.contains("DU-9"), "{said}");
    assert!(!cached.join(weights).exists() && !here.join("d.png").exists());
}

#[test]
fn mistakes_are_named_before_anything_is_written() {
    let temporary = tempfile::tempdir().unwrap();
    let here = temporary.path();
    let folder = model(here);
    let with = |more: &[&str]| {
        let all = ["--model", "model", "--no-think", "--out", "a.png"];
        run(here, &[&all[..], more].concat())
    };
    let prompt = ["--prompt", "x"];
    for (more, code, parts) in [
        (&[&prompt[..], &["--size", "30x24"]].concat()[..], 78, &["30 x 24", "multiples of"][..]),
        (&[&prompt[..], &["--adapter", "no"]].concat(), 74, &["--adapter no", "no such folder"]),
        (&["--prompts", "no.txt"], 74, &["no.txt"]),
        (&[&prompt[..], &["--prompts", "no.txt"]].concat(), 64, &["cannot be used with"]),
    ] {
        let (got, said) = with(more);
        assert_eq!(got, code, "{said}");
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    }
    let weights = folder.join("transformer/diffusion_pytorch_model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() - 7]).unwrap();
    let (code, said) = with(&prompt);
    assert!(
        code != 0 && said.contains("transformer/diffusion_pytorch_model.safetensors"),
        "{said}"
    );
    assert!(!here.join("a.png").exists());
}
