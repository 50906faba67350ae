//! The process as a shell sees it: exit codes and what it says.

use std::path::Path;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> (i32, String) {
    let Output { status, stderr, .. } = Command::new(env!("CARGO_BIN_EXE_duet-rollout-worker"))
        .args(arguments)
        .env("DUET_LOG", "error")
        .output()
        .unwrap();
    (status.code().unwrap(), String::from_utf8_lossy(&stderr).into_owned())
}

#[test]
fn failures_have_the_exit_code_of_their_kind_and_name_the_thing() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (empty, broken, config) = (path("empty.jsonl"), path("broken.jsonl"), path("run.toml"));
    std::fs::write(&empty, "").unwrap();
    std::fs::write(&broken, "{\"prompt\": \"a red seven\"}\n{\"prompt\": 7}\n").unwrap();
    std::fs::write(&config, "[rollout]\ntracs = 3\n").unwrap();
    let (nowhere, out) = (path("nowhere"), path("out"));
    let eval =
        |prompts: &str| run(&["eval", "--model", &nowhere, "--prompts", prompts, "--out", &out]);
    let worker = |config: &str| {
        run(&["run", "--config", config, "--coordinator", "http://127.0.0.1:1", "--id", "r"])
    };
    let cases = [
        (run(&[]), 64, "Usage"),
        (run(&["--help"]), 0, ""),
        (run(&["sample", "--model", &nowhere]), 64, "--prompt"),
        (run(&["sample", "--model", &nowhere, "--prompt", "x", "--out", &out]), 74, "nowhere"),
        (eval(&path("missing.jsonl")), 74, "missing.jsonl"),
        (eval(&empty), 78, "has no prompts"),
        (eval(&broken), 78, "broken.jsonl, line 2"),
        (worker(&path("missing.toml")), 74, "missing.toml"),
        (worker(&config), 78, "tracs"),
    ];
    for ((code, said), expected, part) in cases {
        assert_eq!(code, expected, "{said}");
        assert!(said.contains(part), "`{part}` is not in: {said}");
    }
    assert!(!Path::new(&out).exists(), "nothing is written when nothing was made");
}
