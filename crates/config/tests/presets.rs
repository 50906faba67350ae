//! Each preset, whole: what it resolves to stands in `docs/presets`, and a change of it is a change
//! of that file. `UPDATE_PRESETS=1 cargo test -p duet-config --test presets` writes them anew.

use duet_config::{Config, PRESETS};
use std::collections::BTreeMap;
use std::path::PathBuf;

const BASE: &str = "[model]\npath = \"model\"\n[data]\nprompts = \"prompts.jsonl\"\n";

#[test]
fn presets_resolve_to_what_is_documented() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/presets");
    for (name, _) in PRESETS {
        let text = format!("preset = \"{name}\"\n{BASE}");
        let config = Config::from_text("preset.toml", &text, &BTreeMap::new(), &[]).unwrap();
        let resolved = config.to_toml();
        println!("# {name}\n{resolved}");
        let file = folder.join(format!("{name}.toml"));
        if std::env::var_os("UPDATE_PRESETS").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&file, &resolved).unwrap();
        }
        let documented = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(documented == resolved, "{} is not what the preset resolves to", file.display());
        let again = Config::from_text("again.toml", &documented, &BTreeMap::new(), &[]).unwrap();
        assert_eq!(again.digest(), config.digest(), "{name}: what is printed is the same run");
    }
}

/// Every key of the sections that decide the algorithm, and every value of those that are a choice,
/// stands in `docs/algorithm.md`.
#[test]
fn every_option_is_documented() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/algorithm.md");
    let text = std::fs::read_to_string(path).unwrap();
    let named = |word: &str| {
        text.split(|c: char| !(c.is_alphanumeric() || "_-".contains(c))).any(|found| found == word)
    };
    let config = Config::from_text("plain.toml", BASE, &BTreeMap::new(), &[]).unwrap().to_toml();
    let config: toml::Table = config.parse().unwrap();
    let elsewhere = ["lr", "betas", "weight_decay", "train", "eps"];
    for section in ["llm", "dit"] {
        for key in config[section].as_table().unwrap().keys() {
            assert!(elsewhere.contains(&key.as_str()) || named(key), "{section}.{key}");
        }
        for key in config["advantage"][section].as_table().unwrap().keys() {
            assert!(named(key), "advantage.{section}.{key}");
        }
    }
    for value in [
        "flow-grpo",
        "cps",
        "dance",
        "fixed",
        "random",
        "progressive",
        "all",
        "ppo",
        "gspo",
        "cispo",
        "token-mean",
        "sequence-mean",
        "constant",
        "k1",
        "k2",
        "k3",
        "clip",
        "guard",
        "dppo",
        "nft",
        "exact",
        "balanced",
        "staged",
        "alternating",
        "weights",
        "plateau",
        "curve",
        "mean",
        "leave-one-out",
        "group",
        "batch",
        "none",
        "trace",
        "tree",
        "sum-then-normalise",
        "normalise-then-sum",
        "require-all",
        "at-least",
        "drop-tree",
        "keep",
        "mask",
        "penalty",
    ] {
        assert!(named(value), "`{value}` is not explained");
    }
}
