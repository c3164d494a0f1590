"""Jobs of any arrays: the items that they consist of, laid out as job_layout.py says, and run."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.custom_reduction import CustomReduction
from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import arithmetic, checks
from dvkernels.kernels.cpu.engine import custom, intrinsics, loops, thread_pool
from dvkernels.kernels.cpu.engine.job_layout import (
    COUNTER_WORDS,
    HEADER_WORDS,
    ITEM_WORDS,
    MOST_QUEUES,
    PIECE_NBYTES,
    ROW_WORDS,
    STREAMED_NBYTES,
    JobHeader,
    Row,
    counters_after,
    first_counter,
)
from dvkernels.kernels.strides import merge_axes
from dvkernels.reduce_op import ReduceOp, Reduction

__all__: list[str] = []

_BYTE = np.dtype(np.int8)
_LINE = 128  # bytes of an iteration of the vector loop
_SHORT_NBYTES = 64  # shorter lines take longer to locate than to copy
_MANY_ITEMS = 4096


class Program(NamedTuple):
    """Program of a job: the rows to run on the arrays of each item, named by their positions."""

    rows: tuple[Row, ...]
    table: tuple[int, ...]  # position of the array of each entry of the table
    num_reads: int  # arrays before this position are read
    first_write: int  # arrays from this position on are written
    num_parts: int = 1


@functools.lru_cache(maxsize=256)
def combine(num_sources: int, num_targets: int, divisor: int = 1) -> Program:
    """Return the program that combines the first arrays of an item, and stores to the others."""
    row = Row(-1, 0, num_sources, num_sources, num_targets, divisor)
    return Program((row,), tuple(range(num_sources + num_targets)), num_sources, num_sources)


@functools.lru_cache(maxsize=256)
def combine_in_place(count: int, divisor: int) -> Program:
    """Return the program that combines all arrays of an item, and stores to all of them."""
    return Program((Row(-1, 0, count, 0, count, divisor),), tuple(range(count)), count, 0)


def divisor(op: Reduction, num_replicas: int) -> int:
    """Return the divisor of a reduction: the number of replicas for a mean, else 1."""
    return num_replicas if op is ReduceOp.MEAN else 1


class _Lines(NamedTuple):
    """Lines of contiguous elements, each at a constant stride from the one before it."""

    length: int
    num_lines: int
    addresses: Sequence[int]
    strides: Sequence[int]


def move(groups: Sequence[Sequence[HostArray]]) -> None:
    """Copy the bytes of the first array of each group to all others, whatever the dtype."""
    # The sum of one source is a copy, so the runner of int8 sums copies the bytes of every dtype.
    run(ReduceOp.SUM, _BYTE, groups, combine(1, len(groups[0]) - 1))


def run(
    op: Reduction,
    dtype: np.dtype[Any],
    groups: Sequence[Sequence[HostArray]],
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
    items: list[_Lines] = []
    copies: list[tuple[HostArray, HostArray]] = []
    staged_groups: list[list[HostArray]] = []  # kept alive: a job holds addresses only
    moved = 0  # bytes
    size = dtype.itemsize // arithmetic.factor(op, dtype)  # bytes of the runner's elements
    for arrays in groups:
        first = arrays[0]
        moved += first.nbytes * (program.num_reads + len(arrays) - program.first_write)
        if not all(array.flags.c_contiguous for array in arrays):
            lines = [*_lines(arrays, size)]
            if lines:
                items += lines
                continue
            arrays = _stage(arrays, program, copies)
            staged_groups.append(arrays)
        items.append(_Lines(first.nbytes // size, 1, [*map(checks.address, arrays)], ()))
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


def lay_out_sum(buffers: Sequence[HostArray], piece_length: int, runner: int) -> HostArray:
    """Return the job that sums contiguous buffers in place, in pieces of ``piece_length``."""
    item = _Lines(buffers[0].size, 1, [*map(checks.address, buffers)], ())
    program = combine_in_place(len(buffers), 1)
    return _lay_out([item], program, piece_length, thread_pool.SHARED_NBYTES, runner, ())


def _in_memory(moved: int, program: Program) -> int:
    """Return the argument ``in_memory`` of ``span`` for a job that moves so many bytes."""
    # A store to a line that is in no cache reads it first, unless it is a streaming store. With
    # new results (4 replicas of 64 MiB) a broadcast reached 0.59 of the memory bandwidth and an
    # all-reduce with out 0.66; with streaming stores 0.77 and 0.86 (medians of 9, 2 cores of an
    # AMD EPYC, 2026-11).
    is_new = program.first_write == program.num_reads
    return 2 * (is_new and moved >= STREAMED_NBYTES)


def _lay_out(
    items: Sequence[_Lines],
    program: Program,
    piece_length: int,
    moved: int,
    runner: int,
    constants: Sequence[float],
) -> HostArray:
    """Return the words of a job."""
    table = program.table
    rows_offset = HEADER_WORDS + ITEM_WORDS * len(items)
    tables_offset = rows_offset + ROW_WORDS * len(program.rows)
    num_tables = sum([2 if item.num_lines > 1 else 1 for item in items])  # addresses, strides
    constants_offset = tables_offset + len(table) * num_tables
    counters_offset = counters_after(constants_offset + len(constants))
    # One queue where one thread runs the job, else one for each thread.
    is_shared = moved >= thread_pool.SHARED_NBYTES
    num_queues = min(thread_pool.num_threads(), MOST_QUEUES) if is_shared else 1
    words = intrinsics.words(counters_offset + COUNTER_WORDS * (1 + num_queues))
    address = checks.address(words)
    num_pieces = 0
    content: list[int] = []
    tables: list[int] = []
    for length, num_lines, addresses, strides in items:
        content += (num_pieces, length, num_lines, address + 8 * (tables_offset + len(tables)))
        tables += [addresses[k] for k in table]
        if num_lines > 1:
            tables += [strides[k] for k in table]
        lines = max(1, piece_length // max(1, length))
        num_pieces += -(-length // piece_length) * -(-num_lines // lines)
    for row in program.rows:
        content += row
    grain = max(1, min(64, num_pieces // 64))
    # Without the names of the fields: they take 2 us.
    header = JobHeader(
        num_pieces, grain, piece_length, len(items), len(program.rows), len(table),
        program.num_parts, num_queues, _in_memory(moved, program), runner,
        address + 8 * HEADER_WORDS, address + 8 * rows_offset, address + 8 * constants_offset,
        address + 8 * counters_offset,
    )  # fmt: skip
    words[:constants_offset] = [*header, *content, *tables]
    if constants:
        words[constants_offset : constants_offset + len(constants)].view(np.float64)[:] = constants
    return words


def rewind(words: HostArray) -> None:
    """Make a job that has run ready to run again."""
    words[first_counter(words, checks.address(words)) :] = 0


def _lines(arrays: Sequence[HostArray], size: int) -> Iterator[_Lines]:
    """Yield the items that make up a group of arrays; none where its lines are short or many."""
    itemsize = arrays[0].itemsize
    axes = merge_axes(arrays)
    length = 1
    if axes and all(stride == itemsize for stride in axes[-1][1]):
        length = axes.pop()[0]
    if length * itemsize < _SHORT_NBYTES:
        return
    num_lines, strides = axes.pop() if axes else (1, (0,) * len(arrays))
    if math.prod(extent for extent, _ in axes) > _MANY_ITEMS:
        return
    starts = [*map(checks.address, arrays)]
    for index in np.ndindex(*(extent for extent, _ in axes)):
        addresses = [
            start + sum(i * outer[k] for i, (_, outer) in zip(index, axes, strict=True))
            for k, start in enumerate(starts)
        ]
        yield _Lines(length * itemsize // size, num_lines, addresses, strides)


def _stage(
    arrays: Sequence[HostArray], program: Program, copies: list[tuple[HostArray, HostArray]]
) -> list[HostArray]:
    """Return contiguous copies of a group of arrays; append the copies to be made at the end."""
    staged: list[HostArray] = []
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
