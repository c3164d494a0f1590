"""Row updates: rows of arrays changed in place by rows of updates, in the order of the indices.

Several updates of one row are applied one after another, so the bits depend on the order of the
indices alone. Threads share the rows, not the updates: a piece of the job is an owner, which reads
all indices and applies the updates of its own rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from dvkernels import reduce_op
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import CollectiveTimeoutError
from dvkernels.kernels import arithmetic, checks, jit
from dvkernels.kernels.cpu.engine import intrinsics, job_layout, loops, records, thread_pool
from dvkernels.kernels.cpu.engine.intrinsics import cgutils
from dvkernels.kernels.cpu.engine.job_layout import (
    COUNTER_WORDS,
    HEADER_WORDS,
    MOST_QUEUES,
    JobHeader,
    counters_after,
)

__all__: list[str] = []

_REPLACE = -1  # beside the operations of arithmetic.py
_OPERATIONS = {
    "scatter_update": _REPLACE,
    "scatter_add": arithmetic.ADD,
    "scatter_sub": arithmetic.SUB,
    "scatter_mul": arithmetic.MUL,
    "scatter_div": arithmetic.DIV,
    "scatter_min": arithmetic.MIN,
    "scatter_max": arithmetic.MAX,
}
# Kinds of dtype: numpy.dtype.kind, "f" for bfloat16. NumPy keeps the division of integers, of which
# one by 0 warns, that of complex numbers, and bool.
_KINDS = {arithmetic.MIN: "fiu", arithmetic.MAX: "fiu", arithmetic.DIV: "f"}
_BYTES = arithmetic.type_code(np.dtype(np.uint8))

# An owner selects its rows from so many indices at a time, then applies their updates, for which
# the rows so many updates ahead are fetched.
_CHUNK = 512
_AHEAD = 12
# Neighbouring rows up to so many bytes have one owner, so that few cache lines have two.
_OWNED_NBYTES = 512
_LINE = 64
_I64 = ir.IntType(64)


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


class _UpdateList(NamedTuple):
    """A write in memory."""

    indices: int  # addresses
    updates: int
    stride: int  # of the updates, in bytes
    length: int
    copies: int  # the address of the first of the arrays' addresses
    num_copies: int


_ROW_JOB_WORDS, _LIST_WORDS = len(_RowJob._fields), len(_UpdateList._fields)
_row_job_at = records.view(records.layout(_RowJob))
_list_at = records.nth(records.layout(_UpdateList))
_abandoned: list[Any] = []  # arrays that a stopped thread may still touch


@intrinsics.literal_intrinsic
def _apply(
    typing: Any, copies: Any, num_copies: Any, indices: Any, updates: Any, stride: Any, chosen: Any,
    count: Any, is_all: Any, nbytes: Any, divisor: Any, operation: Any, code: Any,
) -> Any:  # fmt: skip
    """Apply the updates that ``chosen`` lists to rows of ``nbytes``, one after another.

    The first five arguments are as in ``_UpdateList``.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        table, num_copies, indices, updates, stride, listed, count, is_all, nbytes, divisor = args[
            :10
        ]
        numbers = arithmetic.VectorArithmetic(builder, code.literal_value)
        combines = operation.literal_value != _REPLACE
        bases = builder.inttoptr(table, _I64.as_pointer())
        base, one = builder.load(bases), _I64(1)

        def word(address: Any, index: Any) -> Any:
            return builder.load(builder.gep(builder.inttoptr(address, _I64.as_pointer()), [index]))

        def byte(*terms: Any) -> Any:
            address = functools.reduce(builder.add, terms)
            return builder.inttoptr(address, ir.IntType(8).as_pointer())

        def vector(shift: Any, update: Any, offset: Any, width: int, is_plain: bool) -> None:
            lanes = width // numbers.itemsize * numbers.unit
            value = numbers.load(byte(update, offset), lanes)
            if not is_plain and numbers.is_float:
                number = builder.sitofp(divisor, numbers.number)
                value = builder.fdiv(value, numbers.spread(number, lanes))
            target = byte(base, shift, offset)
            if combines:
                value = numbers.combine(operation.literal_value, numbers.load(target, lanes), value)
            numbers.store(value, target, lanes)
            if not is_plain:
                with cgutils.for_range(builder, num_copies, start=one, intp=_I64) as loop:
                    other = builder.load(builder.gep(bases, [loop.index]))
                    numbers.store(value, byte(other, shift, offset), lanes)

        def row(shift: Any, update: Any, is_plain: bool) -> None:
            whole, rest = (builder.and_(nbytes, _I64(part)) for part in (-_LINE, _LINE - 1))
            with cgutils.for_range_slice(builder, _I64(0), whole, _I64(_LINE), _I64) as (start, _):
                vector(shift, update, start, _LINE, is_plain)
            with builder.if_then(builder.icmp_signed("!=", rest, _I64(0))):
                width = _LINE // 2
                while width >= numbers.itemsize:  # the binary digits of the rest
                    digit = builder.and_(rest, _I64(width))
                    with builder.if_then(builder.icmp_signed("!=", digit, _I64(0))):
                        start = builder.and_(nbytes, _I64(-2 * width))
                        vector(shift, update, start, width, is_plain)
                    width //= 2

        def rows(is_plain: bool, is_listed: bool = True) -> None:
            at = functools.partial(word, listed) if is_listed else _same
            last = builder.sub(count, one)
            with cgutils.for_range(builder, count, intp=_I64) as loop:
                n, later = loop.index, builder.add(loop.index, _I64(_AHEAD))
                later = builder.select(builder.icmp_signed("<", later, last), later, last)
                later = builder.mul(word(indices, at(later)), nbytes)
                for end in (_I64(0), builder.sub(nbytes, one)):
                    intrinsics.emit_prefetch(builder, byte(base, later, end), True)
                i = at(n)
                shift = builder.mul(word(indices, i), nbytes)
                row(shift, builder.add(updates, builder.mul(i, stride)), is_plain)

        is_alone = builder.icmp_signed("==", num_copies, one)
        is_plain = builder.and_(is_alone, builder.icmp_signed("==", divisor, one))
        with builder.if_else(is_plain) as (plain, general):
            with plain, builder.if_else(builder.trunc(is_all, ir.IntType(1))) as (every, some):
                with every:
                    rows(True, False)
                with some:
                    rows(True)
            with general:
                rows(False)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10, operation, code), generate


