//! Two hundred seeds, and that a seed says everything.

use duet_sim::{Faults, Options, simulate};

#[test]
fn two_hundred_seeds_hold() {
    let mut handed_on = 0;
    for seed in 0..200 {
        let outcome = simulate(&Options::new(seed));
        assert_eq!(outcome.broken, None, "SEED={seed}");
        handed_on += outcome.handed_on;
    }
    assert!(handed_on > 20, "{handed_on} groups went on from what one of their ranks held");
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let mut traces = std::collections::BTreeSet::new();
    for seed in 1_000..1_020 {
        let first = simulate(&Options::new(seed));
        assert_eq!(first, simulate(&Options::new(seed)), "SEED={seed}");
        traces.insert(first.trace);
    }
    assert_eq!(traces.len(), 20, "different seeds give different traces");
}

/// A coordinator that dies at every twentieth output costs time, never work that was done: the
/// weights are those of the undisturbed run, and no tree is lost.
#[test]
fn du_11_a_coordinator_that_dies_all_the_time_changes_nothing() {
    for seed in 2_000..2_040 {
        let faults = Faults { coordinator_deaths: 50, ..Faults::default() };
        let options = Options { faults, faulty_for: 60_000, ..Options::new(seed) };
        let outcome = simulate(&options);
        assert_eq!(outcome.broken, None, "SEED={seed}");
        let calm = simulate(&options.undisturbed());
        assert_eq!(outcome.weights, calm.weights, "SEED={seed}");
        assert_eq!(outcome.failed_trees, calm.failed_trees, "SEED={seed}");
    }
}

/// A third of the scores fail: the run still ends, and the oracle, which works rewards out from
/// scored components alone, agrees with every step (DU-8).
#[test]
fn du_8_failing_scores_do_not_become_numbers() {
    for seed in 3_000..3_040 {
        let options = Options { failing_scores: 300, ..Options::new(seed) };
        assert_eq!(simulate(&options).broken, None, "SEED={seed}");
    }
}
