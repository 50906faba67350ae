//! `duet-sim`: attacks the scheduler with many seeds.
#![forbid(unsafe_code)]

use clap::Parser;
use duet_sim::{Options, Outcome, simulate};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

/// Attacks Duet's scheduler in a simulated cluster. Prints SEED=... for every seed that fails.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// How many seeds.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first seed; alone: this seed only, with what happened in it.
    #[arg(long)]
    seed: Option<u64>,
    /// Switch on each of the scheduler's seeded faults in turn, and show that it is found.
    #[arg(long)]
    mutations: bool,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.mutations {
        return mutations(&args);
    }
    if let (Some(seed), true) = (args.seed, args.seeds == 100) {
        return one(seed);
    }
    many(args.seed.unwrap_or(0), args.seeds, args.threads)
}

fn one(seed: u64) -> ExitCode {
    let options = Options::new(seed);
    println!("{options:#?}");
    let outcome = simulate(&options);
    println!("{outcome:#?}");
    verdict(seed, &outcome)
}

fn verdict(seed: u64, outcome: &Outcome) -> ExitCode {
    match &outcome.broken {
        Some(text) => {
            println!("SEED={seed} {text}");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}

fn many(first: u64, seeds: u64, threads: u64) -> ExitCode {
    let next = AtomicU64::new(first);
    let run = || {
        let mut outcomes = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + seeds {
                return outcomes;
            }
            outcomes.push((seed, simulate(&Options::new(seed))));
        }
    };
    let mut outcomes: Vec<(u64, Outcome)> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(run)).collect();
        handles.into_iter().flat_map(|handle| handle.join().unwrap_or_default()).collect()
    });
    outcomes.sort_by_key(|(seed, _)| *seed);
    let mut all = blake3::Hasher::new();
    let (mut events, mut handed_on) = (0, 0);
    let mut failures = BTreeMap::<&str, u64>::new();
    for (_, outcome) in &outcomes {
        all.update(outcome.trace.as_bytes());
        events += outcome.events;
        handed_on += outcome.handed_on;
        for (kind, count) in &outcome.failures {
            *failures.entry(kind).or_default() += count;
        }
    }
    let broken: Vec<_> = outcomes.iter().filter(|(_, outcome)| outcome.broken.is_some()).collect();
    for (seed, outcome) in &broken {
        verdict(*seed, outcome);
    }
    let trace = &all.finalize().to_hex()[..16];
    let (good, missing) = (outcomes.len() - broken.len(), seeds - outcomes.len() as u64);
    println!("failures met: {failures:?}");
    println!("{handed_on} trainer groups went on from what one of their ranks held");
    println!("{good} of {seeds} seeds held, {events} events, trace {trace}");
    if missing > 0 {
        println!("{missing} seeds ended in a panic");
    }
    if broken.is_empty() && missing == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(not(feature = "mutations"))]
fn mutations(_: &Args) -> ExitCode {
    println!("built without them; run: cargo run -p duet-sim --features mutations -- --mutations");
    ExitCode::FAILURE
}

#[cfg(feature = "mutations")]
fn mutations(args: &Args) -> ExitCode {
    use duet_core::mutation::{Mutation, choose};
    let mut missed = 0;
    for mutation in Mutation::ALL {
        let seeds = args.seed.unwrap_or(0)..args.seed.unwrap_or(0) + args.seeds;
        let found = seeds.into_iter().find_map(|seed| {
            choose(Some(mutation));
            let outcome = simulate(&Options::new(seed));
            choose(None);
            outcome.broken.map(|text| (seed, text))
        });
        match found {
            Some((seed, text)) => {
                let text: String = text.chars().take(110).collect();
                println!("{mutation:?}: found by seed {seed}: {text}");
            }
            None => {
                missed += 1;
                println!("{mutation:?}: NOT found in {} seeds", args.seeds);
            }
        }
    }
    println!("{} of {} mutations found", Mutation::ALL.len() - missed, Mutation::ALL.len());
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
