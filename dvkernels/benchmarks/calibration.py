"""Calibration of the cost model on one host: the constants of ``cost_model.Machine``.

All from in-place sums of two float32 buffers, medians of several rounds:

* ``call``: time of a call that moves 16 bytes;
* ``rate_of_one``: slope between two sizes on one thread, near where sharing starts to pay;
* ``rate_of_all``: slope between two sizes of jobs that all threads share;
* ``join``: time of a shared job beyond that of its bytes, with helper threads awake;
* ``wake``: time to wake sleeping helper threads; they start 30 to 100 us later.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dvkernels.benchmarks.stopwatch import timed
from dvkernels.kernels import checks
from dvkernels.kernels.cpu.engine import job, loops, thread_pool
from dvkernels.reduce_op import ReduceOp
from dvkernels.schedules.cost_model import CPU, Machine

__all__ = ["calibrate", "describe"]

_KIB = 1024
_NAP_SECONDS = 3e-3  # helper threads go to sleep within a tenth of it


class _Sum:
    """Sum of two buffers as a job that runs on one thread or on all, whatever its size."""

    def __init__(self, nbytes: int) -> None:
        self._buffers = [np.zeros(nbytes // 4, np.float32) for _ in range(2)]
        self.moved = 4 * nbytes
        length = nbytes // 4
        longest = max(1024, length // 8)
        runner = loops.runner(ReduceOp.SUM, np.dtype("f4"))
        self._job = job.lay_out_sum(self._buffers, longest, runner)
        self._address = checks.address(self._job)

    def alone(self) -> None:
        """Run the job on this thread."""
        job.rewind(self._job)
        thread_pool.run_alone(self._address)

    def shared(self) -> None:
        """Run the job on all threads, however small it is."""
        job.rewind(self._job)
        thread_pool.execute(self._job, self._address, max(self.moved, thread_pool.SHARED_NBYTES))


def calibrate(num_rounds: int) -> Machine:
    """Measure the constants of this machine, within a second or two."""
    tiny = _Sum(16)
    middle, large = _Sum(128 * _KIB), _Sum(1024 * _KIB)

    def median(call: Callable[[], Any], iterations: int) -> float:
        def once() -> float:
            thread_pool.wake()
            return timed(call, iterations)

        return statistics.median(once() for _ in range(5 * num_rounds))

    call = median(tiny.alone, 1000)
    rate_of_one = _slope(middle, large, [median(each.alone, 50) for each in (middle, large)])
    shared = [median(each.shared, 50) for each in (middle, large)]
    rate_of_all = _slope(middle, large, shared)
    join = max(0.0, shared[1] - call - large.moved / rate_of_all)
    wakes = []
    for _ in range(5 * num_rounds):
        time.sleep(_NAP_SECONDS)
        wakes.append(timed(thread_pool.wake, 1))
    wake = statistics.median(wakes)
    return Machine(call, join, wake, rate_of_one, rate_of_all)


def _slope(small: _Sum, large: _Sum, seconds: list[float]) -> float:
    """Return bytes per second between two sizes."""
    return (large.moved - small.moved) / max(1e-9, seconds[1] - seconds[0])


def describe(found: Machine) -> str:
    """Return a table of measured and used constants, and the sizes from which sharing pays."""
    lines = ["constant            measured here       in use"]
    for name, measured, used in zip(Machine._fields, found, CPU, strict=True):
        unit, scale = ("us", 1e6) if name.endswith("seconds") else ("GB/s", 1e-9)
        lines.append(f"{name:16} {scale * measured:11.2f} {unit:4} {scale * used:8.2f} {unit}")
    for asleep in (False, True):
        helpers = "helpers asleep" if asleep else "helpers awake"
        lines.append(
            f"sharing pays from {_kib(found, asleep)} KiB moved "
            f"({_kib(CPU, asleep)} in use), {helpers}"
        )
    return "\n".join(lines)


def _kib(machine: Machine, asleep: bool) -> str:
    if machine.rate_of_all <= machine.rate_of_one:
        return "no"  # sharing never pays
    return f"{machine.sharing_pays_from(asleep) / _KIB:.0f}"
