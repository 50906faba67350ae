"""Ray's side of `make bench-control`: actors that do nothing, kept busy by a refill loop.

As many trees are in flight as asked for; a tree is three calls one after the other (think, render, score) to four
actors, each on a process of its own. Nothing is durable here. Prints JSON.

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
    def work(self, stage, tree):
        return tree

    def process(self):
        return os.getpid()

    def hold(self):
        time.sleep(60)

    def done(self):
        return time.time()


def loss(rounds=9):
    """The refill loop of a careful user: a call that fails with its actor is given to another one."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
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


def main(trees, wide):
    began = time.perf_counter()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    thinkers, scorers = [[Worker.remote() for _ in range(2)] for _ in range(2)]
    ray.get(thinkers[0].work.remote("think", -1))
    cold = time.perf_counter() - began
    ray.get([worker.work.remote("warm", -1) for worker in thinkers + scorers])

    def lease(stage, tree):
        pool = scorers if stage == 2 else thinkers
        return pool[tree % 2].work.remote(stage, tree)

    began = time.perf_counter()
    pending, started, done = {}, 0, 0
    while done < trees:
        while started < trees and len(pending) < wide:
            pending[lease(0, started)] = (0, started)
            started += 1
        ready, _ = ray.wait(list(pending), num_returns=1)
        for reference in ready:
            stage, tree = pending.pop(reference)
            ray.get(reference)
            if stage == 2:
                done += 1
            else:
                pending[lease(stage + 1, tree)] = (stage + 1, tree)
    seconds = time.perf_counter() - began
    print(json.dumps({
        "ray": ray.__version__, "trees": trees, "in_flight": wide, "seconds": seconds, "trees_per_second": trees / seconds,
        "leases_per_second": 3 * trees / seconds, "cold_start_to_first_lease_ms": round(1000 * cold),
    }))
    ray.shutdown()


if __name__ == "__main__":
    if sys.argv[1] == "loss":
        loss()
    else:
        main(int(sys.argv[1]), int(sys.argv[2]))
