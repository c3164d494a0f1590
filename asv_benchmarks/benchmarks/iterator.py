"""Time of one batch of 64 x 64 float32 from the distributed iterator, for two replicas."""

from __future__ import annotations

import numpy as np

import dvkernels as dv
from dvkernels.benchmarks.stopwatch import median_seconds

BATCH_SIZE = 64
NUM_BATCHES = 64


class Iterator:
    def setup(self):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((BATCH_SIZE * NUM_BATCHES, 64), dtype=np.float32)
        self.strategy = dv.MirroredStrategy(["cpu:0", "cpu:1"])
        dataset = dv.Dataset.from_arrays(x).repeat().batch(BATCH_SIZE)
        self.iterator = iter(self.strategy.distribute_dataset(dataset))
        for start in range(0, 2 * len(x), BATCH_SIZE):  # two epochs
            first = start % len(x)
            batch = np.concatenate(self.strategy.local_results(next(self.iterator)))
            np.testing.assert_array_equal(batch, x[first : first + BATCH_SIZE])

    def teardown(self):
        self.iterator.close()
        self.strategy.close()

    def track_next_batch(self):
        return median_seconds(lambda: next(self.iterator)) * 1e6

    track_next_batch.unit = "us"
