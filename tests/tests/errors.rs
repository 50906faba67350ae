//! Bad input: the error names the thing, the exit code is the documented one, nothing is lost.

use duet_tests::{Run, root, text};
use std::net::TcpListener;

/// Launches with overrides; the exit code and what was printed.
fn launch(set: &[&str]) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let out = Run::new(folder.path(), set).finish(false);
    (out.status.code(), text(&out))
}

fn prompts(content: &str) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("prompts.jsonl");
    std::fs::write(&path, content).expect("a file");
    launch(&[&format!("data.prompts=\"{}\"", path.display())])
}

#[test]
fn prompt_files_that_are_empty_broken_or_missing_are_named() {
    let (code, said) = prompts("");
    assert!(code != Some(0) && said.contains("prompts.jsonl"), "{code:?} {said}");
    let (code, said) = prompts("{\"text\": \"a\"}\nnot json\n");
    assert!(
        code != Some(0) && said.contains("prompts.jsonl") && said.contains('2'),
        "{code:?} {said}"
    );
    let (code, said) = launch(&["data.prompts=\"nowhere.jsonl\""]);
    assert!(code != Some(0) && said.contains("nowhere.jsonl"), "{code:?} {said}");
}

#[test]
fn a_missing_model_folder_is_named() {
    let (code, said) = launch(&["model.path=\"no/such/model\""]);
    assert!(code != Some(0) && said.contains("no/such/model"), "{code:?} {said}");
}

#[test]
fn a_busy_port_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    let (code, said) = launch(&[&format!("coordinator.listen=\"{address}\"")]);
    assert!(code != Some(0) && said.contains(&address), "{code:?} {said}");
}

#[test]
fn a_wrong_store_url_is_named() {
    let (code, said) = launch(&["run.store=\"ftp://example/run\""]);
    assert!(code != Some(0) && said.contains("ftp://example/run"), "{code:?} {said}");
}

#[test]
fn a_wrong_key_is_named_with_the_right_one() {
    let (code, said) = launch(&["rollout.trace=4"]);
    assert!(
        code == Some(78) && said.contains("trace") && said.contains("traces"),
        "{code:?} {said}"
    );
}

#[test]
fn workers_do_not_talk_in_plaintext_to_other_machines() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), &[]);
    let secret = "http://me:hunter2@192.0.2.1:7400";
    for (program, id, address, words) in [
        ("duet-rollout-worker", "rollout-0", "http://192.0.2.1:7400", "duet certs"),
        ("duet-reward-worker", "reward-0", "http://192.0.2.1:7400", "allow_plaintext"),
        ("duet-trainer", "trainer-0", "http://192.0.2.1:7400", "allow_plaintext"),
        ("duet-trainer", "trainer-0", secret, "not a coordinator's address"),
    ] {
        let mut command = run.program(program);
        command.args(["run", "--config"]).arg(root().join("configs/test.toml"));
        command.args(run.overrides()).args(["--id", id]);
        command.args(["--coordinator", address]);
        let out = command.output().expect("it starts");
        let said = text(&out);
        assert_eq!(out.status.code(), Some(64), "{said}");
        assert!(said.contains("192.0.2.1:7400") && !said.contains("model loaded"), "{said}");
        assert!(said.contains(words) && !said.contains("hunter2"), "{said}");
    }
    for (address, words) in [
        (secret, "not a coordinator's"),
        ("http://192.0.2.1:7400", "DUET__SECURITY__ALLOW_PLAINTEXT"),
    ] {
        let out = run.program("duet").args(["stop", address]).output();
        let said = text(&out.expect("duet starts"));
        assert!(said.contains(words) && !said.contains("hunter2"), "{said}");
    }
}
