//! Killed at every tenth step, the job ends with the weights of the one that was left alone, bit for bit.
//!
//! Takes minutes, so it runs by `make continuation` and not with the other tests.

use duet_tests::{Run, text};

const STEPS: usize = 40;

#[test]
#[ignore = "minutes; run by `make continuation`"]
fn a_job_killed_at_every_tenth_step_ends_with_the_same_weights() {
    let set = [format!("run.iterations={STEPS}"), "checkpoint.every=3".to_owned()];
    let set: Vec<&str> = set.iter().map(String::as_str).collect();
    let folder = tempfile::tempdir().expect("a folder");
    let alone = Run::new(folder.path(), &set);
    let out = alone.finish(false);
    assert!(out.status.success(), "{}", text(&out));

    let folder = tempfile::tempdir().expect("a folder");
    let killed = Run::new(folder.path(), &set);
    for step in (10..STEPS).step_by(10) {
        let mut child = killed.begin(step > 10);
        killed.wait_for_iterations(&mut child, step);
        // SIGKILL of the launcher, which takes every process of the job along.
        child.kill().expect("SIGKILL");
        child.wait().expect("its end");
        let newest = killed.newest_checkpoint();
        println!("killed at step {step}; newest complete checkpoint: {newest:?}");
    }
    let out = killed.finish(true);
    assert!(out.status.success(), "{}", text(&out));
    assert_eq!(killed.digest(), alone.digest());
    println!("{STEPS} steps, killed at every tenth: {}", killed.digest().1);
}
