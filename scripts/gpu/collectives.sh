#!/usr/bin/env bash
# NCCL on a machine with a GPU: loads it, forms a group of one (two ranks cannot share a GPU), checks every
# operation against the sums expected, with tensors of the GPU and of the host, and prints the bandwidth.
# Then the tests of the trainer's ranks, which stay on Gloo, beside a CUDA build of libtorch.
#
#     scripts/gpu/collectives.sh [MIB]
#
# Needs `make setup` with PyTorch 2.11 for CUDA installed, which brings NCCL. Says `as expected` at its end.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo build --release -p duet-torch --example allreduce
"${CARGO_TARGET_DIR:-target}/release/examples/allreduce" --nccl "${1:-256}"
cargo test -p duet-torch --test collective