def _make(operation: int, code: int) -> Any:
    """Compile a runner; the compile cache distinguishes these closures by their free variables."""

    @jit.cfunc(types.void(types.int64))
    def run(address):  # type: ignore[no-untyped-def]
        job = job_layout.job_at(address)
        row_job = _row_job_at(job.constants)
        shift, mask = row_job.owner_shift, row_job.owner_mask
        scratch = np.empty(_CHUNK, np.int64)
        chosen = intrinsics.address_of(scratch)
        for i in range(_CHUNK):
            intrinsics.store(chosen, i, i)
        ordinal = intrinsics.fetch_add(job_layout.counter_at(job.counters, 0), "value", 1)
        attempt = 0
        while True:
            attempt, owner, end_of_owners = loops.claim(job, ordinal, attempt)
            if end_of_owners == 0:
                break
            for k in range(job.num_items):
                given = _list_at(job.items, k)
                for first in range(0, given.length, _CHUNK):
                    indices = given.indices + 8 * first
                    count = min(_CHUNK, given.length - first)
                    if mask != 0:
                        count = _choose(chosen, indices, count, shift, mask, owner)
                    _apply(
                        given.copies, given.num_copies, indices,
                        given.updates + first * given.stride, given.stride, chosen, count,
                        np.int64(mask == 0), row_job.row_nbytes, row_job.divisor, operation, code,
                    )  # fmt: skip
        intrinsics.keep_alive(scratch)

    return run


def _same(number: Any) -> Any:
    return number


@jit.njit(nogil=True)
def _choose(chosen, indices, count, shift, mask, owner):  # type: ignore[no-untyped-def]
    """List the positions of the indices of an owner's rows; return their number."""
    num_own = 0
    for i in range(count):
        row = intrinsics.load(indices, i)
        intrinsics.store(chosen, num_own, i)
        num_own += (row >> shift) & mask == owner
    return num_own


_runners: dict[tuple[int, int], Any] = {}


