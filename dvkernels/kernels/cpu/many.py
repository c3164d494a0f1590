"""All-reduce of many arrays at once: one job of one item an array, and no fusion buffer.

Ten thousand small arrays cost no more than their addresses: compiled code reads them from the
lists (see array_structs.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import array_structs, intrinsics, thread_pool
from dvkernels.kernels.cpu.engine import job as jobs

__all__ = ["all_reduce_many"]


_VERB = "all_reduce_many"
_PIECE_NBYTES, _FAR_NBYTES = jobs.PIECE_NBYTES, jobs.FAR_NBYTES
_PROGRAM, _ITEMS = jobs.HEADER, jobs.HEADER + 6  # after the program of one row
_RUNNER, _ITEMSIZE = array_structs.RUNNER, array_structs.ITEMSIZE
_IS_MEAN, _SHARED, _THREADS = array_structs.IS_MEAN, array_structs.SHARED, array_structs.THREADS
_MOST_SEGMENTS = jobs.MOST_SEGMENTS

Array = np.ndarray[Any, Any]


def all_reduce_many(groups: Any, op: Any = "sum") -> list[list[Any]]:
    """Leave in every buffer of each group their reduction; see :func:`dvkernels.kernels`."""
    listed = checks.listed_groups(_VERB, groups)
    if listed and not _reduce_at_once(listed, op):
        _reduce_checked(listed, op)
    return listed


def _reduce_at_once(listed: list[list[Any]], op: Any) -> bool:
    """Reduce contiguous arrays of one dtype; False: declined, and nothing was touched."""
    try:
        recipe = array_structs.recipes[op, listed[0][0].dtype]
    except (KeyError, TypeError, AttributeError, IndexError):
        return False
    count, width = len(listed), len(listed[0])
    where_tables = _ITEMS + 4 * count
    where_counters = -(-(where_tables + count * width) // 8) * 8
    job = intrinsics.words(where_counters + 8 * jobs.MOST_SEGMENTS)
    job[20] = where_counters
    address = checks.address(job)
    moved = _prepare(id(listed), recipe.address, address, width)
    if moved < 0:
        return False
    starts = job[where_tables : where_tables + count * width]
    nbytes = np.repeat(job[_ITEMS + 1 : where_tables : 4] * recipe.words[_ITEMSIZE], width)
    order = np.argsort(starts)
    starts = starts[order]
    if (starts[1:] - starts[:-1] < nbytes[order][:-1]).any():
        return False  # two share an element
    thread_pool.execute(job, address, moved)
    return True


@jit.njit("int64(int64, int64, int64, int64)")
def _prepare(listed, recipe, job, width):  # type: ignore[no-untyped-def]
    """Fill the job that reduces lists of arrays; return the bytes it moves, or -1."""
    count = array_structs.length_of(listed)
    items = job + 8 * _ITEMS
    where_tables = _ITEMS + 4 * count
    total = np.int64(0)
    for k in range(count):
        group = array_structs.item_of(listed, k)
        if array_structs.length_of(group) != width:
            return -1
        length = array_structs.look(group, recipe, job + 8 * (where_tables + k * width), 0)
        if length < 0:
            return -1
        total += length
        intrinsics.store(items, 4 * k + 1, length)
        intrinsics.store(items, 4 * k + 2, 1)
        intrinsics.store(items, 4 * k + 3, where_tables + k * width)
    itemsize = intrinsics.load(recipe, _ITEMSIZE)
    moved = 2 * total * itemsize * width
    longest = max(total, 1)
    if moved >= intrinsics.load(recipe, _SHARED):
        wanted = max(4096, min(_PIECE_NBYTES // width, total * itemsize // 4))
        longest = (wanted & -128) // itemsize
    num_pieces = np.int64(0)
    for k in range(count):
        intrinsics.store(items, 4 * k, num_pieces)
        num_pieces += -(-intrinsics.load(items, 4 * k + 1) // longest)
    intrinsics.store(job, 8, num_pieces)
    # Small arrays are claimed many at once: a claim costs as much as the sum of 1 KiB.
    intrinsics.store(
        job,
        9,
        max(1, num_pieces // 64 if moved >= intrinsics.load(recipe, _SHARED) else num_pieces),
    )
    intrinsics.store(job, 10, longest)
    intrinsics.store(job, 11, count)
    intrinsics.store(job, 12, _ITEMS)
    intrinsics.store(job, 13, _PROGRAM)
    num_segments = np.int64(1)
    if moved >= intrinsics.load(recipe, _SHARED):
        num_segments = np.int64(min(intrinsics.load(recipe, _THREADS), _MOST_SEGMENTS))
    intrinsics.store(job, 21, num_segments)
    intrinsics.store(job, 14, 1)
    intrinsics.store(job, 15, np.int64(moved >= _FAR_NBYTES))
    intrinsics.store(job, 16, width)
    intrinsics.store(job, 17, 1)
    intrinsics.store(job, 18, intrinsics.load(recipe, _RUNNER))
    row = job + 8 * _PROGRAM
    intrinsics.store(row, 0, -1)
    intrinsics.store(row, 2, width)
    intrinsics.store(row, 4, width)
    intrinsics.store(row, 5, width if intrinsics.load(recipe, _IS_MEAN) else 1)
    return moved


def _reduce_checked(listed: list[list[Any]], op: Any) -> None:
    """Check every array before any is touched, then run one job for each dtype."""
    known, by_dtype = checks.grouped(_VERB, listed, op)
    width = len(listed[0])
    program = jobs.combine_in_place(width, jobs.divisor(known, width))
    for dtype, groups in by_dtype.items():
        array_structs.learn(known, dtype)
        jobs.run(known, dtype, groups, program)
