//! `duet-chaos [--seed N] [NAME...]`: plays scenarios of failure and prints a line for each. Exit code
//! 1 when one of them does not come out as the undisturbed run did.
#![forbid(unsafe_code)]

use duet_tests::chaos::{Result_, Scenario, play, scenarios};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut names: Vec<String> = std::env::args().skip(1).collect();
    let mut seed = 1;
    if let Some(at) = names.iter().position(|word| word == "--seed") {
        let words: Vec<String> = names.drain(at..(at + 2).min(names.len())).collect();
        match words.get(1).and_then(|word| word.parse().ok()) {
            Some(number) => seed = number,
            None => return usage("--seed needs a number"),
        }
    }
    let unknown = names.iter().find(|name| scenarios().all(|s| s.name != name.as_str()));
    if let Some(name) = unknown {
        let all: Vec<&str> = scenarios().map(|s| s.name).collect();
        return usage(&format!("no scenario is called `{name}`; there are {}", all.join(", ")));
    }
    println!(
        "{:<23} {:<7} {:<6} {:<8} {:>5} {:>5} {:>5} {:>6}  what happened",
        "scenario", "ended", "audit", "weights", "again", "twice", "coord", "s"
    );
    let wanted = |s: &&Scenario| names.is_empty() || names.iter().any(|name| name == s.name);
    let mut failed = 0;
    for scenario in scenarios().filter(wanted) {
        let line = match std::panic::catch_unwind(|| play(scenario, seed)) {
            Ok(result) => {
                failed += u32::from(!result.passed());
                line(&result)
            }
            Err(_) => {
                failed += 1;
                format!("{:<23} FAILED  (the reason is above)", scenario.name)
            }
        };
        println!("{line}");
    }
    if failed == 0 {
        println!("every run ended with the weights of the undisturbed one (seed {seed})");
        return ExitCode::SUCCESS;
    }
    println!("{failed} scenarios failed (seed {seed})");
    ExitCode::FAILURE
}

fn usage(text: &str) -> ExitCode {
    eprintln!("{text}");
    ExitCode::from(64)
}

fn line(result: &Result_) -> String {
    let (name, note) = (result.scenario.name, &result.note);
    if !result.played {
        return format!("{name:<23} skipped: {note}");
    }
    let count = |key: &str| result.audit[key].as_u64().unwrap_or(0);
    let again = count("failed") + count("lost") + count("handed_back");
    let audit = if result.clean { "clean" } else { "WRONG" };
    let weights = if result.equal { "equal" } else { "DIFFER" };
    let felt = if result.felt { "" } else { " (BUT NOT FELT)" };
    format!(
        "{name:<23} {:<7} {audit:<6} {weights:<8} {again:>5} {:>5} {:>5} {:>6.1}  {}, {note}{felt}",
        "yes",
        count("redone"),
        count("coordinators"),
        result.seconds,
        result.scenario.what,
    )
}
