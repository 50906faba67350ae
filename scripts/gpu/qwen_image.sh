#!/usr/bin/env bash
# On a machine with one NVIDIA GPU of 141 GB: Qwen-Image's transformer at its published size (20.4 B parameters,
# random weights, bf16) samples at 512 x 512 and takes LoRA steps, beside diffusers and PEFT on the same GPU in the
# same run: images per second, utilisation, memory. Arguments go to scripts/gpu/qwen_image.py, which explains them:
#
#     PYTHON=.venv/bin/python scripts/gpu/qwen_image.sh [--size 512] [--steps 50] [--leaves 1] [--peak-tflops 989]
#
# Needs `make setup` with PyTorch 2.11 for CUDA installed (see docs/deploy.md), and diffusers and peft as in
# scripts/parity/requirements.txt in the Python that $PYTHON names. Says `as expected` at its end.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo build --release --workspace --example qwen_image
"${PYTHON:-python3}" scripts/gpu/qwen_image.py "${CARGO_TARGET_DIR:-target}/release/examples/qwen_image" "$@"
