"""Bootstrap of a median: resamples are handed out to whichever replica is free."""

import numpy as np

import dvkernels as dv

SEED, RESAMPLES = 20, 500
sample = np.random.default_rng(SEED).exponential(3.0, 2000)


def median_of_resample(_):
    # The generator of the item: the same numbers on any number of replicas, in any order.
    rng = dv.get_replica_context().rng("bootstrap")
    return np.median(rng.choice(sample, sample.size))


def bootstrap(num_replicas):
    with dv.MirroredStrategy(num_replicas, seed=SEED) as strategy:
        return np.array(list(strategy.map(median_of_resample, range(RESAMPLES))))


medians = bootstrap(2)
assert (medians == bootstrap(1)).all(), "the same resamples on any number of replicas"
low, high = np.quantile(medians, [0.025, 0.975])
# The density of the exponential distribution at its median is 1 / (2 * 3).
expected = 1.96 * 3 / np.sqrt(sample.size)
assert 0.7 * expected < (high - low) / 2 < 1.4 * expected
assert low < 3 * np.log(2) < high
print(f"median {np.median(sample):.3f}, 95 % interval {low:.3f} to {high:.3f}")
