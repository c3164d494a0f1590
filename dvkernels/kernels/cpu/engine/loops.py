"""Compiled reduction loops: combine the elements of all sources, left to right, store to targets.

There is one runner for each pair of an operation and an element type: a C function of the address
of a job (see job_layout.py). A runner claims pieces of the job until none is left, so any number of
threads may call it at once; pieces share no element, so no thread waits for another, and the bits
depend on the job alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types

from dvkernels.kernels import arithmetic, jit
from dvkernels.kernels.cpu.engine import intrinsics, job_layout
from dvkernels.kernels.cpu.engine.span import span
from dvkernels.reduce_op import ReduceOp

__all__: list[str] = []


class _Place(NamedTuple):
    """Place of a thread in a job: stretches of lines of an item, one line after another."""

    first: int  # element of a line
    length: int  # of the stretch
    line: int
    end_of_lines: int
    table: int
    piece: int
    end_of_pieces: int  # that the thread has claimed
    attempt: int
    ordinal: int  # of the thread


@jit.njit(nogil=True)
def join(job):  # type: ignore[no-untyped-def]
    """Return the place of a thread that joins a job, before its first line."""
    ordinal = intrinsics.fetch_add(job_layout.counter_at(job.counters, 0), "value", 1)
    return _Place(0, 0, 0, 0, 0, 0, 0, 0, ordinal)


@jit.njit(nogil=True, forceinline=True)  # it has many arguments, and one call in each runner
def advance(job, at, addresses):  # type: ignore[no-untyped-def]
    """Return the place of a thread's next line, of length -1 where none is left.

    The addresses of the line in each array of the item are written to ``addresses``.
    """
    first, length, line, end_of_lines, table, piece, end_of_pieces, attempt, ordinal = at
    line += 1
    if line >= end_of_lines:
        piece += 1
        if piece >= end_of_pieces:
            attempt, piece, end_of_pieces = claim(job, ordinal, attempt)
            if end_of_pieces == 0:
                length = np.int64(-1)
        if length >= 0:
            table, first, length, line, end_of_lines = _locate(job, piece)
    if length >= 0:
        for k in range(job.num_arrays):
            shift = line * intrinsics.load(table, job.num_arrays + k) if line > 0 else 0
            intrinsics.store(addresses, k, intrinsics.load(table, k) + shift)
    return _Place(first, length, line, end_of_lines, table, piece, end_of_pieces, attempt, ordinal)


@jit.njit(nogil=True)
def claim(job, ordinal, attempt):  # type: ignore[no-untyped-def]
    """Claim pieces for a thread; return its attempt, the first piece, and the end (0: none left).

    A thread begins with the queue of its own number, so that repeated calls find their data in the
    cache of the same core; then it helps in the others. Two replicas of 1 MiB took 23 us with
    pieces claimed from one counter and take 11 us so, of 4 MiB 105 and 51 (2 cores of an AMD EPYC,
    1 MiB of cache each, 2026-11).
    """
    num_pieces, num_queues, grain = job.num_pieces, job.num_queues, job.pieces_per_claim
    while attempt < num_queues:
        queue = (ordinal + attempt) % num_queues
        first, last = num_pieces * queue // num_queues, num_pieces * (queue + 1) // num_queues
        claimed = job_layout.counter_at(job.counters, 1 + queue)
        begin = first + intrinsics.fetch_add(claimed, "value", grain)
        if begin < last:
            return attempt, begin, min(begin + grain, last)
        attempt += 1
    return attempt, np.int64(0), np.int64(0)


@jit.njit(nogil=True)
def _locate(job, piece):  # type: ignore[no-untyped-def]
    """Return a piece's table, first element and length in a line, first line and end of lines.

    The piece belongs to the last item whose first piece is not behind it.
    """
    low, high = 0, job.num_items
    while high - low > 1:
        middle = (low + high) // 2
        if job_layout.item_at(job.items, middle).first_piece <= piece:
            low = middle
        else:
            high = middle
    item, piece_length = job_layout.item_at(job.items, low), job.piece_length
    blocks = max(1, -(-item.length // piece_length))  # of a line
    lines = max(1, piece_length // max(1, item.length))  # of a piece
    number = piece - item.first_piece
    first = number % blocks * piece_length
    line = number // blocks * lines
    end_of_lines = min(line + lines, item.num_lines)
    return item.table, first, min(piece_length, item.length - first), line, end_of_lines


@jit.njit(nogil=True)
def part(length, num_parts, k):  # type: ignore[no-untyped-def]
    """Return the start and the length of part ``k``, as schedules/partition.py splits a length."""
    small = length // num_parts
    num_larger = length - small * num_parts
    return k * small + min(k, num_larger), small + np.int64(k < num_larger)


@jit.njit(nogil=True)
def extent(job, row, at):  # type: ignore[no-untyped-def]
    """Return the first element and the number of elements that a row combines at a place."""
    if row.part < 0:
        return at.first, at.length
    start, count = part(at.length, job.num_parts, row.part)
    return at.first + start, count


def _make(operation: int, code: int) -> Any:
    """Compile a runner; the compile cache distinguishes these closures by their free variables."""

    @jit.cfunc(types.void(types.int64))
    def run(address):  # type: ignore[no-untyped-def]
        job = job_layout.job_at(address)
        scratch = np.empty(job.num_arrays, np.int64)
        table = intrinsics.address_of(scratch)
        at = join(job)
        while True:
            at = advance(job, at, table)
            if at.length < 0:
                break
            for k in range(job.num_rows):
                row = job_layout.row_at(job.rows, k)
                first, count = extent(job, row, at)
                span(
                    table, row.first_source, row.num_sources, row.first_target, row.num_targets,
                    row.divisor, first, count, job.in_memory, operation, code,
                )  # fmt: skip
        intrinsics.keep_alive(scratch)

    return run


_runners: dict[tuple[int, int], Any] = {}
_by_dtype: dict[tuple[ReduceOp, np.dtype[Any]], tuple[int, int]] = {}


def runner(op: ReduceOp, dtype: np.dtype[Any]) -> int:
    """Return the address of the runner of ``op`` over ``dtype``, compiled if need be.

    The runner counts elements, for a complex sum the floats: see :func:`arithmetic.factor`.
    """
    key = _by_dtype.get((op, dtype))
    if key is None:
        key = _by_dtype[op, dtype] = (
            arithmetic.operation_code(op),
            arithmetic.type_code(dtype, op),
        )
    found = _runners.get(key)
    if found is None:
        found = _runners[key] = _make(*key)
    address: int = found.address
    return address
