"""Monte Carlo estimate of pi with its standard error: every replica has its own random stream."""

import math

import numpy as np

import dvkernels as dv

SEED, BATCH, STEPS = 20, 50_000, 20


def estimate(num_replicas):
    devices = [f"cpu:{k}" for k in range(num_replicas)]
    with dv.MirroredStrategy(devices) as strategy, strategy.scope():
        # Each replica adds to its own copy, without communication; a read sums the copies.
        hits = dv.Variable(0, synchronization="on_read", aggregation="sum")
        draws = dv.Variable(0, synchronization="on_read", aggregation="sum")

        # Independent streams. One seed for all n replicas would repeat the same numbers n times,
        # and the standard error would be too small by a factor of sqrt(n).
        seeds = np.random.SeedSequence(SEED).spawn(num_replicas)
        streams = strategy.distribute_values_from_function(
            lambda context: np.random.default_rng(seeds[context.replica_id_in_sync_group])
        )

        def step(stream):
            x, y = stream.random((2, BATCH))
            hits.assign_add(int(np.count_nonzero(x * x + y * y <= 1)))
            draws.assign_add(BATCH)

        for _ in range(STEPS):
            strategy.run(step, args=(streams,))
        n = int(draws)
        share = int(hits) / n
    return 4 * share, 4 * math.sqrt(share * (1 - share) / n), n


one, error_of_one, draws_of_one = estimate(1)
two, error_of_two, draws_of_two = estimate(2)
assert estimate(2) == (two, error_of_two, draws_of_two), "the same seed gives the same estimate"
assert draws_of_two == 2 * draws_of_one
assert abs(error_of_one / error_of_two - math.sqrt(2)) < 0.01, "twice the draws, 1 / sqrt(2)"
assert abs(one - math.pi) < 4 * error_of_one
assert abs(two - math.pi) < 4 * error_of_two
print(f"1 replica:  pi = {one:.5f} +- {error_of_one:.5f}")
print(f"2 replicas: pi = {two:.5f} +- {error_of_two:.5f}")
