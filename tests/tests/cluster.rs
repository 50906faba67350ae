//! Whole runs of real processes in the small world: the same weights whatever happens on the way.

use duet_tests::fleet::{Fleet, WORKERS};
use duet_tests::{Run, bin, text, wait_until};
use std::process::Command;
use std::sync::OnceLock;

/// Weights after an undisturbed run with two rollout workers.
fn undisturbed() -> &'static (u64, String) {
    static DIGEST: OnceLock<(u64, String)> = OnceLock::new();
    DIGEST.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let run = Run::new(folder.path(), &[]);
        let out = run.finish(false);
        assert!(out.status.success(), "{}", text(&out));
        for table in ["prompts", "traces", "leaves", "rewards", "advantages", "updates"] {
            assert!(run.store.join("lineage").join(table).is_dir(), "no lineage table {table}");
        }
        run.digest()
    })
}

#[test]
fn one_rollout_worker_makes_the_same_weights_as_two() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), &["workers.rollout=1"]);
    let out = run.finish(false);
    assert!(out.status.success(), "{}", text(&out));
    assert_eq!(&run.digest(), undisturbed());
}

#[test]
fn a_killed_run_resumes_to_the_same_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), &[]);
    let mut child = run.start();
    run.wait_for_iterations(&mut child, 2);
    child.kill().expect("SIGKILL");
    child.wait().expect("its end");
    let out = run.finish(true);
    assert!(out.status.success(), "{}", text(&out));
    assert_eq!(&run.digest(), undisturbed());
}

#[test]
fn a_run_is_not_overwritten_by_another() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), &["run.iterations=1"]);
    assert!(run.finish(false).status.success());
    let before = run.digest();
    let again = run.finish(false);
    assert!(!again.status.success());
    assert!(text(&again).contains("--resume"), "{}", text(&again));
    assert_eq!(run.digest(), before);
}

/// Every connection over mutual TLS, with certificates of a private authority.
#[test]
fn a_run_over_tls_makes_the_same_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let tls = folder.path().join("tls");
    let made = Command::new(bin("duet")).arg("certs").arg("--out").arg(&tls).output();
    let made = made.expect("duet starts");
    assert!(made.status.success(), "{}", text(&made));
    let tls = tls.display();
    let set = [
        format!("security.ca=\"{tls}/ca.crt\""),
        format!("security.certificate=\"{tls}/{{role}}.crt\""),
        format!("security.key=\"{tls}/{{role}}.key\""),
        "workers.rollout=1".to_owned(),
    ];
    let set: Vec<&str> = set.iter().map(String::as_str).collect();
    let run = Run::new(folder.path(), &set);
    let out = run.finish(false);
    assert!(out.status.success(), "{}", text(&out));
    let address = std::fs::read_to_string(run.store.join("coordinator.addr"));
    assert!(address.expect("an address").starts_with("https://127.0.0.1:"));
    assert_eq!(&run.digest(), undisturbed());
}

/// Ranks that share out optimiser state and gradients end in the weights of ranks that hold all.
#[test]
fn ranks_that_share_out_their_state_make_the_same_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), &["trainer.zero=2", "trainer.bucket_mib=1"]);
    let out = run.finish(false);
    assert!(out.status.success(), "{}", text(&out));
    // Of two ranks a sum has but one order, whatever the buckets.
    assert_eq!(&run.digest(), undisturbed());
}

/// A run that has come past its first iteration, and its coordinator's address.
fn past_the_first_iteration(run: &Run) -> (Fleet<'_>, String) {
    let mut fleet = Fleet::new(run);
    let address = format!("http://{}", fleet.coordinator("127.0.0.1:0", false));
    WORKERS.iter().for_each(|name| fleet.worker(name, &address));
    let metrics = run.store.join("metrics.jsonl");
    wait_until("the first iteration", || {
        fleet.goes_on();
        std::fs::read_to_string(&metrics).is_ok_and(|text| !text.is_empty())
    });
    (fleet, address)
}

