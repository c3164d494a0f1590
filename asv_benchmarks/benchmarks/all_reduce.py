"""All-reduce of two float32 buffers, in place, by size and algorithm.

``numpy`` is the neighbour: ``np.add(out=)`` and ``np.copyto``, on one thread.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from dvkernels import kernels

from .probe import fastest_probe_seconds
from .stopwatch import median_seconds

KIB = 1024
NUM_REPLICAS = 2
NUM_ROUNDS = 15


def _numpy_all_reduce(buffers):
    total, *others = buffers
    for buffer in others:
        np.add(total, buffer, out=total)
    for buffer in others:
        np.copyto(buffer, total)


def _call(algorithm):
    if algorithm == "numpy":
        return _numpy_all_reduce
    return lambda buffers: kernels.all_reduce(buffers, "sum", algorithm=algorithm)


class AllReduce:
    params = (
        [4 * KIB, 64 * KIB, 1024 * KIB, 16 * 1024 * KIB, 64 * 1024 * KIB],
        ["direct", "ring", "numpy"],
    )
    param_names = ["nbytes", "algorithm"]

    def setup(self, nbytes, algorithm):
        self.call = _call(algorithm)
        length = nbytes // np.dtype(np.float32).itemsize
        rng = np.random.default_rng(0)
        buffers = [rng.standard_normal(length, dtype=np.float32) for _ in range(NUM_REPLICAS)]
        expected = np.sum(buffers, axis=0, dtype=np.float32)  # two terms: one rounding, any order
        self.call(buffers)  # compiles
        for replica_id, buffer in enumerate(buffers):
            if not np.array_equal(buffer, expected):
                raise AssertionError(f"{algorithm}: replica {replica_id} has a wrong sum")
        # The timed sums work in place, again and again: x and -x stay at zero, others overflow.
        np.negative(buffers[0], out=buffers[1])
        self.buffers = buffers
        self.call(self.buffers)

    def time_all_reduce(self, nbytes, algorithm):
        self.call(self.buffers)

    def track_all_reduce_busbw(self, nbytes, algorithm):
        seconds = median_seconds(lambda: self.call(self.buffers))
        algbw = nbytes / seconds / 1e9
        return algbw * 2 * (NUM_REPLICAS - 1) / NUM_REPLICAS

    track_all_reduce_busbw.unit = "GB/s"


class OfTheLimit:
    """64 MiB beside the memory limit and NumPy, in alternating rounds of one run."""

    params = ["direct", "ring"]
    param_names = ["algorithm"]
    timeout = 300

    def setup(self, algorithm):
        rng = np.random.default_rng(0)
        length = 64 * 1024 * KIB // np.dtype(np.float32).itemsize
        self.buffers = [rng.standard_normal(length, dtype=np.float32) for _ in range(NUM_REPLICAS)]
        self.call = _call(algorithm)
        self.call(self.buffers)
        fastest_probe_seconds(self.buffers)  # compiles

    def _medians(self):
        calls = {
            "ours": lambda: _timed(self.call, self.buffers),
            "numpy": lambda: _timed(_numpy_all_reduce, self.buffers),
            "probe": lambda: fastest_probe_seconds(self.buffers),
        }
        seconds = {name: [] for name in calls}
        for _ in range(NUM_ROUNDS):
            for name, call in calls.items():
                seconds[name].append(call())
            for buffer in self.buffers:
                buffer[:] = 0  # sums in place, again and again, would overflow
        return {name: statistics.median(values) for name, values in seconds.items()}

    def track_times_faster_than_numpy(self, algorithm):
        medians = self._medians()
        return medians["numpy"] / medians["ours"]

    track_times_faster_than_numpy.unit = "times"

    def track_attained_fraction_of_probe(self, algorithm):
        medians = self._medians()
        return medians["probe"] / medians["ours"]

    track_attained_fraction_of_probe.unit = "of the faster probe"


def _timed(call, buffers):
    began = time.perf_counter()
    call(buffers)
    return time.perf_counter() - began
