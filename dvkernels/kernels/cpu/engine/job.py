"""Job of a runner: the arrays to combine and the program, as int64 words for compiled code.

    [0] number of threads that have joined
    [8] pieces   [9] pieces per claim         [10] most elements of a line in a piece
    [11] items   [12] offset of the items     [13] offset of the program   [14] its rows
    [15] in_memory of loops.span              [16] arrays per item
    [17] parts that the rows refer to         [18] address of the runner
    [19] offset of its constants
    [20] offset of the counters of claimed pieces   [21] their number, that of segments of pieces
    [22] slot of the thread pool that holds the job, plus one; 0: none
    items, four words each: first piece, elements per line, lines, offset of the table
    program, six words per row: part (-1: all), first source, sources, first target, targets,
        divisor
    tables, one per item: the addresses of its arrays, then, of several lines, their strides
    float64 constants of the runner
    counters, each alone on a cache line

Offsets count words from the start of the job. An item is a set of arrays of one shape that are
contiguous, or lines of contiguous elements at a constant stride. Items are split into pieces; a
thread runs all rows of the program over its piece.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.custom_reduction import CustomReduction
from dvkernels.kernels import arithmetic, checks
from dvkernels.kernels.cpu.engine import custom, intrinsics, loops, thread_pool
from dvkernels.kernels.strides import merge_axes
from dvkernels.reduce_op import ReduceOp, Reduction

__all__ = [
    "HEADER",
    "MOST_SEGMENTS",
    "OUT_OF_CACHE_NBYTES",
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
# Pieces are claimed dynamically: small enough that the last one is short (256 KiB a replica takes
# 20 us), large enough that a claim (50 ns) and the restart of the prefetcher are negligible.
PIECE_NBYTES = 512 * 1024
# Larger than the last-level cache of most machines (32 MiB on an AMD EPYC).
OUT_OF_CACHE_NBYTES = 64 * 1024 * 1024
_BYTE = np.dtype(np.int8)
_LINE = 128  # bytes of an iteration of the vector loop
_SHORT_NBYTES = 64  # shorter lines take longer to locate than to copy
_MANY_ITEMS = 4096
MOST_SEGMENTS = 16


class Program(NamedTuple):
    """Program of a job: the rows to run on the arrays of each item, named by their positions."""

    rows: tuple[tuple[int, int, int, int, int, int], ...]
    table: tuple[int, ...]  # position of the array of each entry of the table
    num_reads: int  # arrays before this position are read
    first_write: int  # arrays from this position on are written
    num_parts: int = 1


@functools.lru_cache(maxsize=256)
def combine(num_sources: int, num_targets: int, divisor: int = 1) -> Program:
    """Return the program that combines the first arrays of an item, and stores to the others."""
    row = (-1, 0, num_sources, num_sources, num_targets, divisor)
    return Program((row,), tuple(range(num_sources + num_targets)), num_sources, num_sources)


@functools.lru_cache(maxsize=256)
def combine_in_place(count: int, divisor: int) -> Program:
    """Return the program that combines all arrays of an item, and stores to all of them."""
    return Program(((-1, 0, count, 0, count, divisor),), tuple(range(count)), count, 0)


def divisor(op: Reduction, num_replicas: int) -> int:
    """Return the divisor of a reduction: the number of replicas for a mean, else 1."""
    return num_replicas if op is ReduceOp.MEAN else 1


class _Item(NamedTuple):
    length: int
    num_lines: int
    addresses: Sequence[int]
    strides: Sequence[int]


def move(groups: Sequence[Sequence[Array]]) -> None:
    """Copy the bytes of the first array of each group to all others, whatever the dtype."""
    # The sum of one source is a copy, so the runner of int8 sums copies the bytes of every dtype.
    run(ReduceOp.SUM, _BYTE, groups, combine(1, len(groups[0]) - 1))


def run(
    op: Reduction,
    dtype: np.dtype[Any],
    groups: Sequence[Sequence[Array]],
    program: Program,
    *,
    piece_nbytes: int = 0,
    runner: int = 0,
    constants: Sequence[float] = (),
) -> None:
    """Run ``program`` over each group of arrays, whose elements are combined as ``dtype``.

    ``piece_nbytes`` fixes the size of a piece where the bits depend on it. ``runner`` is the
    address of another runner than that of ``op``, and ``constants`` are its constants.
    """
    items: list[_Item] = []
    copies: list[tuple[Array, Array]] = []
    staged_groups: list[list[Array]] = []  # kept alive: a job holds addresses only
    moved = 0  # bytes
    size = dtype.itemsize // arithmetic.factor(op, dtype)  # bytes of the runner's elements
    for arrays in groups:
        first = arrays[0]
        moved += first.nbytes * (program.num_reads + len(arrays) - program.first_write)
        if all(array.flags.c_contiguous for array in arrays):
            items.append(_Item(first.nbytes // size, 1, [*map(checks.address, arrays)], ()))
            continue
        group_items = [*_lines(arrays, size)]
        if (
            not group_items
            or len(group_items) > _MANY_ITEMS
            or group_items[0].length * size < _SHORT_NBYTES
        ):
            staged_groups.append(_stage(arrays, program, copies))
            group_items = [
                _Item(first.nbytes // size, 1, [*map(checks.address, staged_groups[-1])], ())
            ]
        items += group_items
    width = len(groups[0])
    if piece_nbytes:
        piece_length = max(1, piece_nbytes // size)
    elif moved < thread_pool.SHARED_NBYTES:
        piece_length = max(1, *(item.length * item.num_lines for item in items), 1)
    else:
        target_nbytes = max(4096, min(PIECE_NBYTES // width, moved // (8 * width)))
        piece_length = max(1, (target_nbytes & -_LINE) // size)
    if type(op) is CustomReduction:
        runner = custom.runner(op, dtype)
    elif type(op) is ReduceOp:
        runner = runner or loops.runner(op, dtype)
    job = _lay_out(items, program, piece_length, moved, runner, constants)
    thread_pool.execute(job, checks.address(job), moved, copies)


def lay_out_sum(buffers: Sequence[Array], piece_length: int, runner: int) -> Array:
    """Return the job that sums contiguous buffers in place, in pieces of ``piece_length``."""
    item = _Item(buffers[0].size, 1, [*map(checks.address, buffers)], ())
    program = combine_in_place(len(buffers), 1)
    return _lay_out([item], program, piece_length, thread_pool.SHARED_NBYTES, runner, ())


def _in_memory(moved: int, program: Program) -> int:
    """Return the argument ``in_memory`` of ``loops.span`` for a job that moves so many bytes."""
    if moved < OUT_OF_CACHE_NBYTES // 2:
        return 0
    # A store to a line that is in no cache reads it first, unless it is a streaming store. With
    # new results (4 replicas of 64 MiB) a broadcast reached 0.59 of the memory bandwidth and an
    # all-reduce with out 0.66; with streaming stores 0.77 and 0.86 (medians of 9, 2 cores of an
    # AMD EPYC, 2026-11).
    if program.first_write == program.num_reads:
        return 2
    return int(moved >= OUT_OF_CACHE_NBYTES)


def _lay_out(
    items: Sequence[_Item],
    program: Program,
    piece_length: int,
    moved: int,
    runner: int,
    constants: Sequence[float],
) -> Array:
    """Return the words of a job."""
    table, rows = program.table, program.rows
    items_offset = HEADER
    program_offset = items_offset + 4 * len(items)
    tables_offset = program_offset + 6 * len(rows)
    records: list[int] = []
    tables: list[int] = []
    num_pieces = 0
    for length, num_lines, addresses, strides in items:
        records += (num_pieces, length, num_lines, tables_offset + len(tables))
        tables += [addresses[k] for k in table]
        if num_lines > 1:
            tables += [strides[k] for k in table]
        lines = max(1, piece_length // max(1, length))
        num_pieces += -(-length // piece_length) * -(-num_lines // lines)
    grain = max(1, min(64, num_pieces // 64))
    constants_offset = tables_offset + len(tables)
    # One segment where one thread runs the job, else one for each thread.
    num_segments = (
        min(thread_pool.num_threads(), MOST_SEGMENTS) if moved >= thread_pool.SHARED_NBYTES else 1
    )
    counters_offset = -(-(constants_offset + len(constants)) // 8) * 8
    job = intrinsics.words(counters_offset + 8 * num_segments)
    job[8:22] = (
        num_pieces, grain, piece_length, len(items), items_offset, program_offset, len(rows),
        _in_memory(moved, program), len(table), program.num_parts, runner, constants_offset,
        counters_offset, num_segments,
    )  # fmt: skip
    job[items_offset:constants_offset] = [
        *records,
        *(word for row in rows for word in row),
        *tables,
    ]
    job[constants_offset : constants_offset + len(constants)].view(np.float64)[:] = constants
    return job


def _lines(arrays: Sequence[Array], size: int) -> Iterator[_Item]:
    """Yield the items that make up a group of arrays; none where its lines are too short."""
    itemsize = arrays[0].itemsize
    axes = merge_axes(arrays)
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
    """Return contiguous copies of a group of arrays; append the copies to be made at the end."""
    staged: list[Array] = []
    for index, array in enumerate(arrays):
        is_read, is_written = index < program.num_reads, index >= program.first_write
        if is_read and is_written:
            dense = np.array(array, order="C")
        else:
            dense = np.ascontiguousarray(array) if is_read else np.empty(array.shape, array.dtype)
        staged.append(dense.reshape(array.shape))
        if is_written:
            copies.append((array, dense))
    return staged
