"""Checkpoints beside torch.distributed.checkpoint, interleaved in the same run: `make bench-checkpoint`.

Two ranks hold the same state of 1 GiB (64 tensors of fp32). Each round saves it with one side and then
with the other, and loads it the same way; medians and their ratio are printed. Ours writes with fsync,
hashes every byte, and verifies every byte when it loads. The other side is DCP with its defaults.
The disk's own bandwidth is measured in the same rounds: a plain write of 1 GiB with fsync.
Written to target/bench/results.json; a ratio is ours over the peer's.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import results

TENSORS = 64


class Line:
    """A process that is told a line and answers a line."""

    def __init__(self, command, **options):
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, **options)
        assert self.hear() == "ready"

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self):
        line = self.process.stdout.readline().strip()
        if not line:
            sys.exit(f"{self.process.args[:3]} has ended")
        return line

    def ask(self, line):
        self.tell(line)
        return self.hear().split()


def peer(rank, world, port, mib):
    """One rank of the other side."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    each = mib * (1 << 18) // TENSORS
    torch.manual_seed(0)
    state = {f"t{n:03}": torch.rand(each) for n in range(TENSORS)}
    print("ready", flush=True)
    for line in sys.stdin:
        what, folder = line.split()
        if what == "save":
            dcp.save(state, checkpoint_id=folder)
        else:
            dcp.load(state, checkpoint_id=folder)
        print("done", flush=True)


def disk(folder, mib):
    """Seconds of a plain write of so many MiB with fsync."""
    block = os.urandom(1 << 22)
    begun = time.perf_counter()
    with open(folder / "plain", "wb", buffering=0) as file:
        for _ in range(mib // 4):
            file.write(block)
        os.fsync(file.fileno())
    took = time.perf_counter() - begun
    (folder / "plain").unlink()
    return took


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    args = parser.parse_args()
    base = pathlib.Path(tempfile.mkdtemp(prefix="duet-bench-", dir=args.folder))
    try:
        run(args, base)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def run(args, base):
    store = base / "store"
    ours = Line([args.binary, "serve", str(store), str(args.mib), "2", "4"])
    port = 20000 + os.getpid() % 20000
    command = [sys.executable, __file__, "--peer"]
    starts = [subprocess.Popen(command + [str(rank), "2", str(port), str(args.mib)], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE) for rank in (0, 1)]

    def both(line):
        begun = time.perf_counter()
        for process in starts:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        for process in starts:
            if not process.stdout.readline():
                sys.exit("a rank of the other side has ended")
        return time.perf_counter() - begun

    for process in starts:
        assert process.stdout.readline().strip() == "ready"
    times = {name: [] for name in ["save", "blocked", "load", "publish", "dcp save", "dcp load",
                                   "disk"]}
    for number in range(args.rounds + 1):
        other = base / f"dcp-{number}"
        _, save, blocked = ours.ask(f"save {number + 1}")
        dcp_save = both(f"save {other}")
        plain = disk(base, args.mib)
        _, load = ours.ask(f"load {number + 1}")
        dcp_load = both(f"load {other}")
        _, publish = ours.ask(f"publish {number + 1}")
        shutil.rmtree(other)
        shutil.rmtree(store / "checkpoints")
        if number > 0:  # The first round warms both sides up.
            for name, value in zip(times, [save, blocked, load, publish, dcp_save, dcp_load, plain]):
                times[name].append(float(value))
    middle = {name: statistics.median(values) for name, values in times.items()}
    rows = [("checkpoint-save", "save", "dcp save", 1.0), ("checkpoint-blocked", "blocked", "dcp save", 0.3),
            ("checkpoint-load", "load", "dcp load", 1.2)]
    found = []
    for name, own, theirs, wanted in rows:
        ratio = middle[own] / middle[theirs]
        print(f"{name}: {middle[own]:.3f} s, torch.distributed.checkpoint {middle[theirs]:.3f} s: "
              f"{ratio:.2f}x (wanted: at most {wanted}x)")
        found.append(results.row(name, middle[own], middle[theirs], ratio, "s", f"<= {wanted}"))
    print(f"publish-64mib-4-workers: {middle['publish']:.3f} s (wanted: below 1 s)")
    found.append(results.row("publish-64mib-4-workers", middle["publish"], None, None, "s", "< 1"))
    print(f"plain write of {args.mib} MiB with fsync: {middle['disk']:.3f} s; load average "
          f"{os.getloadavg()[0]:.1f}")
    results.record(found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(*map(int, sys.argv[2:]))
    else:
        main()
