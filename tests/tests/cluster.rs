//! Whole runs of real processes in the small world: the same weights whatever happens on the way.

use duet_tests::{Run, text};
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
