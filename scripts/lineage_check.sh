#!/usr/bin/env bash
# A small run of real processes, and its tables read by DuckDB and pandas. Argument: the folder of the
# binaries.
set -euo pipefail
bin=$(realpath "$1")
cd "$(dirname "$0")/.."
test -d .venv-lineage || python3 -m venv .venv-lineage
.venv-lineage/bin/pip install --quiet --disable-pip-version-check duckdb pandas pyarrow
base=target/test-cache/duet/miniworld/test-seed1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$bin/duet-trainer" bootstrap --seed 1 --profile test --out "$base"
"$bin/duet" launch configs/test.toml --set "run.store=\"$folder/run\"" \
  --set "model.path=\"$base\"" --set "data.prompts=\"$base/miniworld/prompts-train.jsonl\""
.venv-lineage/bin/python scripts/lineage_check.py "$folder/run"
