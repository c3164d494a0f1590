"""The memory limit, measured: what moving so many bytes in place takes at least.

R buffers, each word read once and written once: the mix of an in-place all-reduce, without any
reduction. Two orders, of which the faster counts: (1) every core goes through its share of one
buffer after another; (2) through all buffers in step. Each core makes one compiled call; all have
met in compiled code before the clock starts, and no thread is started in the timed region.

The words are incremented by a zero that the compiler does not know: the data stays as it is, so
the probe runs over the very buffers of the collective, as often as it, and finds them in the same
caches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np

from dvkernels.devices import cpu
from dvkernels.kernels.cpu import group, memory

__all__ = ["Probe"]

carray: Any = vars(numba)["carray"]  # which the stubs of Numba do not know
_STEP = 64  # words of each buffer in turn: four lines


@numba.njit(nogil=True)
def _one_after_another(table, count, first, last, zero):  # type: ignore[no-untyped-def]
    for k in range(count):
        buffer = carray(memory.pointer(memory.load(table, k)), last, np.int32)
        for i in range(first, last):
            buffer[i] += zero


@numba.njit(nogil=True)
def _in_step(table, count, first, last, zero):  # type: ignore[no-untyped-def]
    for start in range(first, last - _STEP + 1, _STEP):
        for k in range(count):
            address = memory.load(table, k) + 4 * start
            part = carray(memory.pointer(address), _STEP, np.int32)
            for i in range(_STEP):
                part[i] += zero


@numba.njit(nogil=True)
def _work(state, rank, size, table, count, length, in_step, passes):  # type: ignore[no-untyped-def]
    first, last = length * rank // size, length * (rank + 1) // size
    for _ in range(passes):
        zero = np.int32(memory.load_shared(np.int64(state.ctypes.data), 20))
        if in_step:
            _in_step(table, count, first, last, zero)
        else:
            _one_after_another(table, count, first, last, zero)
        group.barrier(state, rank)


@numba.njit(nogil=True)
def _meet_and_work(state, rank, *arguments):  # type: ignore[no-untyped-def]
    group.barrier(state, rank)
    _work(state, rank, *arguments)


@numba.njit(nogil=True)
def _meet(state, rank):  # type: ignore[no-untyped-def]
    group.barrier(state, rank)


class Probe:
    """The two probes over given buffers, on all usable cores and on one.

    Parameters
    ----------
    buffers : sequence of contiguous array, of one size
        Read and written, and left as they are.
    moved : int
        The bytes that the collective must read and write; times are scaled to them.
    """

    def __init__(self, buffers: Sequence[np.ndarray[Any, Any]], moved: int) -> None:
        self._buffers = buffers
        self._length = buffers[0].nbytes // 4
        self._table = np.array([array.ctypes.data for array in buffers], np.int64)
        self._scale = moved / max(1, 8 * self._length * len(buffers))
        self._groups = [group.Group(size) for size in sorted({1, cpu.usable_cores()})]
        self.seconds(1)  # compiles

    def seconds(self, passes: int) -> float:
        """Return what one pass takes, the mean of so many, in the faster order."""
        if self._length == 0:  # fewer bytes than a word: there is nothing to measure
            return 0.0
        return self._scale * min(
            self._seconds(team, in_step, passes)
            for team in self._groups
            for in_step in (False, True)
        )

    def _seconds(self, team: group.Group, in_step: bool, passes: int) -> float:
        state, size = team.state, team.num_replicas
        table, count = int(self._table.ctypes.data), len(self._buffers)
        arguments = (size, table, count, self._length, in_step, passes)
        helpers = [
            threading.Thread(target=_meet_and_work, args=(state, rank, *arguments), daemon=True)
            for rank in range(1, size)
        ]
        for helper in helpers:
            helper.start()
        _meet(state, 0)
        began = time.perf_counter_ns()
        _work(state, 0, *arguments)
        seconds = (time.perf_counter_ns() - began) / 1e9
        for helper in helpers:
            helper.join()
        return seconds / passes
