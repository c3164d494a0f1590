"""Row updates: rows of arrays changed in place by rows of updates, in the order of the indices.

Several updates of one row are applied one after another, so the bits depend on the order of the
indices alone. Threads share the rows, not the updates: a piece of the job is an owner, which reads
all indices and applies the updates of its own rows. Jobs of several callers on one array exclude
each other, by a lock that compiled code takes and gives back: no interrupt comes between.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import types

from dvkernels import deadlines, reduce_op
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import CollectiveTimeoutError
from dvkernels.kernels import arithmetic, checks, jit
from dvkernels.kernels.cpu.engine import intrinsics, job_layout, loops, records, thread_pool
from dvkernels.kernels.cpu.engine.job_layout import (
    COUNTER_WORDS,
    HEADER_WORDS,
    MOST_QUEUES,
    JobHeader,
    counters_after,
)
from dvkernels.kernels.cpu.engine.row_loop import REPLACE, apply_updates
from dvkernels.kernels.cpu.engine.thread_pool import NUM_LOCKS
from dvkernels.reduce_op import ReduceOp

__all__: list[str] = []

_OPERATIONS = {  # and a reduction of which the loops share types
    "scatter_update": (REPLACE, ReduceOp.MAX),
    "scatter_add": (arithmetic.ADD, ReduceOp.SUM),
    "scatter_sub": (arithmetic.SUB, ReduceOp.SUM),
    "scatter_mul": (arithmetic.MUL, ReduceOp.PROD),
    "scatter_div": (arithmetic.DIV, ReduceOp.MAX),
    "scatter_min": (arithmetic.MIN, ReduceOp.MIN),
    "scatter_max": (arithmetic.MAX, ReduceOp.MAX),
}
# Kinds of dtype: numpy.dtype.kind, "f" for bfloat16.
_KINDS = {arithmetic.MIN: "fiu", arithmetic.MAX: "fiu", arithmetic.DIV: "f"}
_BYTES = arithmetic.type_code(np.dtype(np.uint8))

# An owner selects its rows from so many indices at a time, then applies their updates.
_CHUNK = 512
# A job that has waited so long for its array, 1 to 3 ms, lets Python handle signals.
_LOCK_PAUSES = 65_536
# Neighbouring rows up to so many bytes have one owner, so that few cache lines have two.
_OWNED_NBYTES = 512


class RowWrite(NamedTuple):
    """Updates of rows of arrays: each array is changed as the first is, which holds the same."""

    arrays: Sequence[HostArray]  # contiguous
    indices: HostArray  # int64, of shape (n,), contiguous, each of a row
    updates: HostArray  # of shape (n, *row), of the dtype of the arrays, no memory of theirs


class _RowJob(NamedTuple):
    """Constants of a job."""

    row_nbytes: int
    divisor: int  # of the updates
    owner_shift: int  # row r belongs to owner (r >> owner_shift) & owner_mask
    owner_mask: int
    lock: int  # its address
    is_locked: int  # by this job
    num_done: int  # owners


class _ArrayLock(NamedTuple):
    is_taken: int


class _UpdateList(NamedTuple):
    """A write in memory."""

    indices: int  # addresses
    updates: int
    stride: int  # of the updates, in bytes
    length: int
    copies: int  # the address of the first of the arrays' addresses
    num_copies: int
    order: int  # the address of the positions in the order of :func:`grouped`, or 0


_ROW_JOB_WORDS, _LIST_WORDS = len(_RowJob._fields), len(_UpdateList._fields)
_row_job_at = records.view(records.layout(_RowJob))
_list_at = records.nth(records.layout(_UpdateList))
_lock_at = records.view(records.layout(_ArrayLock))
_IS_LOCKED = HEADER_WORDS + _RowJob._fields.index("is_locked")
_abandoned: list[Any] = []  # arrays that a stopped thread may still touch


def _make(operation: int, code: int) -> Any:
    """Compile a runner; the compile cache distinguishes these closures by their free variables."""

    @jit.cfunc(types.void(types.int64))
    def run(address):  # type: ignore[no-untyped-def]
        job = job_layout.job_at(address)
        row_job = _row_job_at(job.constants)
        shift, mask = row_job.owner_shift, row_job.owner_mask
        chunk = job.piece_length
        scratch = np.empty(chunk, np.int64)
        chosen = intrinsics.address_of(scratch)
        for i in range(chunk):
            intrinsics.store(chosen, i, i)
        ordinal = intrinsics.fetch_add(job_layout.counter_at(job.counters, 0), "value", 1)
        attempt = 0
        while _acquire(row_job, ordinal):
            attempt, owner, end_of_owners = loops.claim(job, ordinal, attempt)
            if end_of_owners == 0:
                break
            for k in range(job.num_items):
                given = _list_at(job.items, k)
                for first in range(0, given.length, chunk):
                    indices = given.indices + 8 * first
                    listed, count = chosen, min(chunk, given.length - first)
                    if mask != 0:
                        count = _choose(chosen, indices, given.order, count, shift, mask, owner)
                    elif given.order != 0:
                        listed = given.order
                    apply_updates(
                        given.copies, given.num_copies, indices,
                        given.updates + first * given.stride, given.stride, listed, count,
                        row_job.row_nbytes, row_job.divisor, np.int64(mask == 0), operation, code,
                    )  # fmt: skip
            if intrinsics.fetch_add(row_job, "num_done", 1) == job.num_pieces - 1:
                intrinsics.store_shared(_lock_at(row_job.lock), "is_taken", 0)
        intrinsics.keep_alive(scratch)

    return run


@jit.njit(nogil=True)
def _acquire(row_job, ordinal):  # type: ignore[no-untyped-def]
    """Let the first thread of a job take the lock; return whether the job has it."""
    turn = 0
    while intrinsics.load_shared(row_job, "is_locked") == 0:
        if ordinal == 0:
            if intrinsics.compare_exchange(_lock_at(row_job.lock), "is_taken", 0, 1) == 0:
                intrinsics.store_shared(row_job, "is_locked", 1)
            elif turn == _LOCK_PAUSES:
                intrinsics.store_shared(row_job, "is_locked", -1)
        turn += 1
        intrinsics.relax(turn)
    return intrinsics.load_shared(row_job, "is_locked") > 0


@jit.njit(nogil=True)
def _choose(chosen, indices, order, count, shift, mask, owner):  # type: ignore[no-untyped-def]
    """List the positions of the indices of an owner's rows; return their number."""
    num_own = 0
    for n in range(count):
        i = intrinsics.load(order, n) if order != 0 else n
        row = intrinsics.load(indices, i)
        intrinsics.store(chosen, num_own, i)
        num_own += (row >> shift) & mask == owner
    return num_own


