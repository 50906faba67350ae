"""Ray's side of `make bench-control`: actors that do nothing, kept busy by a refill loop.

As many trees are in flight as asked for; a tree is a call to think, J calls to render and, after each of these, a call to
score, as a user of Ray would write it: `ray.wait`, take what is ready, submit what follows to the actor of the right kind
that has the least to do. Two actors think and render, two score, each on a process of its own. Nothing is durable here,
nothing is published, and there are no optimiser steps or tables. Two ways of waiting are in use, one call at a time and all
that are ready; both are timed and the faster one counts. Prints JSON.

`control_ray.py loss`: from the SIGKILL of an actor in the middle of a call until another, idle actor does that call.
"""
import json
import os
import signal
import statistics
import sys
import time

import ray


@ray.remote(num_cpus=0)
class Worker:
    def work(self, stage, tree, trace):
        return tree

    def process(self):
        return os.getpid()

    def hold(self):
        time.sleep(60)

    def done(self):
        return time.time()


def start():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")


def loss(rounds=9):
    """The refill loop of a careful user: a call that fails with its actor is given to another one."""
    start()
    spans = []
    for _ in range(rounds):
        holder, heir = Worker.remote(), Worker.remote()
        process, _ = ray.get([holder.process.remote(), heir.process.remote()])
        call = holder.hold.remote()
        time.sleep(0.2)
        os.kill(process, signal.SIGKILL)
        killed = time.time()
        ray.wait([call])
        try:
            ray.get(call)
        except ray.exceptions.RayActorError:
            spans.append(1000 * (ray.get(heir.done.remote()) - killed))
    spans.sort()
    print(json.dumps({"ray": ray.__version__, "rounds": len(spans), "sigkill_to_work_elsewhere_ms": statistics.median(spans), "longest_ms": spans[-1]}))
    ray.shutdown()


THINK, RENDER, SCORE = range(3)


def one(pending):
    return ray.wait(pending, num_returns=1)[0]


def every(pending):
    return ray.wait(pending, num_returns=len(pending), timeout=0)[0] or one(pending)


def grow(trees, wide, traces, ready_of, pools):
    """Carries trees through their life: trees a second, and the processors' time of a call in microseconds."""
    used, began = cpu_seconds(), time.perf_counter()
    load = {worker: 0 for pool in pools for worker in pool}
    pending, left, started, done = {}, {}, 0, 0

    def submit(stage, tree, trace):
        worker = min(pools[stage == SCORE], key=load.__getitem__)
        load[worker] += 1
        pending[worker.work.remote(stage, tree, trace)] = (worker, stage, tree, trace)

    while done < trees:
        while started < trees and len(left) < wide:
            left[started] = traces
            submit(THINK, started, 0)
            started += 1
        ready = ready_of(list(pending))
        ray.get(ready)
        for reference in ready:
            worker, stage, tree, trace = pending.pop(reference)
            load[worker] -= 1
            if stage == THINK:
                for trace in range(traces):
                    submit(RENDER, tree, trace)
            elif stage == RENDER:
                submit(SCORE, tree, trace)
            else:
                left[tree] -= 1
                if not left[tree]:
                    del left[tree]
                    done += 1
    leases = trees * (1 + 2 * traces)
    return trees / (time.perf_counter() - began), 1e6 * (cpu_seconds() - used) / leases


def processes():
    """This process and all that came of it: Ray's own processes and the actors."""
    parents = {}
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(process)] = (int(fields[1]), (int(fields[11]) + int(fields[12])) / 100, int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))
    family = {os.getpid()}
    while grown := {process for process, (parent, _, _) in parents.items() if parent in family} - family:
        family |= grown
    return {process: parents[process] for process in family}


def cpu_seconds():
    return sum(seconds for _, seconds, _ in processes().values())


def resident_mb():
    """What runs besides the actors: the driver, and Ray's own processes."""
    return sum(resident for process, (parent, _, resident) in processes().items() if os.getpid() in (process, parent)) / 1e6


def main(trees, wide, traces):
    began = time.perf_counter()
    start()
    pools = [[Worker.remote() for _ in range(2)] for _ in range(2)]
    ray.get(pools[0][0].work.remote(THINK, -1, 0))
    cold = time.perf_counter() - began
    ray.get([worker.work.remote(THINK, -1, 0) for pool in pools for worker in pool])
    rates = {ready_of.__name__: grow(trees, wide, traces, ready_of, pools) for ready_of in (one, every)}
    best, cpu = max(rates.values())
    print(json.dumps({
        "ray": ray.__version__, "trees": trees, "in_flight": wide, "traces": traces, "trees_per_second": best, "by_way_of_waiting": rates,
        "leases_per_second": (1 + 2 * traces) * best, "cpu_us_per_lease": cpu, "cold_start_to_first_lease_ms": round(1000 * cold), "resident_mb": resident_mb(),
    }))
    ray.shutdown()


if __name__ == "__main__":
    if sys.argv[1] == "loss":
        loss()
    else:
        main(*map(int, sys.argv[1:]))
