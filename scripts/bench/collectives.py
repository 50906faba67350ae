#!/usr/bin/env python3
"""All-reduce of 64 MiB over two processes of this machine, beside PyTorch's own Gloo in the same run.

    collectives.py ALLREDUCE OVERLAP [ROUNDS]     examples of crates/torch and of the trainer, release builds

Both pairs live all the time and are timed in turn, one all-reduce after the other, three to a round; the
figure is the median of rounds. Then OVERLAP times a step with and without its sums overlapped. Written to
target/bench/results.json; a ratio is ours over the peer's.
"""

import json
import socket
import statistics
import subprocess
import sys
import time

import results

MIB = 64
WORLD = 2
REPEATS = 3


def peer(rank, port):
    """One rank of PyTorch's, told and timed as ours."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    tensor = torch.ones(MIB << 18)
    print("ready", flush=True)
    for _ in sys.stdin:
        tensor.fill_(1.0)
        dist.barrier()
        began = time.perf_counter()
        for _ in range(REPEATS):
            dist.all_reduce(tensor)
        took = (time.perf_counter() - began) / REPEATS
        assert tensor.min() == tensor.max() == WORLD**REPEATS
        print(took, flush=True)


class Pair:
    """Two processes that sum when they are told."""

    def __init__(self, commands):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.ranks = []
        for command in commands:
            # A later rank may need what the first one said.
            command = command(self.ranks) if callable(command) else command
            self.ranks.append(subprocess.Popen(command, **pipes))

    def line(self, rank):
        text = self.ranks[rank].stdout.readline()
        if not text:
            raise SystemExit(f"{self.ranks[rank].args} ended")
        return text.strip()

    def round(self):
        """Seconds of one all-reduce: those of the slower rank."""
        for rank in self.ranks:
            rank.stdin.write("go\n")
            rank.stdin.flush()
        return max(float(self.line(rank)) for rank in range(len(self.ranks)))

    def end(self):
        for rank in self.ranks:
            rank.stdin.close()
            rank.wait(timeout=60)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def main():
    ours, overlap = sys.argv[1:3]
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 25
    first = [ours, "0", str(WORLD), str(MIB)]
    second = lambda ranks: [ours, "1", str(WORLD), str(MIB), ranks[0].stdout.readline().strip()]
    duet = Pair([first, second])
    port = free_port()
    torch = Pair([[sys.executable, __file__, "--peer", str(rank), port] for rank in range(WORLD)])
    pairs = {"duet": duet, "torch": torch}
    for pair in pairs.values():
        for rank in range(WORLD):
            assert pair.line(rank) == "ready"
    seconds = {name: [] for name in pairs}
    for number in range(rounds + 2):
        # Turn and turn about, so that neither always follows the other; two rounds to warm up.
        for name in sorted(pairs, reverse=number % 2 == 1):
            took = pairs[name].round()
            if number >= 2:
                seconds[name].append(took)
    for pair in pairs.values():
        pair.end()
    mine, theirs = (statistics.median(seconds[name]) for name in ("duet", "torch"))
    ratio = mine / theirs
    name = f"all-reduce of {MIB} MiB, {WORLD} ranks"
    print(f"{name}: {mine * 1e3:.1f} ms, PyTorch's Gloo {theirs * 1e3:.1f} ms, ratio {ratio:.2f}")
    rows = [results.row(name, mine, theirs, ratio, "s", "<= 1.1")]
    took = json.loads(subprocess.run([overlap], check=True, capture_output=True, text=True).stdout)
    ratio = took["with"] / took["without"]
    name = f"step of {took['ranks']} ranks, {took['mib']} MiB of gradients, overlap against none"
    print(f"{name}: {took['with'] * 1e3:.1f} ms, {took['without'] * 1e3:.1f} ms, ratio {ratio:.2f}")
    rows.append(results.row(name, took["with"], took["without"], ratio, "s", ""))
    results.record(rows)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--peer":
        peer(int(sys.argv[2]), sys.argv[3])
    else:
        main()
