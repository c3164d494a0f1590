"""Overhead of ``strategy.run``: steps without work and with a small all-reduce, two replicas."""

from __future__ import annotations

import numpy as np

import dvkernels as dv
from dvkernels.benchmarks.stopwatch import median_seconds

WARM_UP_CALLS = 50


def _do_nothing():
    return None


class StrategyRun:
    def setup(self):
        self.strategy = dv.MirroredStrategy(["cpu:0", "cpu:1"])
        rng = np.random.default_rng(0)
        contributions = rng.standard_normal((2, 1024), dtype=np.float32)  # 4 KiB per replica

        def reduce_once():
            context = dv.get_replica_context()
            mine = contributions[context.replica_id_in_sync_group]
            return context.all_reduce("sum", mine)

        self.reduce_once = reduce_once
        for result in self.strategy.local_results(self.strategy.run(reduce_once)):
            np.testing.assert_array_equal(result, contributions[0] + contributions[1])
        for _ in range(WARM_UP_CALLS):
            self.strategy.run(_do_nothing)
            self.strategy.run(reduce_once)

    def teardown(self):
        self.strategy.close()

    def track_run_nothing(self):
        return median_seconds(lambda: self.strategy.run(_do_nothing)) * 1e6

    track_run_nothing.unit = "us"

    def track_run_all_reduce_4_kib(self):
        return median_seconds(lambda: self.strategy.run(self.reduce_once)) * 1e6

    track_run_all_reduce_4_kib.unit = "us"
