"""Take: rows of arrays, copied by their indices into memory of the caller, shared by all cores.

One job takes the rows of all arrays: a piece is a run of indices, and a thread copies the rows of
every array that they name. Bytes are moved, so every dtype without references is taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import types

from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import CollectiveTimeoutError
from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import intrinsics, job_layout, loops, records, thread_pool
from dvkernels.kernels.cpu.engine.job_layout import (
    COUNTER_WORDS,
    HEADER_WORDS,
    MOST_QUEUES,
    JobHeader,
    counters_after,
)
from dvkernels.kernels.strides import merge_axes

__all__ = ["RowTaker"]

# Most bytes of a piece. Its claim waits until all stores are done, 0.3 us; the last piece is short.
_PIECE_NBYTES = 128 * 1024
# A row of a random index waits for memory: the first lines of the row this many indices ahead are
# fetched meanwhile.
_AHEAD = 8


class _Selection(NamedTuple):
    """Indices of the rows to take."""

    indices: int  # the address of the first
    num_taken: int
    num_rows: int  # of every array
    num_wrong: int  # indices that name no row


class _RowLayout(NamedTuple):
    """Layout of the rows of an array, each of one or more lines of bytes, and where they go."""

    source: int  # addresses
    target: int
    row_stride: int  # in bytes, as the following
    row_nbytes: int
    line_stride: int
    line_nbytes: int


_SELECTION_WORDS, _COLUMN_WORDS = len(_Selection._fields), len(_RowLayout._fields)
_selection_at = records.view(records.layout(_Selection))
_column_at = records.nth(records.layout(_RowLayout))
_abandoned: list[Any] = []  # arrays that a stopped thread may still touch
_NUM_WRONG = HEADER_WORDS + _Selection._fields.index("num_wrong")


@jit.njit(nogil=True)
def _copy_rows(column, selection, first, end, nbytes):  # type: ignore[no-untyped-def]
    """Copy the rows of the indices ``first`` to ``end``; return how many name no row.

    ``nbytes`` is the length of a line: a constant for single numbers, so that no call is made.
    """
    indices, last, num_rows = selection.indices, selection.num_taken - 1, selection.num_rows
    sources, row_stride, line_stride = column.source, column.row_stride, column.line_stride
    num_lines = column.row_nbytes // nbytes
    target = column.target + first * column.row_nbytes
    wrong = 0
    for i in range(first, end):
        ahead = intrinsics.load(indices, min(i + _AHEAD, last))
        intrinsics.prefetch_to_read(sources + ahead * row_stride)
        row = intrinsics.load(indices, i)
        if row < 0 or row >= num_rows:
            wrong += 1
            row = 0
        source = sources + row * row_stride
        intrinsics.copy(target, source, nbytes)
        target += nbytes
        for _ in range(1, num_lines):
            source += line_stride
            intrinsics.copy(target, source, nbytes)
            target += nbytes
    return wrong


@jit.cfunc(types.void(types.int64))
def _run(address):  # type: ignore[no-untyped-def]
    """Take the rows of pieces of a job until none is left."""
    job = job_layout.job_at(address)
    selection = _selection_at(job.constants)
    ordinal = intrinsics.fetch_add(job_layout.counter_at(job.counters, 0), "value", 1)
    attempt = 0
    while True:
        attempt, piece, end_of_pieces = loops.claim(job, ordinal, attempt)
        if end_of_pieces == 0:
            break
        first = piece * job.piece_length
        end = min(end_of_pieces * job.piece_length, selection.num_taken)
        wrong = 0
        for k in range(job.num_items):
            column = _column_at(job.items, k)
            nbytes = column.line_nbytes
            if nbytes == 4:
                wrong += _copy_rows(column, selection, first, end, 4)
            elif nbytes == 8:
                wrong += _copy_rows(column, selection, first, end, 8)
            else:
                wrong += _copy_rows(column, selection, first, end, nbytes)
        if wrong > 0:
            intrinsics.fetch_add(selection, "num_wrong", wrong)


class RowTaker:
    """Taker of rows of arrays of one length, which it keeps alive.

    Parameters
    ----------
    arrays : sequence of ndarray
        Those for which :func:`takes` is true.
    """

    def __init__(self, arrays: Sequence[HostArray]) -> None:
        columns = [_layout_of(array) for array in arrays]
        self._arrays = arrays
        self._columns = [column for column in columns if column is not None]
        if len(self._columns) < len(arrays):
            raise ValueError("RowTaker: expected arrays for which takes(array) is true")
        self._row_nbytes = max(1, sum(column.row_nbytes for column in self._columns))

    def take_into(self, targets: Sequence[HostArray], indices: HostArray) -> None:
        """Copy row ``indices[i]`` of each array to row i of its target.

        Parameters
        ----------
        targets : sequence of ndarray
            Contiguous arrays of the arrays' dtypes, with a row for each index.
        indices : ndarray of int64, shape (n,)
            Contiguous.

        Raises
        ------
        IndexError
            An index names no row. The targets hold anything.
        """
        indices = np.ascontiguousarray(indices, np.int64)
        count, num_rows, columns = len(indices), len(self._arrays[0]), self._columns
        moved = 2 * count * self._row_nbytes
        num_threads = min(thread_pool.num_threads(), MOST_QUEUES)
        piece_nbytes = min(_PIECE_NBYTES, moved // (16 * num_threads))
        piece_length = max(1, piece_nbytes // self._row_nbytes)
        columns_offset = HEADER_WORDS + _SELECTION_WORDS
        end = columns_offset + _COLUMN_WORDS * len(columns)
        counters_offset = counters_after(end)
        words = intrinsics.words(counters_offset + COUNTER_WORDS * (1 + num_threads))
        address = checks.address(words)
        header = JobHeader(
            num_pieces=-(-count // piece_length),
            piece_length=piece_length,
            num_items=len(columns),
            num_queues=num_threads,
            runner=_run.address,
            items=address + 8 * columns_offset,
            constants=address + 8 * HEADER_WORDS,
            counters=address + 8 * counters_offset,
        )
        content: list[int] = [*header, checks.address(indices), count, num_rows, 0]
        for column, target in zip(columns, targets, strict=True):
            content += column._replace(target=checks.address(target))
        words[:end] = content
        try:
            thread_pool.execute(words, address, moved)
        except CollectiveTimeoutError:
            _abandoned.append((targets, indices))
            raise
        if words[_NUM_WRONG]:
            num_wrong = words[_NUM_WRONG] // len(columns)
            raise IndexError(
                f"take: expected indices of rows, 0 to {num_rows - 1}; got {num_wrong} others"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return RowTaker, (self._arrays,)  # a copy reads the addresses anew


def takes(array: HostArray) -> bool:
    """Return whether a :class:`RowTaker` takes the rows of an array.

    Its dtype holds no references, and a row is contiguous, or lines at one stride.
    """
    return _layout_of(array) is not None


def _layout_of(array: HostArray) -> _RowLayout | None:
    if array.dtype.kind not in "biufcmMSUV" or array.dtype.hasobject or not array.size:
        return None
    row = array[0, ...]
    dense = np.empty(row.shape, row.dtype)
    axes = merge_axes([dense, row])  # in the order of the target
    line_nbytes = row.itemsize
    if axes and axes[-1][1][1] == line_nbytes:
        line_nbytes *= axes.pop()[0]
    if len(axes) > 1:
        return None
    line_stride = axes[0][1][1] if axes else 0
    return _RowLayout(
        checks.address(array), 0, array.strides[0], row.nbytes, line_stride, line_nbytes
    )
