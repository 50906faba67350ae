//! One decoder, named by the environment, under libFuzzer.
#![no_main]

use std::sync::LazyLock;

/// Names the target.
const VARIABLE: &str = "DUET_FUZZ_TARGET";

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var(VARIABLE).unwrap_or_default();
    duet_fuzz::target(&name).map_or_else(
        || {
            let names: Vec<&str> = duet_fuzz::TARGETS.iter().map(|target| target.name).collect();
            eprintln!("{VARIABLE} is `{name}`; choose one of {}", names.join(", "));
            std::process::exit(64)
        },
        |target| target.run,
    )
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(data));