@jit.njit(called_with="(int64[::1],)", nogil=True)
def _grouped(indices):  # type: ignore[no-untyped-def]
    """Return the positions of the indices, those of one row together, in their order."""
    count, num_bits = len(indices), 4
    while count >> (num_bits - 1) > 0:
        num_bits += 1
    first = np.full(1 << num_bits, -1)  # position of each row, by its hash
    last, following = np.empty(count, np.int64), np.full(count, -1)
    for i in range(count):
        # D. Knuth, The Art of Computer Programming 3, 6.4: multiplication by the golden ratio
        place = np.uint64(indices[i]) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - num_bits)
        at = np.int64(place)
        while first[at] >= 0 and indices[first[at]] != indices[i]:
            at = (at + 1) & ((1 << num_bits) - 1)
        if first[at] < 0:
            first[at] = i
            last[i] = i
        else:
            last[i] = -1
            following[last[first[at]]] = i
            last[first[at]] = i
    order, number = np.empty(count, np.int64), 0
    for head in range(count):
        i = head if last[head] >= 0 else -1
        while i >= 0:
            order[number] = i
            number += 1
            i = following[i]
    return order


_made = functools.cache(_make)


@functools.cache
def runner(verb: str, dtype: np.dtype[Any]) -> int | None:
    """Return the address of the runner of an operation over a dtype, compiled if need be.

    None for what is left to NumPy: the division of integers, of which one by 0 warns, that of
    complex numbers and their order, bool, and dtypes that are not known.
    """
    operation, like = _OPERATIONS[verb]
    if operation != REPLACE and (
        dtype.kind == "b"
        or not arithmetic.has_type(dtype)
        or reduce_op.kind(dtype) not in _KINDS.get(operation, "fciu")
    ):
        return None
    # One runner for all dtypes with the same bits.
    code = _BYTES if operation == REPLACE else arithmetic.type_code(dtype, like)
    address: int = _made(operation, code).address
    return address


