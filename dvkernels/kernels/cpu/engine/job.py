"""A job: which arrays a runner combines, laid out as int64 words that compiled code reads.

    [0] threads that have begun
    [8] pieces   [9] pieces claimed at once   [10] elements of a line that one piece holds
    [11] items   [12] where they are          [13] where the program is   [14] its rows
    [15] where the data lies: see elementwise.span    [16] arrays an item
    [17] parts that the rows name             [18] the runner   [19] where its numbers are
    [20] where the counters of claimed pieces are   [21] how many: one a segment of the pieces
    [22] the slot of the pool that holds it, and one; 0: none
    items, four words each: first piece, elements a line, lines, where the table is
    the program, six words a row: part (-1: all), sources, how many, targets, how many, divisor
    tables, one an item: the addresses of its arrays, then, of several lines, their strides
    float64 numbers that the runner needs
    counters, each at the head of 64 bytes that nothing else lies in

An item is a set of arrays of one shape that are dense, or lines of dense elements at even
distances. Items are cut into pieces; a thread runs all rows of the program over its piece.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.custom_reduction import CustomReduction
from dvkernels.kernels import arithmetic, checks
from dvkernels.kernels import strides as walks
from dvkernels.kernels.cpu.engine import custom, intrinsics, loops, thread_pool
from dvkernels.reduce_op import ReduceOp, Reduction

__all__ = [
    "FAR_NBYTES",
    "HEADER",
    "MOST_SEGMENTS",
    "PIECE_NBYTES",
    "Program",
    "combine",
    "combine_in_place",
    "divisor",
    "lay_out_sum",
    "move",
    "run",
]

Array = np.ndarray[Any, Any]

HEADER = 24
# Pieces are handed out dynamically: small enough that the last one is short (256 KiB a replica
# is 20 us), large enough that one claim (50 ns) and the restart of the prefetcher vanish.
PIECE_NBYTES = 512 * 1024
FAR_NBYTES = 64 * 1024 * 1024  # beyond the last cache of most machines (32 MiB on that one)
_BYTE = np.dtype(np.int8)
_LINE = 128  # bytes that one turn of the vector loop moves
_SHORT_NBYTES = 64  # shorter lines cost more to find than to copy
_MANY_ITEMS = 4096
MOST_SEGMENTS = 16


class Program(NamedTuple):
    """What to do with the arrays of each item; arrays by their position in the item."""

    rows: tuple[tuple[int, int, int, int, int, int], ...]
    table: tuple[int, ...]  # which array each entry of the table is
    num_reads: int  # the arrays before this one are read
    first_write: int  # the arrays from this one on are written
    num_parts: int = 1


@functools.lru_cache(maxsize=256)
def combine(num_sources: int, num_targets: int, divisor: int = 1) -> Program:
    """Combine the first arrays of an item, and store to the others."""
    row = (-1, 0, num_sources, num_sources, num_targets, divisor)
    return Program((row,), tuple(range(num_sources + num_targets)), num_sources, num_sources)


@functools.lru_cache(maxsize=256)
def combine_in_place(count: int, divisor: int) -> Program:
    """Combine all arrays of an item, and store to all of them."""
    return Program(((-1, 0, count, 0, count, divisor),), tuple(range(count)), count, 0)


def divisor(op: Reduction, num_replicas: int) -> int:
    """Return what a runner divides by."""
    return num_replicas if op is ReduceOp.MEAN else 1


class _Item(NamedTuple):
    length: int
    num_lines: int
    addresses: Sequence[int]
    strides: Sequence[int]


def move(groups: Sequence[Sequence[Array]]) -> None:
    """Copy the first array of each group to all others: bytes, whatever the dtype."""
    # The sum of one source is a copy, so the runner of int8 sums moves the bytes of every dtype.
    run(ReduceOp.SUM, _BYTE, groups, combine(1, len(groups[0]) - 1))


def run(
    op: Reduction,
    dtype: np.dtype[Any],
    groups: Sequence[Sequence[Array]],
    program: Program,
    *,
    piece_nbytes: int = 0,
    runner: int = 0,
    numbers: Sequence[float] = (),
) -> None:
    """Run ``program`` over each group of arrays; ``dtype`` is what its elements are computed as.

    ``piece_nbytes`` fixes the size of a piece where the bits depend on it. ``runner`` is the
    address of another runner than that of ``op``, and ``numbers`` what it needs to know.
    """
    items: list[_Item] = []
    copies: list[tuple[Array, Array]] = []
    stand_ins: list[list[Array]] = []  # kept alive: a job knows addresses only
    moved = 0
    size = dtype.itemsize // arithmetic.factor(op, dtype)  # bytes of the runner's elements
    for arrays in groups:
        first = arrays[0]
        moved += first.nbytes * (program.num_reads + len(arrays) - program.first_write)
        if all(array.flags.c_contiguous for array in arrays):
            items.append(_Item(first.nbytes // size, 1, [*map(checks.address, arrays)], ()))
            continue
        laid = [*_lines(arrays, size)]
        if not laid or len(laid) > _MANY_ITEMS or laid[0].length * size < _SHORT_NBYTES:
            stand_ins.append(_stage(arrays, program, copies))
            laid = [_Item(first.nbytes // size, 1, [*map(checks.address, stand_ins[-1])], ())]
        items += laid
    width = len(groups[0])
    if piece_nbytes:
        longest = max(1, piece_nbytes // size)
    elif moved < thread_pool.SHARED_NBYTES:
        longest = max(1, *(item.length * item.num_lines for item in items), 1)
    else:
        wanted = max(4096, min(PIECE_NBYTES // width, moved // (8 * width)))
        longest = max(1, (wanted & -_LINE) // size)
    if type(op) is CustomReduction:
        runner = custom.runner(op, dtype)
    elif type(op) is ReduceOp:
        runner = runner or loops.runner(op, dtype)
    job = _lay_out(items, program, longest, moved, runner, numbers)
    thread_pool.execute(job, checks.address(job), moved, copies)


def lay_out_sum(buffers: Sequence[Array], longest: int, runner: int) -> Array:
    """Return the job that sums dense buffers in place, in pieces of ``longest`` elements."""
    item = _Item(buffers[0].size, 1, [*map(checks.address, buffers)], ())
    program = combine_in_place(len(buffers), 1)
    return _lay_out([item], program, longest, thread_pool.SHARED_NBYTES, runner, ())


def _far(moved: int, program: Program) -> int:
    """Return where the data lies, as ``elementwise.span`` wants to know it."""
    if moved < FAR_NBYTES // 2:
        return 0
    # A store to memory that is in no cache reads the line first, unless it is streamed. Of new
    # results (4 replicas of 64 MiB) that is 0.59 of the byte limit for a broadcast, 0.66 for an
    # all-reduce with out; streamed 0.77 and 0.86 (medians of 9, 2 cores of an AMD EPYC, 2026-11).
    if program.first_write == program.num_reads:
        return 2
    return int(moved >= FAR_NBYTES)


def _lay_out(
    items: Sequence[_Item],
    program: Program,
    longest: int,
    moved: int,
    runner: int,
    numbers: Sequence[float],
) -> Array:
    """Return the words of a job."""
    table, rows = program.table, program.rows
    where_items = HEADER
    where_program = where_items + 4 * len(items)
    where_table = where_program + 6 * len(rows)
    records: list[int] = []
    tables: list[int] = []
    num_pieces = 0
    for length, num_lines, addresses, strides in items:
        records += (num_pieces, length, num_lines, where_table + len(tables))
        tables += [addresses[k] for k in table]
        if num_lines > 1:
            tables += [strides[k] for k in table]
        lines = max(1, longest // max(1, length))
        num_pieces += -(-length // longest) * -(-num_lines // lines)
    grain = max(1, min(64, num_pieces // 64))
    where_numbers = where_table + len(tables)
    # Where one thread will run the job, one segment; else one for each thread.
    num_segments = (
        min(thread_pool.num_threads(), MOST_SEGMENTS) if moved >= thread_pool.SHARED_NBYTES else 1
    )
    where_counters = -(-(where_numbers + len(numbers)) // 8) * 8
    job = intrinsics.words(where_counters + 8 * num_segments)
    job[8:22] = (
        num_pieces, grain, longest, len(items), where_items, where_program, len(rows),
        _far(moved, program), len(table), program.num_parts, runner, where_numbers,
        where_counters, num_segments,
    )  # fmt: skip
    job[where_items:where_numbers] = [*records, *(word for row in rows for word in row), *tables]
    job[where_numbers : where_numbers + len(numbers)].view(np.float64)[:] = numbers
    return job


def _lines(arrays: Sequence[Array], size: int) -> Iterator[_Item]:
    """Yield the items that a group of arrays consists of; none if its elements lie apart."""
    itemsize = arrays[0].itemsize
    axes = walks.merge(arrays)
    length = 1
    if axes and all(stride == itemsize for stride in axes[-1][1]):
        length = axes.pop()[0]
    if length * itemsize < _SHORT_NBYTES:
        return
    num_lines, strides = axes.pop() if axes else (1, (0,) * len(arrays))
    starts = [*map(checks.address, arrays)]
    for index in np.ndindex(*(extent for extent, _ in axes)):
        addresses = [
            start + sum(i * outer[k] for i, (_, outer) in zip(index, axes, strict=True))
            for k, start in enumerate(starts)
        ]
        yield _Item(length * itemsize // size, num_lines, addresses, strides)


def _stage(
    arrays: Sequence[Array], program: Program, copies: list[tuple[Array, Array]]
) -> list[Array]:
    """Return dense stand-ins for a group of arrays, and note the copies due at the end."""
    staged: list[Array] = []
    for index, array in enumerate(arrays):
        is_read, is_written = index < program.num_reads, index >= program.first_write
        if is_read and is_written:
            stand_in = np.array(array, order="C")
        else:
            stand_in = (
                np.ascontiguousarray(array) if is_read else np.empty(array.shape, array.dtype)
            )
        staged.append(stand_in.reshape(array.shape))
        if is_written:
            copies.append((array, stand_in))
    return staged
