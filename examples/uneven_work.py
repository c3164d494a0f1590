"""Uneven work: batches of unequal size, replicas without batches, replicas of unequal speed."""

import itertools
import time

import numpy as np

import dvkernels as dv

values = np.random.default_rng(0).standard_normal(1000)
strategy = dv.MirroredStrategy(["cpu:0", "cpu:1", "cpu:2"])


# 1. Batches of unequal size: each mean is weighted by its number of elements.
def mean_of(part):
    own = part.mean() if len(part) else np.nan  # with weight 0 even NaN does not contribute
    return dv.get_replica_context().all_reduce("mean", own, weight=len(part))


parts = dv.PerReplica([values[:700], values[700:], values[:0]])
for mean in strategy.run(mean_of, args=(parts,)).values:
    np.testing.assert_allclose(mean, values.mean())


# 2. A replica without further batches takes part with weight 0 until all are done. The loop ends in
# the same round on all replicas, because all of them get the same sum of weights.
def sum_of_means(batches):
    context = dv.get_replica_context()
    own, rounds = iter(batches), 0
    while True:
        batch = next(own, ())
        if context.all_reduce("sum", len(batch)) == 0:
            return rounds
        mean = np.mean(batch) if len(batch) else 0.0
        context.all_reduce("mean", mean, weight=len(batch))
        rounds += 1


batches = dv.PerReplica([np.array_split(values, count) for count in (5, 2, 3)])
assert strategy.run(sum_of_means, args=(batches,)).values == (5, 5, 5)

# 3. Unequal speed: between two collectives each free replica takes the next job, so a slow replica
# does fewer jobs and the others wait little. next() of an itertools.count is atomic in CPython.
jobs = np.array_split(values, 60)
ticket = itertools.count()


def work(pause):
    total, done = 0.0, 0
    while (job := next(ticket)) < len(jobs):
        time.sleep(pause)  # stands for a computation that releases the interpreter's lock
        total, done = total + jobs[job].sum(), done + 1
    return dv.get_replica_context().all_reduce("sum", total), done


totals, done = strategy.run(work, args=(dv.PerReplica([0.001, 0.001, 0.008]),))
np.testing.assert_allclose(totals.on(0), values.sum())
assert sum(done.values) == len(jobs)
assert done.on(2) < done.on(0) + done.on(1)
strategy.close()
print(f"jobs done by replicas of unequal speed: {done.values}")
