#!/bin/sh
# What `duet experiment paper --seeds 3` did, step by step.
# The binaries lie in target/debug.
set -e

# seed 1, base
duet-trainer bootstrap --without-sft --seed 1 --profile demo --out runs/paper/seed-1/base-model
duet-rollout-worker eval --model runs/paper/seed-1/base-model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/base/eval-0 --judge runs/paper/seed-1/base-model --seed 1000 --temperature 1.0 --images-per-prompt 2 --no-think
duet-rollout-worker eval --model runs/paper/seed-1/base-model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/base/eval-1 --judge runs/paper/seed-1/base-model --seed 1001 --temperature 1.0 --images-per-prompt 2 --no-think

# seed 1, zero-shot
duet-rollout-worker eval --model runs/paper/seed-1/base-model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/zero-shot/eval-0 --judge runs/paper/seed-1/base-model --seed 1000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-1/base-model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/zero-shot/eval-1 --judge runs/paper/seed-1/base-model --seed 1001 --temperature 1.0 --images-per-prompt 2

# seed 1, sft
duet sft configs/experiment-paper.toml --set 'run.name="sft"' --set 'run.seed=1' --set 'run.store="runs/paper/seed-1/sft"' --set 'model.path="runs/paper/seed-1/base-model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-1/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-1/base-model/miniworld/sft.jsonl"'
duet-rollout-worker eval --model runs/paper/seed-1/sft/sft/model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/sft/eval-0 --judge runs/paper/seed-1/base-model --seed 1000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-1/sft/sft/model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/sft/eval-1 --judge runs/paper/seed-1/base-model --seed 1001 --temperature 1.0 --images-per-prompt 2

# seed 1, grpo-without-sft
duet launch configs/experiment-paper.toml --set 'run.name="grpo-without-sft"' --set 'run.seed=1' --set 'run.store="runs/paper/seed-1/grpo-without-sft"' --set 'model.path="runs/paper/seed-1/base-model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-1/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-1/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="balanced"' --skip-sft
duet-rollout-worker export --model runs/paper/seed-1/base-model --out runs/paper/seed-1/grpo-without-sft/model --llm-weights runs/paper/seed-1/grpo-without-sft/weights/v00000032/llm-e1.safetensors --dit-weights runs/paper/seed-1/grpo-without-sft/weights/v00000032/dit-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-1/grpo-without-sft/model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/grpo-without-sft/eval-0 --judge runs/paper/seed-1/base-model --seed 1000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-1/grpo-without-sft/model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/grpo-without-sft/eval-1 --judge runs/paper/seed-1/base-model --seed 1001 --temperature 1.0 --images-per-prompt 2

# seed 1, staged
duet launch configs/experiment-paper.toml --set 'run.name="staged"' --set 'run.seed=1' --set 'run.store="runs/paper/seed-1/staged"' --set 'model.path="runs/paper/seed-1/sft/sft/model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-1/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-1/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="staged"' --set 'schedule.switch_at=16' --skip-sft
duet-rollout-worker export --model runs/paper/seed-1/sft/sft/model --out runs/paper/seed-1/staged/model --llm-weights runs/paper/seed-1/staged/weights/v00000032/llm-e1.safetensors --dit-weights runs/paper/seed-1/staged/weights/v00000032/dit-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-1/staged/model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/staged/eval-0 --judge runs/paper/seed-1/base-model --seed 1000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-1/staged/model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/staged/eval-1 --judge runs/paper/seed-1/base-model --seed 1001 --temperature 1.0 --images-per-prompt 2

# seed 1, balanced
duet launch configs/experiment-paper.toml --set 'run.name="balanced"' --set 'run.seed=1' --set 'run.store="runs/paper/seed-1/balanced"' --set 'model.path="runs/paper/seed-1/sft/sft/model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-1/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-1/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="balanced"' --skip-sft
duet-rollout-worker export --model runs/paper/seed-1/sft/sft/model --out runs/paper/seed-1/balanced/model --llm-weights runs/paper/seed-1/balanced/weights/v00000032/llm-e1.safetensors --dit-weights runs/paper/seed-1/balanced/weights/v00000032/dit-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-1/balanced/model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/balanced/eval-0 --judge runs/paper/seed-1/base-model --seed 1000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-1/balanced/model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/balanced/eval-1 --judge runs/paper/seed-1/base-model --seed 1001 --temperature 1.0 --images-per-prompt 2

