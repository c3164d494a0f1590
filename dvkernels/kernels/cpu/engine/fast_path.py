"""Fast path: lists of NumPy arrays, reduced in place or into others, or around a ring in place.

The Python of a call (checks, addresses, job: 5 us) takes longer than the sum of 64 KiB. So
compiled code reads the arrays' structs (see array_structs.py) and fills a job that is reused by
later calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import types

from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import (
    array_structs,
    intrinsics,
    job_layout,
    recipe,
    records,
    thread_pool,
)
from dvkernels.kernels.cpu.engine.job_layout import (
    COUNTER_WORDS,
    HEADER_WORDS,
    ITEM_WORDS,
    MOST_QUEUES,
    ROW_WORDS,
    STREAMED_NBYTES,
    Item,
    JobHeader,
    Row,
)

__all__: list[str] = []


MOST_ARRAYS = 64
# Up to this size a call keeps the GIL: 2 us, less than releasing it may cost.
_SHORT_NBYTES = 256 * 1024
_DECLINED, _DONE = -1, -2


class _Fill(NamedTuple):
    """What a job was filled for: a call that is alike writes no line that helpers have read."""

    recipe: int
    num_arrays: int
    num_sources: int
    length: int
    segment_nbytes: int


_fill_at = records.view(records.layout(_Fill))
_FILL_OFFSET = (1 + MOST_QUEUES) * records.LINE_NBYTES  # behind the counters


@jit.njit("int64(int64, int64, int64, int64, int64)")
def _prepare(views, recipe_address, job_address, num_sources, segment_nbytes):  # type: ignore[no-untyped-def]
    """Fill the job that reduces the first arrays of a list, and run it if it is short.

    The targets are the other arrays, or, if there are none, the sources. A job in place may go
    around a ring, in segments of ``segment_nbytes`` (0: it is direct). Return the bytes that the
    job moves, for the caller to run it, or _DONE, or _DECLINED.
    """
    count = array_structs.length_of(views)
    if num_sources < 1 or count > MOST_ARRAYS:
        return _DECLINED
    has_targets = count > num_sources
    num_targets = count - num_sources if has_targets else count
    num_read_only = num_sources if has_targets else 0
    job, constants = job_layout.job_at(job_address), recipe.recipe_at(recipe_address)
    fill = _fill_at(job.counters + _FILL_OFFSET)
    table = job_layout.item_at(job.items, 0).table
    length = array_structs.read_addresses(views, constants, table, num_read_only)
    if length < 0:
        return _DECLINED
    nbytes = length * constants.itemsize
    for k in range(num_read_only, count):
        start = intrinsics.load(table, k)
        for other in range(k):
            if abs(start - intrinsics.load(table, other)) < nbytes:
                return _DECLINED  # two arrays overlap
    moved = (num_sources + num_targets) * nbytes
    is_ring = segment_nbytes > 0
    if is_ring:
        for k in range(count - 1):  # row k starts at rank k: see ring.py
            intrinsics.set_word(table, count + k, intrinsics.load(table, k))
    if (
        fill.recipe != recipe_address
        or fill.num_arrays != count
        or fill.num_sources != num_sources
        or fill.length != length
        or fill.segment_nbytes != segment_nbytes
    ):
        fill.recipe, fill.num_arrays, fill.num_sources = recipe_address, count, num_sources
        fill.length, fill.segment_nbytes = length, segment_nbytes
        recipe.cut(job, constants, length, count, moved)
        job.in_memory = 2 if has_targets and moved >= STREAMED_NBYTES else 0
        job_layout.item_at(job.items, 0).length = length
        job.num_rows = job.num_parts = count if is_ring else 1
        if is_ring:
            job.piece_length = segment_nbytes // constants.itemsize
            job.num_arrays = 2 * count - 1
        for k in range(job.num_rows):
            row = job_layout.row_at(job.rows, k)
            row.part = k if is_ring else -1
            row.first_source = k
            row.num_sources = num_sources
            row.first_target = k + num_read_only
            row.num_targets = num_targets
            row.divisor = num_sources if constants.is_mean else 1
        job.num_pieces = -(-length // job.piece_length)
    for k in range(1 + job.num_queues):
        job_layout.counter_at(job.counters, k).value = 0
    if moved <= _SHORT_NBYTES:
        intrinsics.call(constants.runner, job_address)
        return _DONE
    return moved


# The function behind the dispatcher: a call takes 0.1 us less, for its arguments are integers.
_prepare_now = _prepare.get_overload((types.int64,) * 5)


def new_job(table_length: int, num_rows: int = 1) -> tuple[HostArray, int]:
    """Return the words, not yet filled, of a job of one item and some rows, and their address."""
    rows_offset = HEADER_WORDS + ITEM_WORDS
    table_offset = rows_offset + ROW_WORDS * num_rows
    counters_offset = job_layout.counters_after(table_offset + table_length)
    words = intrinsics.words(counters_offset + COUNTER_WORDS * (1 + MOST_QUEUES + 1))
    address = checks.address(words)
    items, rows, table, counters = (
        address + 8 * offset
        for offset in (HEADER_WORDS, rows_offset, table_offset, counters_offset)
    )
    words[:table_offset] = (
        *JobHeader(items=items, rows=rows, counters=counters),
        *Item(num_lines=1, table=table),
        *(Row() * num_rows),
    )
    return words, address


_free_jobs: list[tuple[HostArray, int]] = []


def all_reduce(buffers: Any, op: Any, segment_nbytes: int = 0) -> list[Any] | None:
    """Reduce in place, around a ring if given its segments, else directly; None: declined."""
    try:
        found = recipe.recipes[op, buffers[0].dtype]
    except (KeyError, TypeError, AttributeError, IndexError):
        return None
    views = [*buffers]
    return views if _reduce(views, found, len(views), segment_nbytes) else None


def reduce_into(sources: Any, targets: Any, op: Any) -> bool:
    """Reduce the sources into every target by the direct algorithm; False: declined."""
    try:
        found = recipe.recipes[op, sources[0].dtype]
    except (KeyError, TypeError, AttributeError, IndexError):
        return False
    return _reduce([*sources, *targets], found, len(sources), 0)


def _reduce(views: list[Any], found: recipe.Recipe, num_sources: int, segment_nbytes: int) -> bool:
    try:
        job = _free_jobs.pop()
    except IndexError:
        job = new_job(2 * MOST_ARRAYS, MOST_ARRAYS)
    moved = _prepare_now(id(views), found.address, job[1], num_sources, segment_nbytes)
    if moved > 0:
        thread_pool.execute(job[0], job[1], moved)
    _free_jobs.append(job)
    return bool(moved != _DECLINED)