def _key(verb: str, dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the operation and the type of elements that give the same bits as ``dtype``."""
    operation = _OPERATIONS[verb]
    if operation == _REPLACE:
        return operation, _BYTES
    if operation == arithmetic.MUL:
        return operation, arithmetic.type_code(dtype, reduce_op.ReduceOp.PROD)
    is_sum = operation in (arithmetic.ADD, arithmetic.SUB)
    like = reduce_op.ReduceOp.SUM if is_sum else reduce_op.ReduceOp.MAX
    return operation, arithmetic.type_code(dtype, like)


def _runner(verb: str, dtype: np.dtype[Any]) -> int:
    """Return the address of the runner of an operation over a dtype, compiled if need be."""
    key = _key(verb, dtype)
    if key not in _runners:
        _runners[key] = _make(*key)
    address: int = _runners[key].address
    return address


def compile_all(dtypes: Iterable[np.dtype[Any]]) -> None:
    """Compile every operation over these dtypes."""
    for verb, dtype in itertools.product(_OPERATIONS, dtypes):
        if takes(verb, dtype):
            _runner(verb, dtype)


def takes(verb: str, dtype: np.dtype[Any]) -> bool:
    """Return whether :func:`update_rows` has this operation for a dtype of numbers."""
    operation = _OPERATIONS[verb]
    if operation == _REPLACE:
        return True
    is_known = dtype.kind != "b" and arithmetic.has_type(dtype)
    return is_known and reduce_op.kind(dtype) in _KINDS.get(operation, "fciu")


def update_rows(verb: str, writes: Sequence[RowWrite], divisor: int = 1) -> None:
    """Apply updates to rows, list after list, in one go that no interrupt cuts.

    Each update is applied to its row of the first array of its write, and the new row is written to
    all of them.

    Parameters
    ----------
    verb : str
        The operation: the name of a variable's method, such as ``"scatter_add"``.
    writes : sequence of RowWrite
        Of arrays of one shape and dtype, for which :func:`takes` is true.
    divisor : int
        Updates are divided by it first; 1 for integers.
    """
    like = writes[0].arrays[0]
    row_nbytes = like.itemsize * int(np.prod(like.shape[1:], dtype=np.int64))
    runner = _runner(verb, like.dtype)
    moved = row_nbytes * sum(len(w.indices) * (2 + len(w.arrays)) for w in writes)
    if moved == 0:
        return
    num_owners, num_threads = 1, min(thread_pool.num_threads(), MOST_QUEUES)
    while moved >= thread_pool.SHARED_NBYTES and num_owners < num_threads:
        num_owners *= 2
    # Words: the header, the row_job, the lists, the addresses of the arrays, the counters.
    lists_offset = HEADER_WORDS + _ROW_JOB_WORDS
    copies_offset = lists_offset + _LIST_WORDS * len(writes)
    end = copies_offset + sum(len(write.arrays) for write in writes)
    counters_offset = counters_after(end)
    words = intrinsics.words(counters_offset + COUNTER_WORDS * (1 + num_threads))
    address = checks.address(words)
    header = JobHeader(
        num_pieces=num_owners,
        num_items=len(writes),
        num_queues=num_threads,
        runner=runner,
        items=address + 8 * lists_offset,
        constants=address + 8 * HEADER_WORDS,
        counters=address + 8 * counters_offset,
    )
    owner_shift = max(0, (_OWNED_NBYTES - 1) // row_nbytes).bit_length()
    row_job = _RowJob(row_nbytes, divisor, owner_shift, num_owners - 1)
    content: list[int] = [*header, *row_job]
    copies: list[int] = []
    kept = [_with_contiguous_rows(write.updates) for write in writes]
    for write, updates in zip(writes, kept, strict=True):
        content += _UpdateList(
            checks.address(write.indices),
            checks.address(updates),
            updates.strides[0],
            len(write.indices),
            address + 8 * (copies_offset + len(copies)),
            len(write.arrays),
        )
        copies += map(checks.address, write.arrays)
    words[:end] = content + copies
    try:
        thread_pool.execute(words, address, moved)
    except CollectiveTimeoutError:
        _abandoned.append((writes, kept))
        raise


def _with_contiguous_rows(updates: HostArray) -> HostArray:
    """Return updates each of which is contiguous: the array itself if it is so."""
    return updates if updates[:1].flags.c_contiguous else np.ascontiguousarray(updates)
