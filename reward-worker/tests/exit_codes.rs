//! The process as a shell sees it: exit codes and what it says.

use std::process::{Command, Output};

fn run(arguments: &[&str]) -> (i32, String) {
    let Output { status, stderr, .. } = Command::new(env!("CARGO_BIN_EXE_duet-reward-worker"))
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
    let config = path("run.toml");
    std::fs::write(&config, "[reward]\nscorers = [\"miniwold\"]\n").unwrap();
    let worker = |config: &str| {
        run(&["run", "--config", config, "--coordinator", "http://127.0.0.1:1", "--id", "w"])
    };
    let cases = [
        (run(&[]), 64, "Usage"),
        (run(&["run"]), 64, "--config"),
        (worker(&path("missing.toml")), 74, "missing.toml"),
        (worker(&config), 78, "reward.scorers"),
    ];
    for ((code, said), expected, part) in cases {
        assert_eq!(code, expected, "{said}");
        assert!(said.contains(part), "`{part}` is not in: {said}");
    }
}
