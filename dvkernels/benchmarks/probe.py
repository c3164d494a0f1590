"""Memory probe: the least time in which the bytes of a collective can be moved.

For a collective in place: R buffers, each word read once and written once, without a reduction.
The faster of two orders counts: (1) every core traverses its share of one buffer after another;
(2) its share of all buffers in step. For a collective out of place: every core reads its share of
each source, then writes its share of each target, (1) through the caches or (2) by streaming
stores, whichever is faster. Each core makes one compiled call. All of them pass a barrier in
compiled code before the clock starts, and no thread is started in the timed region.

In place, the words are incremented by a zero that the compiler does not know, so the data stay as
they are. The probe therefore runs over the buffers of the collective itself, equally often, and
finds them in the same caches. Targets out of place are overwritten.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np

from dvkernels.devices import cpu
from dvkernels.kernels.cpu import group
from dvkernels.kernels.cpu.engine import intrinsics

__all__ = ["Probe"]

carray: Any = vars(numba)["carray"]  # missing in Numba's stubs
# Words of a group's state that the group does not use: a zero that the compiler does not know, and
# a result that keeps it from dropping the reads.
_ZERO, _TOTAL = 20, 21
_STEP = 64  # words of each buffer in turn: four cache lines
# Not zero: two cores of an AMD EPYC streamed zeros at 85 GB/s, other words at 38 (2026-11).
_PATTERN = np.int64(0x12345678)


@numba.njit(nogil=True)
def _one_after_another(table, count, first, last, zero):  # type: ignore[no-untyped-def]
    for k in range(count):
        buffer = carray(intrinsics.pointer(intrinsics.load(table, 2 * k)), last, np.int32)
        for i in range(first, last):
            buffer[i] += zero


@numba.njit(nogil=True)
def _in_step(table, count, first, last, zero):  # type: ignore[no-untyped-def]
    for start in range(first, last - _STEP + 1, _STEP):
        for k in range(count):
            address = intrinsics.load(table, 2 * k) + 4 * start
            part = carray(intrinsics.pointer(address), _STEP, np.int32)
            for i in range(_STEP):
                part[i] += zero


@numba.njit(nogil=True)
def _read_then_write(table, sources, targets, rank, size, zero, streams):  # type: ignore[no-untyped-def]
    """Read a share of each source, write one of each target.

    The table holds an address and a number of words for each array, sources first.
    """
    total = np.int64(0)
    for k in range(sources + targets):
        address, length = intrinsics.load(table, 2 * k), intrinsics.load(table, 2 * k + 1)
        first, last = length * rank // size, length * (rank + 1) // size
        if k < sources:
            for i in range(first // 2, last // 2):  # 64-bit words, which LLVM vectorizes
                total ^= intrinsics.load(address, i)
        elif streams:
            begin = (address + 4 * first + 63) & -64
            for line in range(begin, address + 4 * last - 63, 64):
                intrinsics.stream_line(line, _PATTERN)
        else:
            carray(intrinsics.pointer(address), length, np.int32)[first:last] = zero + np.int32(
                _PATTERN
            )
    return total


@numba.njit(nogil=True)
def _work(state, rank, size, table, counts, variant, passes):  # type: ignore[no-untyped-def]
    sources, targets = counts
    total = np.int64(0)
    for _ in range(passes):
        zero = np.int32(intrinsics.load(np.int64(state.ctypes.data), _ZERO))
        if targets > 0:
            total ^= _read_then_write(table, sources, targets, rank, size, zero, variant)
        else:
            length = intrinsics.load(table, 1)
            first, last = length * rank // size, length * (rank + 1) // size
            if variant:
                _in_step(table, sources, first, last, zero)
            else:
                _one_after_another(table, sources, first, last, zero)
        group.barrier(state, rank)
    intrinsics.store(np.int64(state.ctypes.data), _TOTAL, total)


@numba.njit(nogil=True)
def _meet_and_work(state, rank, *arguments):  # type: ignore[no-untyped-def]
    group.barrier(state, rank)
    _work(state, rank, *arguments)


@numba.njit(nogil=True)
def _meet(state, rank):  # type: ignore[no-untyped-def]
    group.barrier(state, rank)


class Probe:
    """Memory probe over given arrays, on all usable cores and on one.

    Parameters
    ----------
    sources : sequence of contiguous array
        Read; without targets also written, with unchanged values.
    targets : sequence of contiguous array
        Overwritten; empty for a probe in place. None of them is a source.
    moved : int
        The bytes that the collective must read and write; times are scaled to them.
    """

    def __init__(
        self,
        sources: Sequence[np.ndarray[Any, Any]],
        targets: Sequence[np.ndarray[Any, Any]],
        moved: int,
    ) -> None:
        self._arrays = [*sources, *targets]
        self._counts = len(sources), len(targets)
        table = [(array.ctypes.data, array.nbytes // 4) for array in self._arrays]
        self._table = np.array(table, np.int64)
        once = 4 * sum(length for _, length in table)
        self._scale = moved / max(1, once if targets else 2 * once)
        self._is_empty = once == 0
        self._groups = [group.Group(size) for size in sorted({1, cpu.usable_cores()})]
        self.seconds(1)  # compiles

    def seconds(self, passes: int) -> float:
        """Return the seconds per pass of the fastest variant."""
        if self._is_empty:  # less than one word
            return 0.0
        return self._scale * min(
            self._seconds(cores, variant, passes)
            for cores in self._groups
            for variant in (False, True)
        )

    def _seconds(self, cores: group.Group, variant: bool, passes: int) -> float:
        state, size = cores.state, cores.num_replicas
        arguments = (size, int(self._table.ctypes.data), self._counts, variant, passes)
        helpers = [
            threading.Thread(target=_meet_and_work, args=(state, rank, *arguments), daemon=True)
            for rank in range(1, size)
        ]
        for helper in helpers:
            helper.start()
        _meet(state, 0)
        started = time.perf_counter_ns()
        _work(state, 0, *arguments)
        seconds = (time.perf_counter_ns() - started) / 1e9
        for helper in helpers:
            helper.join()
        return seconds / passes
