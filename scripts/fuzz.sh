#!/usr/bin/env bash
# Searches decoders for inputs that break them, guided by coverage (libFuzzer, on stable Rust).
#   scripts/fuzz.sh SECONDS [TARGET...]      all targets unless some are named
# What breaks one is left in tests/fuzz/corpus/TARGET/, where `cargo test -p duet-fuzz` plays it.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:?seconds for each target}
shift
out=${CARGO_TARGET_DIR:-target}/fuzz
host=$(rustc -vV | sed -n 's/^host: //p')

# Coverage only: address sanitizing wants a nightly compiler, and unsafe code lives in one crate.
# A target for the compiler keeps the flags from build scripts and procedural macros.
flags="-Cpasses=sancov-module --cfg fuzzing"
for flag in level=4 inline-8bit-counters pc-table trace-compares; do
  flags+=" -Cllvm-args=-sanitizer-coverage-$flag"
done
RUSTFLAGS=$flags cargo build --quiet --release --locked --target "$host" --target-dir "$out" \
  --manifest-path tests/fuzz/libfuzzer/Cargo.toml
mapfile -t known < <(cargo run --quiet -p duet-fuzz --example seeds "$out/corpus")
if [ $# -eq 0 ]; then set -- "${known[@]}"; fi

export LD_LIBRARY_PATH=${LIBTORCH:-$PWD/.libtorch}/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

broken=()
for target in "$@"; do
  mkdir -p "tests/fuzz/corpus/$target" "$out/corpus/$target"
  log=$out/$target.log
  status=0
  DUET_FUZZ_TARGET=$target "$out/$host/release/duet-libfuzzer" "$out/corpus/$target" \
    -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=65536 -use_value_profile=1 \
    -artifact_prefix="tests/fuzz/corpus/$target/" -print_final_stats=1 >"$log" 2>&1 || status=$?
  runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  cover=$(grep -oE 'cov: [0-9]+' "$log" | tail -1 || true)
  rmdir --ignore-fail-on-non-empty "tests/fuzz/corpus/$target"
  if [ "$status" -eq 0 ]; then
    printf '%-12s %12s inputs in %ss, %s edges: nothing breaks it\n' "$target" "$runs" "$seconds" "${cover#cov: }"
  else
    printf '%-12s BROKEN, see %s\n' "$target" "$log"
    broken+=("$target")
  fi
done
[ ${#broken[@]} -eq 0 ]
