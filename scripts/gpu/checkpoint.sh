#!/usr/bin/env bash
# On a machine with one NVIDIA GPU: a small run whose trainer and sampler share it. Shows that shards are
# copied out of GPU memory while training goes on, that a LoRA adapter reaches a live sampler at every
# step, and that a job killed half-way ends with the same weights. Argument: the folder of the binaries
# (built on a machine with PyTorch 2.11 for CUDA: see docs/deploy.md).
set -euo pipefail
bin=$(realpath "${1:-target/debug}")
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
base=$folder/base
"$bin/duet-trainer" bootstrap --seed 1 --profile test --out "$base"

launch() { # NAME ITERATIONS [more]
  local name=$1 iterations=$2
  shift 2
  "$bin/duet" launch configs/test.toml --set "run.store=\"$folder/$name\"" \
    --set "run.iterations=$iterations" --set "model.path=\"$base\"" \
    --set "data.prompts=\"$base/miniworld/prompts-train.jsonl\"" \
    --set 'workers.device="cuda"' --set trainer.world_size=1 --set workers.rollout=1 \
    --set 'dit.train="lora"' --set 'llm.train="lora"' --set checkpoint.every=2 "$@"
}

digest() { # NAME
  python3 - "$folder/$1" <<'PYTHON'
import json, pathlib, sys
newest = max(pathlib.Path(sys.argv[1], "checkpoints").glob("step-*/manifest.json"))
manifest = json.loads(newest.read_text())["manifest"]
print(manifest["version"], manifest["weights"]["digest"])
PYTHON
}

launch whole 8 2>&1 | tee "$folder/whole.log"
grep -a "shard copied" "$folder/whole.log" || { echo "no shard was copied" >&2; exit 1; }
grep -a "policy held" "$folder/whole.log" || { echo "no adapter reached the sampler" >&2; exit 1; }

launch killed 8 > "$folder/killed.log" 2>&1 &
job=$!
until [ "$(grep -c . "$folder/killed/metrics.jsonl" 2>/dev/null)" -ge 5 ] 2>/dev/null; do
  kill -0 $job || { cat "$folder/killed.log"; exit 1; }
  sleep 0.2
done
kill -9 $job
wait $job || true
launch killed 8 --resume
[ "$(digest whole)" = "$(digest killed)" ] || { echo "the weights differ" >&2; exit 1; }
echo "same weights after SIGKILL: $(digest whole)"
"$bin/duet" checkpoints verify "$folder/whole"