# seed 1, llm-only
duet launch configs/experiment-paper.toml --set 'run.name="llm-only"' --set 'run.seed=1' --set 'run.store="runs/paper/seed-1/llm-only"' --set 'model.path="runs/paper/seed-1/sft/sft/model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-1/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-1/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="weights"' --set 'schedule.llm_weight=1.0' --set 'schedule.dit_weight=0.0' --skip-sft
duet-rollout-worker export --model runs/paper/seed-1/sft/sft/model --out runs/paper/seed-1/llm-only/model --llm-weights runs/paper/seed-1/llm-only/weights/v00000032/llm-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-1/llm-only/model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/llm-only/eval-0 --judge runs/paper/seed-1/base-model --seed 1000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-1/llm-only/model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/llm-only/eval-1 --judge runs/paper/seed-1/base-model --seed 1001 --temperature 1.0 --images-per-prompt 2

# seed 1, dit-only
duet launch configs/experiment-paper.toml --set 'run.name="dit-only"' --set 'run.seed=1' --set 'run.store="runs/paper/seed-1/dit-only"' --set 'model.path="runs/paper/seed-1/sft/sft/model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-1/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-1/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="weights"' --set 'schedule.llm_weight=0.0' --set 'schedule.dit_weight=1.0' --skip-sft
duet-rollout-worker export --model runs/paper/seed-1/sft/sft/model --out runs/paper/seed-1/dit-only/model --dit-weights runs/paper/seed-1/dit-only/weights/v00000032/dit-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-1/dit-only/model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/dit-only/eval-0 --judge runs/paper/seed-1/base-model --seed 1000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-1/dit-only/model --prompts runs/paper/seed-1/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-1/dit-only/eval-1 --judge runs/paper/seed-1/base-model --seed 1001 --temperature 1.0 --images-per-prompt 2

# seed 2, base
duet-trainer bootstrap --without-sft --seed 2 --profile demo --out runs/paper/seed-2/base-model
duet-rollout-worker eval --model runs/paper/seed-2/base-model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/base/eval-0 --judge runs/paper/seed-2/base-model --seed 2000 --temperature 1.0 --images-per-prompt 2 --no-think
duet-rollout-worker eval --model runs/paper/seed-2/base-model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/base/eval-1 --judge runs/paper/seed-2/base-model --seed 2001 --temperature 1.0 --images-per-prompt 2 --no-think

# seed 2, zero-shot
duet-rollout-worker eval --model runs/paper/seed-2/base-model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/zero-shot/eval-0 --judge runs/paper/seed-2/base-model --seed 2000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-2/base-model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/zero-shot/eval-1 --judge runs/paper/seed-2/base-model --seed 2001 --temperature 1.0 --images-per-prompt 2

# seed 2, sft
duet sft configs/experiment-paper.toml --set 'run.name="sft"' --set 'run.seed=2' --set 'run.store="runs/paper/seed-2/sft"' --set 'model.path="runs/paper/seed-2/base-model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-2/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-2/base-model/miniworld/sft.jsonl"'
duet-rollout-worker eval --model runs/paper/seed-2/sft/sft/model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/sft/eval-0 --judge runs/paper/seed-2/base-model --seed 2000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-2/sft/sft/model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/sft/eval-1 --judge runs/paper/seed-2/base-model --seed 2001 --temperature 1.0 --images-per-prompt 2

# seed 2, grpo-without-sft
duet launch configs/experiment-paper.toml --set 'run.name="grpo-without-sft"' --set 'run.seed=2' --set 'run.store="runs/paper/seed-2/grpo-without-sft"' --set 'model.path="runs/paper/seed-2/base-model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-2/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-2/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="balanced"' --skip-sft
duet-rollout-worker export --model runs/paper/seed-2/base-model --out runs/paper/seed-2/grpo-without-sft/model --llm-weights runs/paper/seed-2/grpo-without-sft/weights/v00000032/llm-e1.safetensors --dit-weights runs/paper/seed-2/grpo-without-sft/weights/v00000032/dit-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-2/grpo-without-sft/model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/grpo-without-sft/eval-0 --judge runs/paper/seed-2/base-model --seed 2000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-2/grpo-without-sft/model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/grpo-without-sft/eval-1 --judge runs/paper/seed-2/base-model --seed 2001 --temperature 1.0 --images-per-prompt 2

# seed 2, staged
duet launch configs/experiment-paper.toml --set 'run.name="staged"' --set 'run.seed=2' --set 'run.store="runs/paper/seed-2/staged"' --set 'model.path="runs/paper/seed-2/sft/sft/model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-2/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-2/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="staged"' --set 'schedule.switch_at=16' --skip-sft
duet-rollout-worker export --model runs/paper/seed-2/sft/sft/model --out runs/paper/seed-2/staged/model --llm-weights runs/paper/seed-2/staged/weights/v00000032/llm-e1.safetensors --dit-weights runs/paper/seed-2/staged/weights/v00000032/dit-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-2/staged/model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/staged/eval-0 --judge runs/paper/seed-2/base-model --seed 2000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-2/staged/model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/staged/eval-1 --judge runs/paper/seed-2/base-model --seed 2001 --temperature 1.0 --images-per-prompt 2

