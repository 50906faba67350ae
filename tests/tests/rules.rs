//! RULES 1 to 4 of ARCHITECTURE.md, read off `cargo metadata` and the sources.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Normal (not dev, not build) dependencies, by package name, of every package in the lock file.
struct Graph {
    edges: BTreeMap<String, BTreeSet<String>>,
    folders: BTreeMap<String, PathBuf>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf()
}

/// What this was built for: crates of other platforms need not be there.
fn host() -> String {
    let rustc = Command::new("rustc").arg("-vV").output().expect("rustc runs");
    let said = String::from_utf8_lossy(&rustc.stdout).into_owned();
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    host.expect("rustc names its host").to_owned()
}

fn graph() -> Graph {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--locked"])
        .args(["--filter-platform", &host()])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: Value = serde_json::from_slice(&out.stdout).expect("cargo prints JSON");
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let names: BTreeMap<String, String> = list(&metadata["packages"])
        .iter()
        .map(|package| (text(&package["id"]), text(&package["name"])))
        .collect();
    let folders = list(&metadata["packages"])
        .iter()
        .filter(|package| package["source"].is_null())
        .map(|package| {
            let manifest = PathBuf::from(text(&package["manifest_path"]));
            (text(&package["name"]), manifest.parent().expect("a folder").to_path_buf())
        })
        .collect();
    let edges = list(&metadata["resolve"]["nodes"])
        .iter()
        .map(|node| {
            let needs = list(&node["deps"])
                .iter()
                .filter(|dep| list(&dep["dep_kinds"]).iter().any(|kind| kind["kind"].is_null()))
                .map(|dep| names[&text(&dep["pkg"])].clone())
                .collect();
            (names[&text(&node["id"])].clone(), needs)
        })
        .collect();
    Graph { edges, folders }
}

impl Graph {
    /// Everything `package` needs, directly or not.
    fn closure(&self, package: &str) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        let mut todo = vec![package.to_owned()];
        while let Some(name) = todo.pop() {
            for next in self.edges.get(&name).into_iter().flatten() {
                if seen.insert(next.clone()) {
                    todo.push(next.clone());
                }
            }
        }
        seen
    }

    fn assert_without(&self, package: &str, forbidden: &[&str]) {
        let needs = self.closure(package);
        for name in forbidden {
            assert!(!needs.contains(*name), "{package} depends on {name}");
        }
    }
}

const BINARIES: [&str; 5] =
    ["duet-coordinator", "duet-rollout-worker", "duet-reward-worker", "duet-trainer", "duet-cli"];

#[test]
fn rule_1_core_and_sim_are_pure() {
    let graph = graph();
    for package in ["duet-core", "duet-sim"] {
        graph.assert_without(package, &["tokio", "tonic", "tch", "object_store"]);
    }
}

#[test]
fn rule_2_control_never_links_libtorch_and_models_never_know_the_network() {
    let graph = graph();
    for package in ["duet-coordinator", "duet-cli"] {
        graph.assert_without(package, &["tch", "torch-sys", "duet-torch", "duet-models"]);
    }
    for package in ["duet-torch", "duet-models", "duet-miniworld"] {
        graph.assert_without(package, &["tonic", "tokio", "object_store", "duet-proto"]);
    }
}

#[test]
fn rule_3_arrows_point_down() {
    let layer = |name: &str| match name {
        "duet-core" => 0,
        "duet-proto" | "duet-config" | "duet-store" | "duet-torch" => 1,
        "duet-service" | "duet-models" => 2,
        "duet-miniworld" | "duet-sim" => 3,
        _ => 4,
    };
    let graph = graph();
    for (package, needs) in graph.edges.iter().filter(|(name, _)| name.starts_with("duet-")) {
        for need in needs.iter().filter(|name| name.starts_with("duet-")) {
            assert!(layer(need) < layer(package), "{package} depends on {need}: not downwards");
            assert!(!BINARIES.contains(&need.as_str()), "{package} depends on the binary {need}");
        }
    }
}

#[test]
fn rule_4_unsafe_code_and_cpp_live_in_the_torch_crate() {
    let graph = graph();
    for (package, folder) in graph.folders.iter().filter(|(name, _)| *name != "duet-torch") {
        for file in sources(folder) {
            let name = file.display();
            let ending = file.extension().and_then(|e| e.to_str()).unwrap_or_default();
            assert!(!matches!(ending, "c" | "cc" | "cpp" | "h" | "hpp"), "{package}: {name}");
        }
        for top in ["src/lib.rs", "src/main.rs"] {
            let Ok(text) = std::fs::read_to_string(folder.join(top)) else { continue };
            assert!(text.contains("#![forbid(unsafe_code)]"), "{package}: {top} allows unsafe");
        }
    }
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder.join("src")) else { return Vec::new() };
    let mut found = Vec::new();
    let mut todo: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    while let Some(path) = todo.pop() {
        match std::fs::read_dir(&path) {
            Ok(entries) => todo.extend(entries.flatten().map(|entry| entry.path())),
            Err(_) => found.push(path),
        }
    }
    found
}
