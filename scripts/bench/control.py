"""Runs `make bench-control`: Duet's control plane and Ray's in turn, and writes target/bench/control.json.

    control.py EXAMPLE CROWD [--rounds N] [--trees N] [--out FILE]

EXAMPLE and CROWD are the built examples `control` (duet-coordinator) and `crowd` (duet-sim); Ray runs in this Python. Each
figure has a name, ours, the peer's, their ratio, a unit and what is wanted. Rates are medians of rounds in which both sides
take turns; the first shape, of which something is wanted, has five times as many. The journal lies on the disk of $TMPDIR, then in memory (/dev/shm).
"""
import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
# What is wanted of the first of these; the others show what bounds it.
SHAPES = [
    # name, P, lag, J
    # The paper's batch: 32 prompts a step.
    ("8 in flight, steps of 32 trees", 32, 1, 1),
    ("8 in flight, steps of 8 trees", 8, 1, 1),
    ("8 in flight, steps of 8 trees, lag 0", 8, 0, 1),
    ("8 in flight, steps of 8 trees, 4 traces", 8, 1, 4),
]
# Times as many rounds of the shape of which something is wanted: a busy host moves single ones by a fifth.
JUDGED = 5
# Leases here, calls there.
IN_FLIGHT = 8
SHM = "/dev/shm"


def run(command, folder=None):
    environment = {**os.environ, **({"TMPDIR": folder} if folder else {})}
    out = subprocess.run(command, env=environment, capture_output=True, text=True)
    if out.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{out.stdout}{out.stderr}")
    lines = out.stdout.strip().splitlines()
    # Ray's own messages may come after what is asked for.
    return next((line for line in reversed(lines) if line.startswith("{")), lines[-1])


def ray(*arguments):
    return json.loads(run([sys.executable, HERE / "control_ray.py", *map(str, arguments)]))


class Figures:
    def __init__(self):
        self.all = []

    def add(self, name, ours, peer, ratio, unit, wanted, holds=None):
        self.all.append({"name": name, "ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "wanted": wanted, "holds": holds})
        number = lambda value: "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
        mark = {True: "holds", False: "FALLS SHORT", None: ""}[holds]
        print(f"{name:62} {number(ours):>8} {number(peer):>8} {number(ratio):>8} {unit:14} {wanted:18} {mark}", flush=True)


def median(rounds, key):
    return statistics.median(each[key] for each in rounds)


def rates(figures, arguments, place, folder):
    peak, cold, cold_ray, memory_ray = [], [], [], []
    for first, (name, wide, lag, traces) in zip([True] + [False] * len(SHAPES), SHAPES):
        trees = max(4 * wide, arguments.trees // (1 + 2 * traces) * 3 // wide * wide)
        ours, theirs = [], []
        for _ in range(arguments.rounds * (JUDGED if first else 1)):
            control = [arguments.example, "--trees", trees, "--wide", wide, "--lag", lag, "--traces", traces, "--in-flight", IN_FLIGHT, "--keep"]
            ours.append(json.loads(run(list(map(str, control)), folder)))
            theirs.append(ray(trees, IN_FLIGHT, traces))
        mine, peer = median(ours, "trees_per_second"), median(theirs, "trees_per_second")
        wanted, holds = ("ratio >= 5", mine / peer >= 5) if first else ("", None)
        figures.add(f"trees through their life, {name}, {place}", mine, peer, mine / peer, "trees/s", wanted, holds)
        cpu = [sum(each[f"{who}_cpu_us_per_lease"] for who in ("coordinator", "workers", "trainer")) for each in ours]
        mine, peer = statistics.median(cpu), median(theirs, "cpu_us_per_lease")
        figures.add("  processors' time of a lease, all processes", mine, peer, peer / mine, "us", "")
        figures.add("  of it the coordinator's", median(ours, "coordinator_cpu_us_per_lease"), None, None, "us", "")
        figures.add(f"  leases in flight, mean; at most {IN_FLIGHT}", median(ours, "leases_in_flight_mean"), None, None, "", "")
        figures.add("  journal segments of a lease", median(ours, "journal_segments_per_lease"), None, None, "", "")
        peak += [each["coordinator_peak_mb"] for each in ours]
        cold += [each["cold_start_to_first_lease_ms"] / 1000 for each in ours]
        cold_ray += [each["cold_start_to_first_lease_ms"] / 1000 for each in theirs]
        memory_ray += [each["resident_mb"] for each in theirs]
    floor = json.loads(run([arguments.example, "floor"], folder))
    figures.add(f"one append to the journal by itself, {place}", floor["append_ms"], None, None, "ms", "")
    figures.add("  its mean", floor["mean_ms"], None, None, "ms", "")
    return peak, cold, cold_ray, memory_ray


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("example")
    parser.add_argument("crowd")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trees", type=int, default=1600)
    parser.add_argument("--out", default="target/bench/control.json")
    arguments = parser.parse_args()
    figures = Figures()
    print(f"{'':62} {'Duet':>8} {'Ray':>8} {'ratio':>8} {'unit':14} {'wanted'}")
    # All files are deleted at the end: on some file systems new ones take longer after many were deleted.
    with tempfile.TemporaryDirectory() as folder:
        peak, cold, cold_ray, memory_ray = rates(figures, arguments, "journal on the disk", folder)
    if os.path.isdir(SHM):
        with tempfile.TemporaryDirectory(dir=SHM) as folder:
            rates(figures, arguments, "journal in memory", folder)
    ours, theirs = json.loads(run([arguments.example, "loss"])), ray("loss")
    mine, peer = ours["sigkill_to_work_elsewhere_ms"], theirs["sigkill_to_work_elsewhere_ms"]
    figures.add("SIGKILL of a worker to its work done elsewhere", mine, peer, peer / mine, "ms", "below Ray's", mine < peer)
    # The most that was seen, not the median: it is a limit.
    figures.add("resident memory, coordinator with 4 workers (Ray: head and driver)", max(peak), max(memory_ray), max(memory_ray) / max(peak), "MB", "< 60", max(peak) < 60)
    mine, peer = max(cold), statistics.median(cold_ray)
    figures.add("cold start to the first lease", mine, peer, peer / mine, "s", "< 1", mine < 1)
    text = run(["taskset", "-c", "0", arguments.crowd])
    found = re.search(r"poll p99 ([0-9.]+) us", text)
    mine = float(found[1]) / 1000
    figures.add("a poll, 10,000 workers and 100,000 trees in flight, one core, p99", mine, None, None, "ms", "< 20", mine < 20)
    out = pathlib.Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures.all, indent=1) + "\n")
    print(f"written to {out}")


main()
