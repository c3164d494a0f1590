"""All-reduce of many arrays in one job, with an item for each array and no fusion buffer.

The cost of a small array is that of reading its addresses, which compiled code takes from the
lists (see array_structs.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import array_structs, intrinsics, thread_pool
from dvkernels.kernels.cpu.engine.job import (
    HEADER,
    MOST_SEGMENTS,
    OUT_OF_CACHE_NBYTES,
    PIECE_NBYTES,
    combine_in_place,
    divisor,
    run,
)

__all__ = ["all_reduce_many"]


_VERB = "all_reduce_many"
_PROGRAM, _ITEMS = HEADER, HEADER + 6  # the items follow a program of one row
_RUNNER, _ITEMSIZE = array_structs.RUNNER, array_structs.ITEMSIZE
_IS_MEAN, _SHARED, _THREADS = array_structs.IS_MEAN, array_structs.SHARED, array_structs.THREADS

Array = np.ndarray[Any, Any]


def all_reduce_many(groups: Any, op: Any = "sum") -> list[list[Any]]:
    """Leave the reduction of each group in all its buffers; see :func:`dvkernels.kernels`."""
    lists = checks.groups_as_lists(_VERB, groups)
    if lists and not _reduce_unchecked(lists, op):
        _reduce_checked(lists, op)
    return lists


def _reduce_unchecked(lists: list[list[Any]], op: Any) -> bool:
    """Reduce contiguous arrays of one dtype; False: declined, and no array was touched."""
    try:
        recipe = array_structs.recipes[op, lists[0][0].dtype]
    except (KeyError, TypeError, AttributeError, IndexError):
        return False
    count, width = len(lists), len(lists[0])
    tables_offset = _ITEMS + 4 * count
    counters_offset = -(-(tables_offset + count * width) // 8) * 8
    job = intrinsics.words(counters_offset + 8 * MOST_SEGMENTS)
    job[20] = counters_offset
    address = checks.address(job)
    moved = _prepare(id(lists), recipe.address, address, width)
    if moved < 0:
        return False
    starts = job[tables_offset : tables_offset + count * width]
    nbytes = np.repeat(job[_ITEMS + 1 : tables_offset : 4] * recipe.words[_ITEMSIZE], width)
    order = np.argsort(starts)
    starts = starts[order]
    if (starts[1:] - starts[:-1] < nbytes[order][:-1]).any():
        return False  # two arrays overlap
    thread_pool.execute(job, address, moved)
    return True


@jit.njit("int64(int64, int64, int64, int64)")
def _prepare(lists, recipe, job, width):  # type: ignore[no-untyped-def]
    """Fill the job that reduces lists of arrays; return the bytes it moves, or -1."""
    count = array_structs.length_of(lists)
    items = job + 8 * _ITEMS
    tables_offset = _ITEMS + 4 * count
    total = np.int64(0)
    for k in range(count):
        group = array_structs.item_of(lists, k)
        if array_structs.length_of(group) != width:
            return -1
        length = array_structs.read_addresses(
            group, recipe, job + 8 * (tables_offset + k * width), 0
        )
        if length < 0:
            return -1
        total += length
        intrinsics.store(items, 4 * k + 1, length)
        intrinsics.store(items, 4 * k + 2, 1)
        intrinsics.store(items, 4 * k + 3, tables_offset + k * width)
    itemsize = intrinsics.load(recipe, _ITEMSIZE)
    moved = 2 * total * itemsize * width
    piece_length = max(total, 1)
    if moved >= intrinsics.load(recipe, _SHARED):
        target_nbytes = max(4096, min(PIECE_NBYTES // width, total * itemsize // 4))
        piece_length = (target_nbytes & -128) // itemsize
    num_pieces = np.int64(0)
    for k in range(count):
        intrinsics.store(items, 4 * k, num_pieces)
        num_pieces += -(-intrinsics.load(items, 4 * k + 1) // piece_length)
    intrinsics.store(job, 8, num_pieces)
    # Small arrays are claimed many at once: a claim costs as much as the sum of 1 KiB.
    intrinsics.store(
        job,
        9,
        max(1, num_pieces // 64 if moved >= intrinsics.load(recipe, _SHARED) else num_pieces),
    )
    intrinsics.store(job, 10, piece_length)
    intrinsics.store(job, 11, count)
    intrinsics.store(job, 12, _ITEMS)
    intrinsics.store(job, 13, _PROGRAM)
    num_segments = np.int64(1)
    if moved >= intrinsics.load(recipe, _SHARED):
        num_segments = np.int64(min(intrinsics.load(recipe, _THREADS), MOST_SEGMENTS))
    intrinsics.store(job, 21, num_segments)
    intrinsics.store(job, 14, 1)
    intrinsics.store(job, 15, np.int64(moved >= OUT_OF_CACHE_NBYTES))
    intrinsics.store(job, 16, width)
    intrinsics.store(job, 17, 1)
    intrinsics.store(job, 18, intrinsics.load(recipe, _RUNNER))
    row = job + 8 * _PROGRAM
    intrinsics.store(row, 0, -1)
    intrinsics.store(row, 2, width)
    intrinsics.store(row, 4, width)
    intrinsics.store(row, 5, width if intrinsics.load(recipe, _IS_MEAN) else 1)
    return moved


def _reduce_checked(lists: list[list[Any]], op: Any) -> None:
    """Check every array before any is touched, then run one job for each dtype."""
    known, by_dtype = checks.check_groups(_VERB, lists, op)
    width = len(lists[0])
    program = combine_in_place(width, divisor(known, width))
    for dtype, groups in by_dtype.items():
        array_structs.register(known, dtype)
        run(known, dtype, groups, program)
