"""Pipelined all-reduce between processes through staging buffers in shared memory, compiled.

The members are the processes that share the memory. Each copies a piece of its array, or the
reduction of a piece of each of its arrays, to its staging buffer, waits until all have (see
shm_barrier.py), and combines the staging buffers of all into its results: each array is read once
and written once. A column is a set of equally long arrays: sources, then targets. Many columns are
concatenated in the staging buffers, so that they need no fusion buffer.

With n members and S bytes each member moves (n + 3) S bytes. Four and more members split each
piece of a long array, as in a reduce-scatter followed by an all-gather: each combines a part, and
all copy the whole result one round later: (5 + 1/n) S bytes, and one round more.

    after round     0                 1                     2                     3
    piece 0         is combined       is copied
    piece 1                           is combined           is copied
    piece 2                                                 is combined           is copied

A piece handled in Python costs 15 us beside the copy and the sum: two processes took 27 ms for
64 MiB in pieces of 256 KiB so, and take 13 ms here (2 cores of an AMD EPYC, November 2026).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils as numba_cgutils

from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import array_structs, fast_path, intrinsics, shm_barrier
from dvkernels.reduce_op import Reduction

__all__ = ["DONE", "SharedMemoryAllReduce"]


# The outcome of a whole all-reduce; others are those of the barrier that stopped it.
DONE = -2
_AGREED = shm_barrier.AGREED
# Words of the state: the control lines, the members, the staging buffers, the spins of a wait.
_LINES, _COUNT, _RANK, _BUFFERS, _PARITY_STRIDE, _BUFFER_NBYTES, _PAUSES = range(7)
# The latest round; the first byte of its piece, and the column in which that byte lies.
_EPOCH, _START, _COLUMN = range(7, 10)
# The arrays of one call.
_LAYOUT, _NUM_COLUMNS, _NUM_SOURCES, _NUM_TARGETS, _RECIPE = range(10, 15)
# The column in which the previous piece starts; whether each member combines a part.
_PREVIOUS_COLUMN, _IN_PARTS = 15, 16
_NUM_WORDS = 24
_LINE = 64
# From 3 on (5 + 1/n) S is less than (n + 3) S, but the additional round costs time, most of all
# where processes wait for cores. On two cores of an AMD EPYC 4 processes took 1.0 times as long in
# parts for 1 MiB and 0.86 for 16 MiB, 6 took 0.85 and 0.77, 8 took 0.74 and 0.72, but 3 took 1.2
# and 1.0 (November 2026).
_LEAST_MEMBERS_FOR_PARTS = 4
# Phases to run: all, all but the staging of the current piece, that staging alone.
_ALL, _CONTINUE, _STAGE = range(3)
_RUNNER, _ITEMSIZE, _IS_MEAN = array_structs.RUNNER, array_structs.ITEMSIZE, array_structs.IS_MEAN
_ITEM, _ROW, _TABLE, _COUNTERS = (
    fast_path.ITEM,
    fast_path.ROW,
    fast_path.TABLE,
    20,
)  # words of a job
_MOST_ARRAYS = fast_path.MOST_ARRAYS  # in a column
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_intrinsic: _Decorator = extending.intrinsic
_cgutils: Any = numba_cgutils  # its functions carry no types


@_intrinsic
def _copy(typing: Any, target: Any, source: Any, nbytes: Any) -> Any:
    """Copy bytes from one address to another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        pointers = [builder.inttoptr(address, byte) for address in args[:2]]
        _cgutils.raw_memcpy(builder, *pointers, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@jit.njit(nogil=True)
def _combine(job, runner, num_sources, num_targets, divisor, length):  # type: ignore[no-untyped-def]
    """Combine the first arrays of the job's table into those that follow them."""
    row = job + 8 * _ROW
    intrinsics.store(row, 2, num_sources)
    intrinsics.store(row, 3, num_sources)
    intrinsics.store(row, 4, num_targets)
    intrinsics.store(row, 5, divisor)
    intrinsics.store(job, 0, 0)
    intrinsics.store(job, 8, np.int64(length > 0))
    intrinsics.store(job, 10, length)
    intrinsics.store(job, 15, 0)
    intrinsics.store(job, 16, num_sources + num_targets)
    intrinsics.store(job, 18, runner)
    intrinsics.store(job, 21, 1)
    intrinsics.store(job, intrinsics.load(job, _COUNTERS), 0)
    intrinsics.store(job, _ITEM + 1, length)
    intrinsics.call(runner, job)


# Reads Python lists, so it keeps the interpreter's lock.
@jit.njit("int64(int64, int64, int64, int64, int64)")
def _lay_out(columns, num_sources, recipe, layout, state):  # type: ignore[no-untyped-def]
    """Write each column's first byte and its arrays' addresses; return the total bytes, or -1.

    The end of the last column follows it.
    """
    count = array_structs.length_of(columns)
    first = array_structs.item_of(columns, 0)
    width = 1 + array_structs.length_of(first)
    begin = np.int64(0)
    intrinsics.store(state, _START, 0)
    intrinsics.store(state, _COLUMN, 0)
    intrinsics.store(state, _LAYOUT, layout)
    intrinsics.store(state, _NUM_COLUMNS, count)
    intrinsics.store(state, _NUM_SOURCES, num_sources)
    intrinsics.store(state, _NUM_TARGETS, width - 1 - num_sources)
    intrinsics.store(state, _RECIPE, recipe)
    for k in range(count):
        column = array_structs.item_of(columns, k)
        entry = layout + 8 * k * width
        intrinsics.store(entry, 0, begin)
        length = array_structs.read_addresses(column, recipe, entry + 8, num_sources)
        if length < 0:
            return np.int64(-1)
        begin += length * intrinsics.load(recipe, _ITEMSIZE)
    intrinsics.store(layout, count * width, begin)
    return begin


@jit.njit(nogil=True)
def _stage(state, job, buffer, start, stop):  # type: ignore[no-untyped-def]
    """Write the reduction of the sources' bytes ``start`` to ``stop`` to a staging buffer."""
    layout, recipe = intrinsics.load(state, _LAYOUT), intrinsics.load(state, _RECIPE)
    num_sources, num_targets = (
        intrinsics.load(state, _NUM_SOURCES),
        intrinsics.load(state, _NUM_TARGETS),
    )
    runner, itemsize = intrinsics.load(recipe, _RUNNER), intrinsics.load(recipe, _ITEMSIZE)
    table = job + 8 * _TABLE
    width = 8 * (1 + num_sources + num_targets)
    entry = layout + intrinsics.load(state, _COLUMN) * width
    last = layout + intrinsics.load(state, _NUM_COLUMNS) * width
    while entry < last and intrinsics.load(entry, 0) < stop:
        begin, end = intrinsics.load(entry, 0), intrinsics.load(entry + width, 0)
        low, high = max(start, begin), min(stop, end)
        if high > low:
            staged = buffer + low - start
            if num_sources == 1:
                _copy(staged, intrinsics.load(entry, 1) + low - begin, high - low)
            else:
                for k in range(num_sources):
                    intrinsics.store(table, k, intrinsics.load(entry, 1 + k) + low - begin)
                intrinsics.store(table, num_sources, staged)
                _combine(job, runner, num_sources, 1, 1, (high - low) // itemsize)
        entry += width
    return 0


@jit.njit(nogil=True)
def _reduce_to_targets(state, job, buffers, count, divisor, column, start, stop):  # type: ignore[no-untyped-def]
    """Write the reduction of a piece in ``count`` staging buffers to the targets."""
    layout, recipe = intrinsics.load(state, _LAYOUT), intrinsics.load(state, _RECIPE)
    num_sources, num_targets = (
        intrinsics.load(state, _NUM_SOURCES),
        intrinsics.load(state, _NUM_TARGETS),
    )
    runner, itemsize = intrinsics.load(recipe, _RUNNER), intrinsics.load(recipe, _ITEMSIZE)
    buffer_nbytes = intrinsics.load(state, _BUFFER_NBYTES)
    table = job + 8 * _TABLE
    width = 8 * (1 + num_sources + num_targets)
    entry = layout + column * width
    last = layout + intrinsics.load(state, _NUM_COLUMNS) * width
    while entry < last and intrinsics.load(entry, 0) < stop:
        begin, end = intrinsics.load(entry, 0), intrinsics.load(entry + width, 0)
        low, high = max(start, begin), min(stop, end)
        if high > low:
            staged = buffers + low - start
            for member in range(count):
                intrinsics.store(table, member, staged + member * buffer_nbytes)
            for k in range(num_targets):
                target = intrinsics.load(entry, 1 + num_sources + k) + low - begin
                if count == 1:
                    _copy(target, staged, high - low)
                intrinsics.store(table, count + k, target)
            if count > 1:
                _combine(job, runner, count, num_targets, divisor, (high - low) // itemsize)
        entry += width
    return 0


@jit.njit(nogil=True)
def _combine_part(state, job, buffers, divisor, nbytes):  # type: ignore[no-untyped-def]
    """Combine this member's part of a piece in all staging buffers into the buffer behind them."""
    recipe = intrinsics.load(state, _RECIPE)
    count, rank = intrinsics.load(state, _COUNT), intrinsics.load(state, _RANK)
    buffer_nbytes = intrinsics.load(state, _BUFFER_NBYTES)
    lines = (nbytes + _LINE - 1) // _LINE
    low = lines * rank // count * _LINE
    high = min(nbytes, lines * (rank + 1) // count * _LINE)
    if high > low:
        for k in range(count + 1):
            intrinsics.store(job + 8 * _TABLE, k, buffers + k * buffer_nbytes + low)
        length = (high - low) // intrinsics.load(recipe, _ITEMSIZE)
        _combine(job, intrinsics.load(recipe, _RUNNER), count, 1, divisor, length)
    return 0


@jit.njit("int64(int64, int64, int64, int64, int64)", nogil=True)
def _run(state, job, fingerprint, divisor, phase):  # type: ignore[no-untyped-def]
    """Reduce from the current piece on; return the outcome."""
    layout, recipe = intrinsics.load(state, _LAYOUT), intrinsics.load(state, _RECIPE)
    num_columns = intrinsics.load(state, _NUM_COLUMNS)
    width = 1 + intrinsics.load(state, _NUM_SOURCES) + intrinsics.load(state, _NUM_TARGETS)
    total = intrinsics.load(layout, num_columns * width)
    lines, buffer_nbytes = intrinsics.load(state, _LINES), intrinsics.load(state, _BUFFER_NBYTES)
    count, rank = intrinsics.load(state, _COUNT), intrinsics.load(state, _RANK)
    in_parts = intrinsics.load(state, _IN_PARTS)
    if intrinsics.load(recipe, _IS_MEAN):
        divisor = count
    while True:
        start = intrinsics.load(state, _START)  # in parts, the last round has no piece
        stop = min(start + buffer_nbytes, total)
        epoch = intrinsics.load(state, _EPOCH) + np.int64(phase != _CONTINUE)
        parity_stride = intrinsics.load(state, _PARITY_STRIDE)
        buffers = intrinsics.load(state, _BUFFERS) + (epoch & 1) * parity_stride
        if phase != _CONTINUE:
            _stage(state, job, buffers + rank * buffer_nbytes, start, stop)
            if phase == _STAGE:
                return DONE
            intrinsics.store(state, _EPOCH, epoch)
            shm_barrier.arrive_at(lines, rank, epoch, fingerprint, stop - start)
        outcome = shm_barrier.await_members(
            lines, count, rank, epoch, intrinsics.load(state, _PAUSES)
        )
        if outcome != _AGREED:
            return outcome
        phase = _ALL
        column = intrinsics.load(state, _COLUMN)
        if in_parts:
            if start > 0:
                previous_start = (start - 1) // buffer_nbytes * buffer_nbytes
                results = (
                    intrinsics.load(state, _BUFFERS)
                    + (~epoch & 1) * parity_stride
                    + count * buffer_nbytes
                )
                previous_column = intrinsics.load(state, _PREVIOUS_COLUMN)
                _reduce_to_targets(
                    state, job, results, 1, 1, previous_column, previous_start, start
                )
            if start >= total:
                return DONE
            _combine_part(state, job, buffers, divisor, stop - start)
        else:
            _reduce_to_targets(state, job, buffers, count, divisor, column, start, stop)
            if stop >= total:
                return DONE
        intrinsics.store(state, _PREVIOUS_COLUMN, column)
        while column < num_columns and intrinsics.load(layout, (column + 1) * width) <= stop:
            column += 1
        intrinsics.store(state, _COLUMN, column)
        intrinsics.store(state, _START, stop)


# The functions behind the dispatchers: a call is cheaper, for the arguments are integers.
_lay_out_now = _lay_out.get_overload((types.int64,) * 5)
_run_now = _run.get_overload((types.int64,) * 5)


@final
class SharedMemoryAllReduce:
    """One member's side of the all-reduce through shared memory.

    Parameters
    ----------
    lines : int
        Address of the members' control lines: see shm_barrier.py.
    rank : int
        This member.
    buffers : ndarray of uint8, (2, size + 1, nbytes)
        The members' staging buffers, and one for the result, of even and of odd rounds.
    size : int
        Number of members.
    num_pauses : int
        Spins of the wait in each round.
    """

    def __init__(self, lines: int, rank: int, buffers: Any, size: int, num_pauses: int) -> None:
        self._buffers = buffers  # kept alive: the state holds addresses only
        self._state = intrinsics.words(_NUM_WORDS)
        self._state[:_EPOCH] = (
            lines, size, rank, checks.address(buffers), buffers.strides[0], buffers.shape[2],
            num_pauses,
        )  # fmt: skip
        self._address = checks.address(self._state)
        self._job = fast_path.new_job(size + _MOST_ARRAYS)
        self._size = size
        self._set_layout(intrinsics.words(_NUM_WORDS))

    def _set_layout(self, words: Any) -> None:
        self._layout, self._layout_address = words, checks.address(words)

    def lay_out(self, columns: Sequence[Sequence[Any]], num_sources: int, op: Reduction) -> bool:
        """Begin the all-reduce of columns of [*sources, *targets]; False: declined.

        All columns have equally many sources and targets. This member contributes the reduction
        of a column's sources, from the first to the last. Targets may be sources. The caller keeps
        the arrays alive: only their addresses are kept here.
        """
        lists = [column if type(column) is list else [*column] for column in columns]
        width = len(lists[0])
        dtype = lists[0][0].dtype
        recipe = array_structs.recipes.get((op, dtype))
        if recipe is None:
            array_structs.register(op, dtype)
            recipe = array_structs.recipes.get((op, dtype))
        if recipe is None or width > _MOST_ARRAYS:
            return False
        num_words = len(lists) * (1 + width) + 1
        if len(self._layout) < num_words:
            self._set_layout(intrinsics.words(2 * num_words))
        addresses = (recipe.address, self._layout_address, self._address)
        nbytes = int(_lay_out_now(id(lists), num_sources, *addresses))
        self._state[_IN_PARTS] = self.is_in_parts(nbytes)
        return nbytes >= 0

    def is_in_parts(self, nbytes: int) -> bool:
        """Return whether each member combines a part of the pieces; all members agree on it."""
        return self._size >= _LEAST_MEMBERS_FOR_PARTS and nbytes > int(self._state[_BUFFER_NBYTES])

    @property
    def nbytes(self) -> int:
        """Bytes of the current piece."""
        state = self._state
        width = 1 + int(state[_NUM_SOURCES] + state[_NUM_TARGETS])
        left = self._layout[state[_NUM_COLUMNS] * width] - state[_START]
        return int(min(left, state[_BUFFER_NBYTES]))

    def run(
        self, epoch: int, fingerprint: int, divisor: int, *, has_arrived: bool
    ) -> tuple[int, int]:
        """Reduce from the current piece on; return the outcome, and the epoch of the latest round.

        The outcome is ``DONE``, or that of the barrier in the round of the piece then current.
        ``epoch`` is that of the latest round at which this member arrived: with the current piece
        staged, if ``has_arrived``. The sum is divided by ``divisor``, or for MEAN by the number of
        members.
        """
        self._state[_EPOCH] = epoch
        phase = _CONTINUE if has_arrived else _ALL
        outcome = int(_run_now(self._address, self._job[1], fingerprint, divisor, phase))
        return outcome, int(self._state[_EPOCH])

    def stage(self, epoch: int) -> None:
        """Write the current piece to this member's staging buffer of round ``epoch + 1``."""
        self._state[_EPOCH] = epoch
        _run_now(self._address, self._job[1], 0, 1, _STAGE)