# seed 2, balanced
duet launch configs/experiment-paper.toml --set 'run.name="balanced"' --set 'run.seed=2' --set 'run.store="runs/paper/seed-2/balanced"' --set 'model.path="runs/paper/seed-2/sft/sft/model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-2/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-2/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="balanced"' --skip-sft
duet-rollout-worker export --model runs/paper/seed-2/sft/sft/model --out runs/paper/seed-2/balanced/model --llm-weights runs/paper/seed-2/balanced/weights/v00000032/llm-e1.safetensors --dit-weights runs/paper/seed-2/balanced/weights/v00000032/dit-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-2/balanced/model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/balanced/eval-0 --judge runs/paper/seed-2/base-model --seed 2000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-2/balanced/model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/balanced/eval-1 --judge runs/paper/seed-2/base-model --seed 2001 --temperature 1.0 --images-per-prompt 2

# seed 2, llm-only
duet launch configs/experiment-paper.toml --set 'run.name="llm-only"' --set 'run.seed=2' --set 'run.store="runs/paper/seed-2/llm-only"' --set 'model.path="runs/paper/seed-2/sft/sft/model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-2/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-2/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="weights"' --set 'schedule.llm_weight=1.0' --set 'schedule.dit_weight=0.0' --skip-sft
duet-rollout-worker export --model runs/paper/seed-2/sft/sft/model --out runs/paper/seed-2/llm-only/model --llm-weights runs/paper/seed-2/llm-only/weights/v00000032/llm-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-2/llm-only/model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/llm-only/eval-0 --judge runs/paper/seed-2/base-model --seed 2000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-2/llm-only/model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/llm-only/eval-1 --judge runs/paper/seed-2/base-model --seed 2001 --temperature 1.0 --images-per-prompt 2

# seed 2, dit-only
duet launch configs/experiment-paper.toml --set 'run.name="dit-only"' --set 'run.seed=2' --set 'run.store="runs/paper/seed-2/dit-only"' --set 'model.path="runs/paper/seed-2/sft/sft/model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-2/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-2/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="weights"' --set 'schedule.llm_weight=0.0' --set 'schedule.dit_weight=1.0' --skip-sft
duet-rollout-worker export --model runs/paper/seed-2/sft/sft/model --out runs/paper/seed-2/dit-only/model --dit-weights runs/paper/seed-2/dit-only/weights/v00000032/dit-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-2/dit-only/model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/dit-only/eval-0 --judge runs/paper/seed-2/base-model --seed 2000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-2/dit-only/model --prompts runs/paper/seed-2/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-2/dit-only/eval-1 --judge runs/paper/seed-2/base-model --seed 2001 --temperature 1.0 --images-per-prompt 2

# seed 3, base
duet-trainer bootstrap --without-sft --seed 3 --profile demo --out runs/paper/seed-3/base-model
duet-rollout-worker eval --model runs/paper/seed-3/base-model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/base/eval-0 --judge runs/paper/seed-3/base-model --seed 3000 --temperature 1.0 --images-per-prompt 2 --no-think
duet-rollout-worker eval --model runs/paper/seed-3/base-model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/base/eval-1 --judge runs/paper/seed-3/base-model --seed 3001 --temperature 1.0 --images-per-prompt 2 --no-think

# seed 3, zero-shot
duet-rollout-worker eval --model runs/paper/seed-3/base-model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/zero-shot/eval-0 --judge runs/paper/seed-3/base-model --seed 3000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-3/base-model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/zero-shot/eval-1 --judge runs/paper/seed-3/base-model --seed 3001 --temperature 1.0 --images-per-prompt 2

# seed 3, sft
duet sft configs/experiment-paper.toml --set 'run.name="sft"' --set 'run.seed=3' --set 'run.store="runs/paper/seed-3/sft"' --set 'model.path="runs/paper/seed-3/base-model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-3/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-3/base-model/miniworld/sft.jsonl"'
duet-rollout-worker eval --model runs/paper/seed-3/sft/sft/model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/sft/eval-0 --judge runs/paper/seed-3/base-model --seed 3000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-3/sft/sft/model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/sft/eval-1 --judge runs/paper/seed-3/base-model --seed 3001 --temperature 1.0 --images-per-prompt 2

