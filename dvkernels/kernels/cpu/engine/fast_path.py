"""The short way of the common calls: a list of NumPy arrays, reduced in place or into others.

What a call costs in Python (checks, addresses, the job: 5 us) is more than the sum of 64 KiB. So
compiled code looks at the arrays (see array_structs.py) and fills a job that is used again and
again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import array_structs, intrinsics, thread_pool
from dvkernels.kernels.cpu.engine import job as jobs

__all__ = [
    "ITEM",
    "MOST_ARRAYS",
    "ROW",
    "TABLE",
    "all_reduce",
    "new_job",
    "reduce_into",
]


MOST_ARRAYS, _MOST_SEGMENTS = 64, jobs.MOST_SEGMENTS
ITEM, ROW, TABLE = jobs.HEADER, jobs.HEADER + 4, jobs.HEADER + 10  # one item, one row
_COUNTERS = -(-(TABLE + MOST_ARRAYS) // 8) * 8
# Up to here a call keeps the interpreter's lock: 2 us, less than giving it up may cost.
_SHORT_NBYTES = 256 * 1024
_DECLINED, _DONE = -1, -2
_PIECE_NBYTES, _FAR_NBYTES = jobs.PIECE_NBYTES, jobs.FAR_NBYTES
_RUNNER, _ITEMSIZE = array_structs.RUNNER, array_structs.ITEMSIZE
_IS_MEAN, _SHARED, _THREADS = array_structs.IS_MEAN, array_structs.SHARED, array_structs.THREADS


@jit.njit("int64(int64, int64, int64, int64)")
def _prepare(views, recipe, job, num_sources):  # type: ignore[no-untyped-def]
    """Fill the job that reduces the first arrays of a list, run it if it is short; say how it went.

    The targets are the other arrays, or, if there are none, the sources. Returns the bytes to be
    moved by whoever runs the job, or _DONE, or _DECLINED.
    """
    count = array_structs.length_of(views)
    if num_sources < 1 or count > MOST_ARRAYS:
        return _DECLINED
    is_apart = count > num_sources
    num_targets = count - num_sources if is_apart else count
    table = job + 8 * TABLE
    length = array_structs.look(views, recipe, table, num_sources if is_apart else 0)
    if length < 0:
        return _DECLINED
    itemsize = intrinsics.load(recipe, _ITEMSIZE)
    nbytes = length * itemsize
    for k in range(num_sources if is_apart else 0, count):
        start = intrinsics.load(table, k)
        for other in range(k):
            if abs(start - intrinsics.load(table, other)) < nbytes:
                return _DECLINED  # they overlap
    moved = (num_sources + num_targets) * nbytes
    longest = length
    num_segments = np.int64(1)
    if moved >= intrinsics.load(recipe, _SHARED):
        wanted = max(4096, min(_PIECE_NBYTES // count, nbytes // 4))
        longest = (wanted & -128) // itemsize
        num_segments = np.int64(min(intrinsics.load(recipe, _THREADS), _MOST_SEGMENTS))
    for segment in range(num_segments):
        intrinsics.store(job, _COUNTERS + 8 * segment, 0)
    far = np.int64(moved >= _FAR_NBYTES)
    if is_apart and moved >= _FAR_NBYTES // 2:
        far = np.int64(2)
    intrinsics.store(job, 0, 0)
    intrinsics.store(job, 8, 0 if length == 0 else -(-length // longest))
    intrinsics.store(job, 10, longest)
    intrinsics.store(job, 15, far)
    intrinsics.store(job, 16, count)
    intrinsics.store(job, 18, intrinsics.load(recipe, _RUNNER))
    intrinsics.store(job, 21, num_segments)
    intrinsics.store(job, ITEM + 1, length)
    row = job + 8 * ROW
    intrinsics.store(row, 2, num_sources)
    intrinsics.store(row, 3, num_sources if is_apart else 0)
    intrinsics.store(row, 4, num_targets)
    intrinsics.store(row, 5, num_sources if intrinsics.load(recipe, _IS_MEAN) else 1)
    if moved <= _SHORT_NBYTES:
        intrinsics.call(intrinsics.load(recipe, _RUNNER), job)
        return _DONE
    return moved


# The function behind the dispatcher: 0.1 us less, for its arguments are known to be integers.
_prepare_now = _prepare.get_overload((types.int64,) * 4)


def new_job(num_arrays: int = MOST_ARRAYS) -> tuple[Any, int]:
    """Return the words of a job of one item and one row, to be filled, and their address."""
    counters = -(-(TABLE + num_arrays) // 8) * 8
    job = intrinsics.words(counters + 8 * _MOST_SEGMENTS)
    job[9] = job[11] = job[14] = job[17] = 1  # claims of one piece, one item, one row, one part
    job[12], job[13], job[20] = ITEM, ROW, counters
    job[ITEM:ROW] = (0, 0, 1, TABLE)
    job[ROW:TABLE] = (-1, 0, 0, 0, 0, 1)
    return job, checks.address(job)


_free: list[tuple[Any, int]] = []


def all_reduce(buffers: Any, op: Any) -> list[Any] | None:
    """Reduce in place by the direct algorithm and return the buffers; None: declined."""
    try:
        recipe = array_structs.recipes[op, buffers[0].dtype]
    except (KeyError, TypeError, AttributeError, IndexError):
        return None
    views = [*buffers]
    return views if _is_reduced(views, recipe, len(views)) else None


def reduce_into(sources: Any, targets: Any, op: Any) -> bool:
    """Reduce the sources into every target by the direct algorithm; False: declined."""
    try:
        recipe = array_structs.recipes[op, sources[0].dtype]
    except (KeyError, TypeError, AttributeError, IndexError):
        return False
    return _is_reduced([*sources, *targets], recipe, len(sources))


def _is_reduced(views: list[Any], recipe: array_structs.ReductionWords, num_sources: int) -> bool:
    try:
        job = _free.pop()
    except IndexError:
        job = new_job()
    moved = _prepare_now(id(views), recipe.address, job[1], num_sources)
    if moved > 0:
        thread_pool.execute(job[0], job[1], moved)
    _free.append(job)
    return bool(moved != _DECLINED)
