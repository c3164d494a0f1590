"""The other collectives over two float32 buffers, beside the memory limit.

The cases are those of ``python -m dvkernels bench``: results go into arrays that are there already.
"""

from __future__ import annotations

import numpy as np

from dvkernels import kernels
from dvkernels.benchmarks import cases
from dvkernels.benchmarks.cases import Arrays, Case, Trial
from dvkernels.benchmarks.contest import measure
from dvkernels.benchmarks.stopwatch import Contestant, alternate

KIB = 1024
NUM_ROUNDS = 15


class _OneCollective:
    collective = ""
    params = [64 * KIB, 1024 * KIB, 64 * 1024 * KIB]
    param_names = ["nbytes"]
    timeout = 300

    def setup(self, nbytes):
        if not hasattr(kernels, self.collective):
            raise NotImplementedError(f"there is no kernels.{self.collective}")
        self.case = Case(self.collective, nbytes // 4, np.dtype(np.float32))
        arrays = Arrays(self.case)
        trial = Trial(arrays, cases.ours(arrays))
        wrong = trial.num_wrong()
        if wrong:
            raise AssertionError(f"{wrong} elements of {self.case} are wrong")
        self.contestant = {"ours": Contestant(trial.run, trial.max_calls)}

    def track_time(self, nbytes):
        return alternate(self.contestant, NUM_ROUNDS).timings["ours"].median * 1e6

    track_time.unit = "us"

    def track_attained_fraction_of_probe(self, nbytes):
        _, attained, _ = measure(self.case, self.contestant, NUM_ROUNDS)
        return attained["ours"]

    track_attained_fraction_of_probe.unit = "of the faster probe"


class Broadcast(_OneCollective):
    collective = "broadcast"


class Reduce(_OneCollective):
    collective = "reduce"


class ReduceScatter(_OneCollective):
    collective = "reduce_scatter"


class AllGather(_OneCollective):
    collective = "all_gather"


class AllToAll(_OneCollective):
    collective = "all_to_all"
