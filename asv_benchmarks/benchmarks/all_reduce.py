"""Collectives over float32 buffers, with the cases, probe and checks of ``dvkernels bench``.

They are compared with NumPy: ``np.add(out=)`` and ``np.copyto``, on one thread.
"""

from __future__ import annotations

from benchmarks import grid, rounds
from dvkernels.benchmarks import cases, measurement, stopwatch

KIB = 1024
NUM_ROUNDS = rounds(7)
SIZES = [4 * KIB, 64 * KIB, 1024 * KIB, 16 * 1024 * KIB, 64 * 1024 * KIB]


class AllReduce:
    params = grid(SIZES, [2, 4], ["direct", "ring"])
    param_names = ["nbytes", "num_replicas", "algorithm"]
    timeout = 300

    def setup(self, nbytes, num_replicas, algorithm):
        self.case = cases.case("all_reduce", nbytes, "float32", "sum", num_replicas, algorithm)

    def _measured(self):
        found = measurement.measure(self.case, NUM_ROUNDS, seed=0, with_numpy=True)
        if found.wrong:
            raise AssertionError(f"{self.case}: {found.wrong} wrong elements")
        return found

    def track_busbw(self, nbytes, num_replicas, algorithm):
        return self.case.rates(self._measured().ours.median)[1]

    track_busbw.unit = "GB/s"

    def track_attained_fraction_of_probe(self, nbytes, num_replicas, algorithm):
        return self._measured().attained

    track_attained_fraction_of_probe.unit = "of the faster probe"

    def track_times_faster_than_numpy(self, nbytes, num_replicas, algorithm):
        found = self._measured()
        return stopwatch.ratio(found.peers["numpy"], found.ours)

    track_times_faster_than_numpy.unit = "times"


class OtherCollectives:
    params = grid(
        ["broadcast", "reduce", "reduce_scatter", "all_gather", "all_to_all"],
        [1024 * KIB, 16 * 1024 * KIB],
        [2, 4],
    )
    param_names = ["collective", "nbytes", "num_replicas"]
    timeout = 300

    def setup(self, collective, nbytes, num_replicas):
        self.case = cases.case(collective, nbytes, "float32", "sum", num_replicas, "auto")

    def track_attained_fraction_of_probe(self, collective, nbytes, num_replicas):
        found = measurement.measure(self.case, NUM_ROUNDS, seed=0)
        if found.wrong:
            raise AssertionError(f"{self.case}: {found.wrong} wrong elements")
        return found.attained

    track_attained_fraction_of_probe.unit = "of the faster probe"


class Halves:
    params = grid(["float16", "bfloat16"])
    param_names = ["dtype"]
    timeout = 300

    def track_share_of_float32_bandwidth(self, dtype):
        """Compare the times of 64 MiB per replica of either dtype, in one run."""
        halves = cases.case("all_reduce", 64 * 1024 * KIB, dtype, "sum", 2, "direct")
        floats = cases.case("all_reduce", 64 * 1024 * KIB, "float32", "sum", 2, "direct")
        found = [measurement.measure(case, NUM_ROUNDS, seed=0) for case in (halves, floats)]
        if any(measured.wrong for measured in found):
            raise AssertionError(f"{dtype}: wrong elements")
        return found[1].ours.median / found[0].ours.median

    track_share_of_float32_bandwidth.unit = "of float32's"