/// A rank is lost and nobody takes its place: the other one goes on alone, where the run allows it.
#[test]
fn a_run_goes_on_with_fewer_ranks_where_it_may() {
    let folder = tempfile::tempdir().expect("a folder");
    let set = ["trainer.min_world_size=1", "coordinator.heartbeat_timeout_ms=3000"];
    let run = Run::new(folder.path(), &set);
    let (mut fleet, _) = past_the_first_iteration(&run);
    fleet.kill("trainer-1");
    let status = fleet.ended();
    assert!(status.success(), "{}", fleet.log("coordinator"));
    assert_eq!(run.digest().0, undisturbed().0, "all iterations were taken");
    let audit = run.program("duet").arg("audit").arg(&run.store).output().expect("duet starts");
    assert!(audit.status.success(), "{}", text(&audit));
}

/// A rank is lost between two steps, and a process that knows nothing takes its place: it has the state
/// from the other one, no checkpoint is read and no step repeated.
#[test]
fn a_new_rank_takes_the_state_from_the_one_that_is_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), &[]);
    let (mut fleet, address) = past_the_first_iteration(&run);
    let duet = |command: &str| {
        let out = run.program("duet").args([command, &address]).output().expect("duet starts");
        assert!(out.status.success(), "{}", text(&out));
    };
    duet("pause");
    wait_until("a step's end", || {
        let out = run.program("duet").args(["status", &address, "--json"]).output();
        let status: serde_json::Value =
            serde_json::from_slice(&out.expect("duet starts").stdout).expect("JSON");
        let waits = |worker: &serde_json::Value| {
            worker["role"] != "trainer"
                || worker["lease"].as_str().is_some_and(|at| at.ends_with("waiting for trees"))
        };
        let all = status["workers"].as_array().is_some_and(|all| all.iter().all(waits));
        // Both rollout workers hold what came of the last step.
        let weights = &status["publication"];
        let held = weights["workers"] == 2 && weights["version"] == status["version"];
        status["state"] == "paused" && all && held
    });
    fleet.kill("trainer-1");
    fleet.worker("trainer-2", &address);
    duet("resume");
    let status = fleet.ended();
    assert!(status.success(), "{}", fleet.log("coordinator"));
    assert_eq!(&run.digest(), undisturbed());
    let said = fleet.log("trainer-2");
    assert!(said.contains("state taken from a rank") && !said.contains("restored"), "{said}");
    assert!(fleet.log("trainer-0").contains("state kept"), "{}", fleet.log("trainer-0"));
}

/// A step computed again from tables and artifacts: the same bits, and other bits where an artifact
/// is no longer what it was.
#[test]
fn an_iteration_is_replayed_bit_for_bit() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), &["run.iterations=3", "checkpoint.keep_rollouts=true"]);
    let out = run.finish(false);
    assert!(out.status.success(), "{}", text(&out));
    let replay = |iteration: &str| {
        let mut command = run.program("duet");
        command.args(["replay", "--json", "--iteration", iteration]).arg(&run.store);
        command.output().expect("duet starts")
    };
    let out = replay("2");
    assert!(out.status.success(), "{}", text(&out));
    let account: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!((&account["same"], &account["world"]), (&true.into(), &2.into()), "{account}");
    for branch in ["llm", "dit"] {
        let norm = &account["metrics"][format!("{branch}/grad_norm")];
        assert!(norm["stored"].is_f64() && norm["stored"] == norm["replayed"], "{norm}");
    }
    let out = replay("7");
    assert!(text(&out).contains("those of 0 to 2"), "{}", text(&out));

    let trees = run.store.join("artifacts/i000001");
    let mut images: Vec<_> = files(&trees);
    images.retain(|path| path.file_name().is_some_and(|n| n.to_string_lossy().contains("render")));
    for path in &images {
        let mut bytes = std::fs::read(path).expect("an artifact");
        let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        // The lowest bits of some numbers, wherever the latents lie.
        bytes[8 + header..].iter_mut().step_by(4).take(2000).for_each(|byte| *byte ^= 1);
        std::fs::write(path, bytes).expect("a change");
    }
    let out = replay("1");
    assert_eq!(out.status.code(), Some(1), "{}", text(&out));
    assert!(text(&out).contains("\"same\": false"), "{}", text(&out));

    std::fs::remove_dir_all(&trees).expect("artifacts");
    let out = replay("1");
    assert!(
        !out.status.success() && text(&out).contains("checkpoint.keep_rollouts"),
        "{}",
        text(&out)
    );
}

fn files(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder").flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}
