"""The constants of the cost model, measured: what ``schedules/cost_model.py`` calls a machine.

All by in-place sums of two float32 buffers, the medians of several rounds:

* ``call``: a call that moves 16 bytes;
* ``rate_of_one``, ``cached_rate``: the slope between two sizes on one thread, around where sharing
  begins to pay, and within a first cache;
* ``rate_of_all``: the slope between two sizes of jobs that all threads share;
* ``join``: what a shared job takes beyond its bytes, with helpers awake;
* ``wake``: what waking helpers that sleep costs the caller; they come 30 to 100 us later.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dvkernels.benchmarks.stopwatch import timed
from dvkernels.kernels import checks
from dvkernels.kernels.cpu.engine import job as jobs
from dvkernels.kernels.cpu.engine import thread_pool
from dvkernels.kernels.cpu.engine.loops import runner
from dvkernels.reduce_op import ReduceOp
from dvkernels.schedules.cost_model import CPU, Machine

__all__ = ["calibrate", "describe"]

_KIB = 1024
_NAP_SECONDS = 3e-3  # helpers fall asleep within a tenth of that


class _Sum:
    """The sum of two buffers as a job that can be run alone or shared, whatever its size."""

    def __init__(self, nbytes: int) -> None:
        self._buffers = [np.zeros(nbytes // 4, np.float32) for _ in range(2)]
        self.moved = 4 * nbytes
        length = nbytes // 4
        longest = max(1024, length // 8)
        self._job = jobs.lay_out_sum(self._buffers, longest, runner(ReduceOp.SUM, np.dtype("f4")))
        self._address = checks.address(self._job)

    def _rewind(self) -> None:
        self._job[0] = 0
        self._job[self._job[20] :] = 0  # the counters come last

    def alone(self) -> None:
        """Run it on this thread."""
        self._rewind()
        thread_pool.run_alone(self._address)

    def shared(self) -> None:
        """Run it with the helpers, however small it is."""
        self._rewind()
        thread_pool.execute(self._job, self._address, max(self.moved, thread_pool.SHARED_NBYTES))


def calibrate(num_rounds: int) -> Machine:
    """Return the constants of this machine. Takes a second or two."""
    tiny, small = _Sum(16), _Sum(8 * _KIB)
    middle, large = _Sum(128 * _KIB), _Sum(1024 * _KIB)

    def median(call: Callable[[], Any], iterations: int) -> float:
        def once() -> float:
            thread_pool.wake()
            return timed(call, iterations)

        return statistics.median(once() for _ in range(5 * num_rounds))

    call = median(tiny.alone, 1000)
    cached = small.moved / max(1e-9, median(small.alone, 1000) - call)
    rate_of_one = _slope(middle, large, [median(job.alone, 50) for job in (middle, large)])
    shared = [median(job.shared, 50) for job in (middle, large)]
    rate_of_all = _slope(middle, large, shared)
    join = max(0.0, shared[1] - call - large.moved / rate_of_all)
    naps = []
    for _ in range(5 * num_rounds):
        time.sleep(_NAP_SECONDS)
        naps.append(timed(thread_pool.wake, 1))
    wake = statistics.median(naps)
    return Machine(call, join, wake, rate_of_one, rate_of_all, cached)


def _slope(one: _Sum, other: _Sum, seconds: list[float]) -> float:
    return (other.moved - one.moved) / max(1e-9, seconds[1] - seconds[0])


def describe(found: Machine) -> str:
    """Return the constants beside those in use, and what follows from them."""
    lines = ["constant            measured here       in use"]
    for name, mine, used in zip(Machine._fields, found, CPU, strict=True):
        unit, scale = ("us", 1e6) if name.endswith("seconds") else ("GB/s", 1e-9)
        lines.append(f"{name:16} {scale * mine:11.2f} {unit:4} {scale * used:8.2f} {unit}")
    for asleep in (False, True):
        who = "helpers asleep" if asleep else "helpers awake"
        lines.append(
            f"sharing pays from {_kib(found, asleep)} KiB moved ({_kib(CPU, asleep)} in use), {who}"
        )
    return "\n".join(lines)


def _kib(machine: Machine, asleep: bool) -> str:
    if machine.rate_of_all <= machine.rate_of_one:
        return "no"  # sharing never pays
    return f"{machine.sharing_pays_from(asleep) / _KIB:.0f}"