def compile_all(dtypes: Sequence[np.dtype[Any]]) -> None:
    """Compile every operation over these dtypes."""
    for verb, dtype in itertools.product(_OPERATIONS, dtypes):
        runner(verb, dtype)


def update_rows(verb: str, writes: Sequence[RowWrite], divisor: int = 1) -> None:
    """Apply updates to rows, list after list, in one go that no interrupt cuts.

    Each update is applied to its row of the first array of its write, and the new row is written to
    all of them. Half numbers are combined in float32, and a row is rounded once in each list.

    Parameters
    ----------
    verb : str
        The operation, for which :func:`runner` has one over the arrays' dtype.
    writes : sequence of RowWrite
        Of arrays of one shape and dtype.
    divisor : int
        Updates are divided by it first; 1 for integers.
    """
    like = writes[0].arrays[0]
    row_nbytes = like.itemsize * math.prod(like.shape[1:])
    moved, num_copies = 0, 0
    for write in writes:
        moved += row_nbytes * len(write.indices) * (2 + len(write.arrays))
        num_copies += len(write.arrays)
    if moved == 0:
        return
    is_merged = reduce_op.is_half(like.dtype)
    orders = [_grouped(write.indices) if is_merged else None for write in writes]
    longest = max(len(write.indices) for write in writes) if is_merged else 0
    num_owners, num_threads = 1, 1
    if moved >= thread_pool.SHARED_NBYTES:
        num_threads = min(thread_pool.num_threads(), MOST_QUEUES)
        num_owners = 1 << (num_threads - 1).bit_length()
    # Words: the header, the request, the lists, the addresses of the arrays, the counters.
    lists_offset = HEADER_WORDS + _ROW_JOB_WORDS
    copies_offset = lists_offset + _LIST_WORDS * len(writes)
    end = copies_offset + num_copies
    counters_offset = counters_after(end)
    words = intrinsics.words(counters_offset + COUNTER_WORDS * (1 + num_threads))
    address = checks.address(words)
    header = JobHeader(
        num_pieces=num_owners,
        piece_length=max(_CHUNK, longest),
        num_items=len(writes),
        num_queues=num_threads,
        runner=runner(verb, like.dtype) or 0,
        items=address + 8 * lists_offset,
        constants=address + 8 * HEADER_WORDS,
        counters=address + 8 * counters_offset,
    )
    owner_shift = ((_OWNED_NBYTES - 1) // row_nbytes).bit_length()
    locks = thread_pool.of_process().locks  # kept alive here
    lock = checks.address(locks) + records.LINE_NBYTES * (checks.address(like) // 64 % NUM_LOCKS)
    row_job = _RowJob(row_nbytes, divisor, owner_shift, num_owners - 1, lock, 0, 0)
    content: list[int] = [*header, *row_job]
    copies: list[int] = []
    kept = [_with_contiguous_rows(write.updates) for write in writes]
    for write, updates, order in zip(writes, kept, orders, strict=True):
        content += [
            checks.address(write.indices),
            checks.address(updates),
            updates.strides[0],
            len(write.indices),
            address + 8 * (copies_offset + len(copies)),
            len(write.arrays),
            0 if order is None else checks.address(order),
        ]
        copies += map(checks.address, write.arrays)
    content += copies
    deadline = time.monotonic() + deadlines.timeout_seconds()
    try:
        while words[_IS_LOCKED] <= 0:
            if words[_IS_LOCKED] < 0 and time.monotonic() > deadline:
                raise CollectiveTimeoutError(
                    f"{verb}: another thread has written these rows for "
                    f"{deadlines.timeout_seconds():.0f} s: was it stopped?"
                )
            words[counters_offset:] = 0
            words[:end] = content
            thread_pool.execute(words, address, moved)
    except CollectiveTimeoutError:
        _abandoned.append((writes, kept, orders))
        raise


def _with_contiguous_rows(updates: HostArray) -> HostArray:
    """Return updates each of which is contiguous: the array itself if it is so."""
    if updates.flags.c_contiguous or updates[:1].flags.c_contiguous:
        return updates
    return np.ascontiguousarray(updates)
