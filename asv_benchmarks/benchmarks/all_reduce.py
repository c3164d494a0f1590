"""All-reduce of float32 buffers, in place, by size, replicas and algorithm.

The cases, the check, the memory probe and the stopwatch are those of ``python -m dvkernels bench``.
``numpy`` is the neighbour: ``np.add(out=)`` and ``np.copyto``, on one thread.
"""

from __future__ import annotations

import numpy as np

from dvkernels.benchmarks import cases
from dvkernels.benchmarks.cases import Arrays, Case, Trial
from dvkernels.benchmarks.contest import measure
from dvkernels.benchmarks.peers import numpy_loop
from dvkernels.benchmarks.stopwatch import Contestant, alternate

KIB = 1024
NUM_ROUNDS = 15


def _trial(arrays, call, name):
    trial = Trial(arrays, call)
    wrong = trial.num_wrong()
    if wrong:
        raise AssertionError(f"{name}: {wrong} elements of {arrays.case} are wrong")
    return Contestant(trial.run, trial.max_calls)


def _contestants(nbytes, num_replicas, algorithm):
    case = Case(
        "all_reduce", nbytes // 4, np.dtype(np.float32), "sum", num_replicas, algorithm=algorithm
    )
    arrays = Arrays(case)
    contestants = {"numpy": _trial(arrays, numpy_loop.call(arrays), "numpy")}
    if algorithm != "numpy":
        contestants["ours"] = _trial(arrays, cases.ours(arrays), algorithm)
    return case, contestants


class AllReduce:
    params = (
        [4 * KIB, 64 * KIB, 1024 * KIB, 16 * 1024 * KIB, 64 * 1024 * KIB],
        ["direct", "ring", "numpy"],
    )
    param_names = ["nbytes", "algorithm"]

    def setup(self, nbytes, algorithm):
        self.case, contestants = _contestants(nbytes, 2, algorithm)
        self.contestant = {"x": contestants["numpy" if algorithm == "numpy" else "ours"]}

    def _seconds(self):
        return alternate(self.contestant, NUM_ROUNDS).timings["x"].median

    def track_all_reduce_time(self, nbytes, algorithm):
        return self._seconds() * 1e6

    track_all_reduce_time.unit = "us"

    def track_all_reduce_busbw(self, nbytes, algorithm):
        return nbytes / self._seconds() / 1e9 * self.case.bus_factor

    track_all_reduce_busbw.unit = "GB/s"


class OfTheLimit:
    """64 MiB beside the memory limit and NumPy, in alternating rounds of one run."""

    params = (["direct", "ring"], [2, 4])
    param_names = ["algorithm", "num_replicas"]
    timeout = 300

    def setup(self, algorithm, num_replicas):
        self.case, self.contestants = _contestants(64 * 1024 * KIB, num_replicas, algorithm)

    def track_times_faster_than_numpy(self, algorithm, num_replicas):
        timings, _ = alternate(self.contestants, NUM_ROUNDS)
        return timings["numpy"].over(timings["ours"])

    track_times_faster_than_numpy.unit = "times"

    def track_attained_fraction_of_probe(self, algorithm, num_replicas):
        _, attained, _ = measure(self.case, self.contestants, NUM_ROUNDS)
        return attained["ours"]

    track_attained_fraction_of_probe.unit = "of the faster probe"
