//! Some scenarios of failure, each a test; `make chaos` plays all of them and prints a table.

use duet_tests::chaos::{play, scenarios};

fn holds(name: &str) {
    let scenario = scenarios().find(|s| s.name == name).expect("a scenario");
    let result = play(scenario, 1);
    assert!(result.passed(), "{name}: {}\n{:#}", result.note, result.audit);
}

macro_rules! scenarios {
    ($($test:ident: $name:literal),* $(,)?) => {$(
        #[test]
        fn $test() {
            holds($name);
        }
    )*};
}

scenarios! {
    a_killed_rollout_worker: "kill-rollout",
    two_workers_killed_at_once: "kill-two",
    a_killed_trainer_rank: "kill-rank-0",
    a_coordinator_killed_in_a_checkpoint: "kill-in-checkpoint",
    a_coordinator_that_comes_back_elsewhere: "coordinator-moves",
    a_torn_journal_record: "torn-record",
    tables_torn_by_a_loss_of_power: "torn-tables",
    a_coordinator_killed_after_a_stop: "stop-then-kill",
    a_rollout_worker_told_to_leave: "term-rollout",
}
