"""Jobs of groups of arrays, an item for each, which compiled code fills from lists.

The Python of an item (checks and addresses of its arrays) takes 3 us; compiled code reads the
arrays' structs instead (see array_structs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import array_structs, intrinsics, job_layout, recipe
from dvkernels.kernels.cpu.engine.job_layout import (
    COUNTER_WORDS,
    HEADER_WORDS,
    ITEM_WORDS,
    MOST_QUEUES,
    PREFETCHED_NBYTES,
    ROW_WORDS,
    Item,
    Row,
    counters_after,
)

__all__: list[str] = []

_ITEMS_OFFSET = HEADER_WORDS + ROW_WORDS  # the items follow a program of one row
_LENGTH = Item._fields.index("length")


class GroupedJob(NamedTuple):
    """Job ready to run: its words, their address, and the bytes that it moves."""

    words: HostArray
    address: int
    moved: int


def fill(
    groups: list[list[Any]],
    found: recipe.Recipe,
    row: Row,
    num_entries: int,
    constants: Sequence[float] = (),
) -> GroupedJob | None:
    """Return the job that runs ``row`` over each group; None: declined.

    The arrays of a group before the first target are only read. A table has ``num_entries``: the
    arrays, and what the runner needs besides.
    """
    constants_offset = _ITEMS_OFFSET + (ITEM_WORDS + num_entries) * len(groups)
    counters_offset = counters_after(constants_offset + len(constants))
    words = intrinsics.words(counters_offset + COUNTER_WORDS * (1 + MOST_QUEUES))
    address = checks.address(words)
    words[HEADER_WORDS:_ITEMS_OFFSET] = row
    words[constants_offset : constants_offset + len(constants)].view(np.float64)[:] = constants
    moved = _fill(
        id(groups), found.address, address, num_entries,
        address + 8 * constants_offset, address + 8 * counters_offset,
    )  # fmt: skip
    return None if moved < 0 else GroupedJob(words, address, moved)


def overlaps(job: GroupedJob, groups: list[list[Any]], itemsize: int) -> bool:
    """Return whether two of the arrays overlap; ``itemsize`` is that of the runner's elements."""
    count, width = len(groups), len(groups[0])
    tables_offset = _ITEMS_OFFSET + ITEM_WORDS * count
    items = job.words[_ITEMS_OFFSET:tables_offset].reshape(count, ITEM_WORDS)
    starts = job.words[tables_offset : tables_offset + count * width]
    nbytes = np.repeat(items[:, _LENGTH] * itemsize, width)
    order = np.argsort(starts)
    starts = starts[order]
    return bool((starts[1:] - starts[:-1] < nbytes[order][:-1]).any())


@jit.njit("int64(int64, int64, int64, int64, int64, int64)")
def _fill(groups, recipe_address, job_address, num_entries, constants, counters):  # type: ignore[no-untyped-def]
    """Fill all of a job but its row and constants; return the bytes that it moves, or -1."""
    job, facts = job_layout.job_at(job_address), recipe.recipe_at(recipe_address)
    count = array_structs.length_of(groups)
    width = array_structs.length_of(array_structs.item_of(groups, 0))
    job.num_items = count
    job.num_rows = job.num_parts = 1
    job.rows = job_address + 8 * HEADER_WORDS
    job.items = job_address + 8 * _ITEMS_OFFSET
    job.constants = constants
    job.counters = counters
    num_read_only = job_layout.row_at(job.rows, 0).first_target
    tables = job.items + 8 * ITEM_WORDS * count
    total = np.int64(0)
    for k in range(count):
        group = array_structs.item_of(groups, k)
        if array_structs.length_of(group) != width:
            return -1
        item = job_layout.item_at(job.items, k)
        item.num_lines = 1
        item.table = tables + 8 * k * num_entries
        item.length = array_structs.read_addresses(group, facts, item.table, num_read_only)
        if item.length < 0:
            return -1
        total += item.length
    moved = total * facts.itemsize * (2 * width - num_read_only)
    recipe.cut(job, facts, total, num_entries, moved)
    job.in_memory = np.int64(moved >= PREFETCHED_NBYTES)
    num_pieces = np.int64(0)
    for k in range(count):
        item = job_layout.item_at(job.items, k)
        item.first_piece = num_pieces
        num_pieces += -(-item.length // job.piece_length)
    job.num_pieces = num_pieces
    # Small arrays are claimed many at once: a claim costs as much as the sum of 1 KiB.
    is_shared = moved >= facts.shared_nbytes
    job.pieces_per_claim = max(1, num_pieces // 64 if is_shared else num_pieces)
    return moved