# seed 3, grpo-without-sft
duet launch configs/experiment-paper.toml --set 'run.name="grpo-without-sft"' --set 'run.seed=3' --set 'run.store="runs/paper/seed-3/grpo-without-sft"' --set 'model.path="runs/paper/seed-3/base-model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-3/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-3/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="balanced"' --skip-sft
duet-rollout-worker export --model runs/paper/seed-3/base-model --out runs/paper/seed-3/grpo-without-sft/model --llm-weights runs/paper/seed-3/grpo-without-sft/weights/v00000032/llm-e1.safetensors --dit-weights runs/paper/seed-3/grpo-without-sft/weights/v00000032/dit-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-3/grpo-without-sft/model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/grpo-without-sft/eval-0 --judge runs/paper/seed-3/base-model --seed 3000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-3/grpo-without-sft/model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/grpo-without-sft/eval-1 --judge runs/paper/seed-3/base-model --seed 3001 --temperature 1.0 --images-per-prompt 2

# seed 3, staged
duet launch configs/experiment-paper.toml --set 'run.name="staged"' --set 'run.seed=3' --set 'run.store="runs/paper/seed-3/staged"' --set 'model.path="runs/paper/seed-3/sft/sft/model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-3/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-3/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="staged"' --set 'schedule.switch_at=16' --skip-sft
duet-rollout-worker export --model runs/paper/seed-3/sft/sft/model --out runs/paper/seed-3/staged/model --llm-weights runs/paper/seed-3/staged/weights/v00000032/llm-e1.safetensors --dit-weights runs/paper/seed-3/staged/weights/v00000032/dit-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-3/staged/model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/staged/eval-0 --judge runs/paper/seed-3/base-model --seed 3000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-3/staged/model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/staged/eval-1 --judge runs/paper/seed-3/base-model --seed 3001 --temperature 1.0 --images-per-prompt 2

# seed 3, balanced
duet launch configs/experiment-paper.toml --set 'run.name="balanced"' --set 'run.seed=3' --set 'run.store="runs/paper/seed-3/balanced"' --set 'model.path="runs/paper/seed-3/sft/sft/model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-3/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-3/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="balanced"' --skip-sft
duet-rollout-worker export --model runs/paper/seed-3/sft/sft/model --out runs/paper/seed-3/balanced/model --llm-weights runs/paper/seed-3/balanced/weights/v00000032/llm-e1.safetensors --dit-weights runs/paper/seed-3/balanced/weights/v00000032/dit-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-3/balanced/model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/balanced/eval-0 --judge runs/paper/seed-3/base-model --seed 3000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-3/balanced/model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/balanced/eval-1 --judge runs/paper/seed-3/base-model --seed 3001 --temperature 1.0 --images-per-prompt 2

# seed 3, llm-only
duet launch configs/experiment-paper.toml --set 'run.name="llm-only"' --set 'run.seed=3' --set 'run.store="runs/paper/seed-3/llm-only"' --set 'model.path="runs/paper/seed-3/sft/sft/model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-3/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-3/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="weights"' --set 'schedule.llm_weight=1.0' --set 'schedule.dit_weight=0.0' --skip-sft
duet-rollout-worker export --model runs/paper/seed-3/sft/sft/model --out runs/paper/seed-3/llm-only/model --llm-weights runs/paper/seed-3/llm-only/weights/v00000032/llm-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-3/llm-only/model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/llm-only/eval-0 --judge runs/paper/seed-3/base-model --seed 3000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-3/llm-only/model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/llm-only/eval-1 --judge runs/paper/seed-3/base-model --seed 3001 --temperature 1.0 --images-per-prompt 2

# seed 3, dit-only
duet launch configs/experiment-paper.toml --set 'run.name="dit-only"' --set 'run.seed=3' --set 'run.store="runs/paper/seed-3/dit-only"' --set 'model.path="runs/paper/seed-3/sft/sft/model"' --set 'model.bootstrap="demo"' --set 'data.prompts="runs/paper/seed-3/base-model/miniworld/prompts-train.jsonl"' --set 'sft.data="runs/paper/seed-3/base-model/miniworld/sft.jsonl"' --set 'schedule.kind="weights"' --set 'schedule.llm_weight=0.0' --set 'schedule.dit_weight=1.0' --skip-sft
duet-rollout-worker export --model runs/paper/seed-3/sft/sft/model --out runs/paper/seed-3/dit-only/model --dit-weights runs/paper/seed-3/dit-only/weights/v00000032/dit-e1.safetensors
duet-rollout-worker eval --model runs/paper/seed-3/dit-only/model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/dit-only/eval-0 --judge runs/paper/seed-3/base-model --seed 3000 --temperature 1.0 --images-per-prompt 2
duet-rollout-worker eval --model runs/paper/seed-3/dit-only/model --prompts runs/paper/seed-3/base-model/miniworld/prompts-test.jsonl --out runs/paper/seed-3/dit-only/eval-1 --judge runs/paper/seed-3/base-model --seed 3001 --temperature 1.0 --images-per-prompt 2
