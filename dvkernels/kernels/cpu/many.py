"""All-reduce of many arrays in one job, with an item for each array and no fusion buffer.

The cost of a small array is that of reading its addresses, which compiled code takes from the
lists (see array_structs.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import array_structs, intrinsics, job_layout, recipe, thread_pool
from dvkernels.kernels.cpu.engine.job import combine_in_place, divisor, run
from dvkernels.kernels.cpu.engine.job_layout import (
    COUNTER_WORDS,
    HEADER_WORDS,
    ITEM_WORDS,
    MOST_QUEUES,
    ROW_WORDS,
    Item,
    counters_after,
)

__all__ = ["all_reduce_many"]


_VERB = "all_reduce_many"
_ITEMS_OFFSET = HEADER_WORDS + ROW_WORDS  # the items follow a program of one row
_LENGTH = Item._fields.index("length")


def all_reduce_many(groups: Any, op: Any = "sum") -> list[list[Any]]:
    """Leave the reduction of each group in all its buffers; see :func:`dvkernels.kernels`."""
    lists = checks.groups_as_lists(_VERB, groups)
    if lists and not _reduce_unchecked(lists, op):
        _reduce_checked(lists, op)
    return lists


def _reduce_unchecked(lists: list[list[Any]], op: Any) -> bool:
    """Reduce contiguous arrays of one dtype; False: declined, and no array was touched."""
    try:
        found = recipe.recipes[op, lists[0][0].dtype]
    except (KeyError, TypeError, AttributeError, IndexError):
        return False
    count, width = len(lists), len(lists[0])
    tables_offset = _ITEMS_OFFSET + ITEM_WORDS * count
    counters_offset = counters_after(tables_offset + count * width)
    job = intrinsics.words(counters_offset + COUNTER_WORDS * (1 + MOST_QUEUES))
    address = checks.address(job)
    moved = _prepare(id(lists), found.address, address, width, address + 8 * counters_offset)
    if moved < 0:
        return False
    items = job[_ITEMS_OFFSET:tables_offset].reshape(count, ITEM_WORDS)
    starts = job[tables_offset : tables_offset + count * width]
    nbytes = np.repeat(items[:, _LENGTH] * found.itemsize, width)
    order = np.argsort(starts)
    starts = starts[order]
    if (starts[1:] - starts[:-1] < nbytes[order][:-1]).any():
        return False  # two arrays overlap
    thread_pool.execute(job, address, moved)
    return True


@jit.njit("int64(int64, int64, int64, int64, int64)")
def _prepare(lists, recipe_address, job_address, width, counters):  # type: ignore[no-untyped-def]
    """Fill the job that reduces lists of arrays; return the bytes it moves, or -1."""
    job, constants = job_layout.job_at(job_address), recipe.recipe_at(recipe_address)
    count = array_structs.length_of(lists)
    job.num_items = count
    job.num_rows = job.num_parts = 1
    job.rows = job_address + 8 * HEADER_WORDS
    job.items = job_address + 8 * _ITEMS_OFFSET
    job.counters = counters
    tables = job.items + 8 * ITEM_WORDS * count
    total = np.int64(0)
    for k in range(count):
        group = array_structs.item_of(lists, k)
        if array_structs.length_of(group) != width:
            return -1
        item = job_layout.item_at(job.items, k)
        item.num_lines = 1
        item.table = tables + 8 * k * width
        item.length = array_structs.read_addresses(group, constants, item.table, 0)
        if item.length < 0:
            return -1
        total += item.length
    moved = 2 * total * constants.itemsize * width
    recipe.cut(job, constants, total, width, moved)
    num_pieces = np.int64(0)
    for k in range(count):
        item = job_layout.item_at(job.items, k)
        item.first_piece = num_pieces
        num_pieces += -(-item.length // job.piece_length)
    job.num_pieces = num_pieces
    # Small arrays are claimed many at once: a claim costs as much as the sum of 1 KiB.
    is_shared = moved >= constants.shared_nbytes
    job.pieces_per_claim = max(1, num_pieces // 64 if is_shared else num_pieces)
    row = job_layout.row_at(job.rows, 0)
    row.part = -1
    row.num_sources = row.num_targets = width
    row.divisor = width if constants.is_mean else 1
    return moved


def _reduce_checked(lists: list[list[Any]], op: Any) -> None:
    """Check every array before any is touched, then run one job for each dtype."""
    known, by_dtype = checks.check_groups(_VERB, lists, op)
    width = len(lists[0])
    program = combine_in_place(width, divisor(known, width))
    for dtype, groups in by_dtype.items():
        recipe.register(known, dtype)
        run(known, dtype, groups, program)
