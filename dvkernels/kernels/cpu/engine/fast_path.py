"""Fast path of the direct algorithm: lists of NumPy arrays, reduced in place or into others.

The Python of a call (checks, addresses, job: 5 us) takes longer than the sum of 64 KiB. So
compiled code reads the arrays' structs (see array_structs.py) and fills a job that is reused by
later calls.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import array_structs, intrinsics, thread_pool
from dvkernels.kernels.cpu.engine.job import (
    HEADER,
    MOST_SEGMENTS,
    OUT_OF_CACHE_NBYTES,
    PIECE_NBYTES,
)

__all__ = [
    "ITEM",
    "MOST_ARRAYS",
    "ROW",
    "TABLE",
    "all_reduce",
    "new_job",
    "reduce_into",
]


MOST_ARRAYS = 64
ITEM, ROW, TABLE = HEADER, HEADER + 4, HEADER + 10  # one item, one row
_COUNTERS = -(-(TABLE + MOST_ARRAYS) // 8) * 8
# Up to this size a call keeps the GIL: 2 us, less than releasing it may cost.
_SHORT_NBYTES = 256 * 1024
_DECLINED, _DONE = -1, -2
_RUNNER, _ITEMSIZE = array_structs.RUNNER, array_structs.ITEMSIZE
_IS_MEAN, _SHARED, _THREADS = array_structs.IS_MEAN, array_structs.SHARED, array_structs.THREADS


@jit.njit("int64(int64, int64, int64, int64)")
def _prepare(views, recipe, job, num_sources):  # type: ignore[no-untyped-def]
    """Fill the job that reduces the first arrays of a list, and run it if it is short.

    The targets are the other arrays, or, if there are none, the sources. Return the bytes that the
    job moves, for the caller to run it, or _DONE, or _DECLINED.
    """
    count = array_structs.length_of(views)
    if num_sources < 1 or count > MOST_ARRAYS:
        return _DECLINED
    has_targets = count > num_sources
    num_targets = count - num_sources if has_targets else count
    table = job + 8 * TABLE
    length = array_structs.read_addresses(views, recipe, table, num_sources if has_targets else 0)
    if length < 0:
        return _DECLINED
    itemsize = intrinsics.load(recipe, _ITEMSIZE)
    nbytes = length * itemsize
    for k in range(num_sources if has_targets else 0, count):
        start = intrinsics.load(table, k)
        for other in range(k):
            if abs(start - intrinsics.load(table, other)) < nbytes:
                return _DECLINED  # two arrays overlap
    moved = (num_sources + num_targets) * nbytes
    piece_length = length
    num_segments = np.int64(1)
    if moved >= intrinsics.load(recipe, _SHARED):
        target_nbytes = max(4096, min(PIECE_NBYTES // count, nbytes // 4))
        piece_length = (target_nbytes & -128) // itemsize
        num_segments = np.int64(min(intrinsics.load(recipe, _THREADS), MOST_SEGMENTS))
    for segment in range(num_segments):
        intrinsics.store(job, _COUNTERS + 8 * segment, 0)
    in_memory = np.int64(moved >= OUT_OF_CACHE_NBYTES)
    if has_targets and moved >= OUT_OF_CACHE_NBYTES // 2:
        in_memory = np.int64(2)
    intrinsics.store(job, 0, 0)
    intrinsics.store(job, 8, 0 if length == 0 else -(-length // piece_length))
    intrinsics.store(job, 10, piece_length)
    intrinsics.store(job, 15, in_memory)
    intrinsics.store(job, 16, count)
    intrinsics.store(job, 18, intrinsics.load(recipe, _RUNNER))
    intrinsics.store(job, 21, num_segments)
    intrinsics.store(job, ITEM + 1, length)
    row = job + 8 * ROW
    intrinsics.store(row, 2, num_sources)
    intrinsics.store(row, 3, num_sources if has_targets else 0)
    intrinsics.store(row, 4, num_targets)
    intrinsics.store(row, 5, num_sources if intrinsics.load(recipe, _IS_MEAN) else 1)
    if moved <= _SHORT_NBYTES:
        intrinsics.call(intrinsics.load(recipe, _RUNNER), job)
        return _DONE
    return moved


# The function behind the dispatcher: a call takes 0.1 us less, for its arguments are integers.
_prepare_now = _prepare.get_overload((types.int64,) * 4)


def new_job(num_arrays: int = MOST_ARRAYS) -> tuple[Any, int]:
    """Return the words, not yet filled, of a job of one item and one row, and their address."""
    counters = -(-(TABLE + num_arrays) // 8) * 8
    job = intrinsics.words(counters + 8 * MOST_SEGMENTS)
    job[9] = job[11] = job[14] = job[17] = 1  # one piece per claim, one item, one row, one part
    job[12], job[13], job[20] = ITEM, ROW, counters
    job[ITEM:ROW] = (0, 0, 1, TABLE)
    job[ROW:TABLE] = (-1, 0, 0, 0, 0, 1)
    return job, checks.address(job)


_free_jobs: list[tuple[Any, int]] = []


def all_reduce(buffers: Any, op: Any) -> list[Any] | None:
    """Reduce in place by the direct algorithm and return the buffers; None: declined."""
    try:
        recipe = array_structs.recipes[op, buffers[0].dtype]
    except (KeyError, TypeError, AttributeError, IndexError):
        return None
    views = [*buffers]
    return views if _reduce(views, recipe, len(views)) else None


def reduce_into(sources: Any, targets: Any, op: Any) -> bool:
    """Reduce the sources into every target by the direct algorithm; False: declined."""
    try:
        recipe = array_structs.recipes[op, sources[0].dtype]
    except (KeyError, TypeError, AttributeError, IndexError):
        return False
    return _reduce([*sources, *targets], recipe, len(sources))


def _reduce(views: list[Any], recipe: array_structs.ReductionWords, num_sources: int) -> bool:
    try:
        job = _free_jobs.pop()
    except IndexError:
        job = new_job()
    moved = _prepare_now(id(views), recipe.address, job[1], num_sources)
    if moved > 0:
        thread_pool.execute(job[0], job[1], moved)
    _free_jobs.append(job)
    return bool(moved != _DECLINED)
