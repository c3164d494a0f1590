"""All-reduces as multiples of the time of the same in C: what must not grow.

``python -m peers record-limits`` keeps them in ``limit_history.jsonl``, for one machine.
"""

from __future__ import annotations

from benchmarks import grid, rounds
from dvkernels.benchmarks import cases, measurement, stopwatch

MIB = 1 << 20
NUM_ROUNDS = rounds(7)


class Limit:
    params = grid(["direct", "ring"], [2, 4, 8], [MIB, 4 * MIB, 16 * MIB, 64 * MIB])
    param_names = ["algorithm", "num_replicas", "nbytes"]
    timeout = 300

    def setup(self, algorithm, num_replicas, nbytes):
        try:
            from dvkernels.benchmarks import c_probe
        except ImportError:
            raise NotImplementedError("a commit without the kernel in C") from None
        if reason := c_probe.reason_for_none():
            raise NotImplementedError(reason)
        self.case = cases.case("all_reduce", nbytes, "float32", "mean", num_replicas, algorithm)

    def track_times_of_c(self, algorithm, num_replicas, nbytes):
        found = measurement.measure(self.case, NUM_ROUNDS, seed=0)
        if found.wrong:
            raise AssertionError(f"{self.case}: {found.wrong} wrong elements")
        return stopwatch.ratio(found.ours, found.in_c)

    track_times_of_c.unit = "times C"
