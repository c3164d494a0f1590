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

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np
from numba import types

from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import checks, jit
from dvkernels.kernels.cpu.engine import (
    array_structs,
    fast_path,
    intrinsics,
    job_layout,
    recipe,
    records,
    shm_barrier,
)
from dvkernels.kernels.cpu.engine.shm_barrier import AGREED
from dvkernels.reduce_op import Reduction

__all__ = ["DECLINED", "DONE", "SharedMemoryAllReduce"]


# Outcomes of a whole all-reduce, and of one that has not begun; others are those of the barrier
# that stopped it.
DONE, DECLINED = -2, -3
# The call for a short array keeps the interpreter's lock: a copy of 1 us, a wait of 5 us at most.
_SHORT_NBYTES, _SHORT_PAUSES = 16 * 1024, 150
_LINE = records.LINE_NBYTES
# From 3 on (5 + 1/n) S is less than (n + 3) S, but the additional round costs time, most of all
# where processes wait for cores. On two cores of an AMD EPYC 4 processes took 1.0 times as long in
# parts for 1 MiB and 0.86 for 16 MiB, 6 took 0.85 and 0.77, 8 took 0.74 and 0.72, but 3 took 1.2
# and 1.0 (November 2026).
_LEAST_MEMBERS_FOR_PARTS = 4
# Phases to run: all, all but the staging of the current piece, that staging alone.
_ALL, _CONTINUE, _STAGE = range(3)
_MOST_ARRAYS = fast_path.MOST_ARRAYS  # in a column


class _State(NamedTuple):
    lines: int  # address of the members' control lines
    num_members: int
    rank: int
    buffers: int  # address of the staging buffers, of even rounds, then of odd ones
    parity_stride: int
    buffer_nbytes: int
    num_pauses: int  # of a wait
    epoch: int = 0  # the latest round
    start: int = 0  # the first byte of its piece
    column: int = 0  # in which that byte lies
    previous_column: int = 0  # in which the previous piece starts
    in_parts: int = 0  # whether each member combines a part of the pieces
    # The arrays of one call: the first byte of each column, and the end of the last one; the
    # addresses of each column's arrays.
    begins: int = 0
    tables: int = 0
    num_columns: int = 0
    num_sources: int = 0
    num_targets: int = 0
    recipe: int = 0


_state_at = records.view(records.layout(_State))
_EPOCH, _IN_PARTS = map(_State._fields.index, ("epoch", "in_parts"))


@jit.njit(nogil=True)
def _table_of(job):  # type: ignore[no-untyped-def]
    """Return the address of the table of a job of one item."""
    return job_layout.item_at(job_layout.job_at(job).items, 0).table


@jit.njit(nogil=True)
def _combine(job, runner, num_sources, num_targets, divisor, length):  # type: ignore[no-untyped-def]
    """Combine the first arrays of the job's table into those that follow them."""
    header = job_layout.job_at(job)
    header.num_pieces = np.int64(length > 0)
    header.piece_length = length
    header.num_arrays = num_sources + num_targets
    header.runner = runner
    job_layout.item_at(header.items, 0).length = length
    row = job_layout.row_at(header.rows, 0)
    row.num_sources = row.first_target = num_sources
    row.num_targets = num_targets
    row.divisor = divisor
    for k in range(2):
        job_layout.counter_at(header.counters, k).value = 0
    intrinsics.call(runner, job)


# Reads Python lists, so it keeps the interpreter's lock.
@jit.njit("int64(int64, int64, int64, int64, int64)")
def _lay_out(columns, num_sources, recipe_address, layout, state_address):  # type: ignore[no-untyped-def]
    """Write each column's first byte and its arrays' addresses; return the total bytes, or -1."""
    state, constants = _state_at(state_address), recipe.recipe_at(recipe_address)
    count = array_structs.length_of(columns)
    width = array_structs.length_of(array_structs.item_of(columns, 0))
    state.start = state.column = 0
    state.begins = layout
    state.tables = layout + 8 * (count + 1)
    state.num_columns = count
    state.num_sources = num_sources
    state.num_targets = width - num_sources
    state.recipe = recipe_address
    begin = np.int64(0)
    for k in range(count):
        intrinsics.store(state.begins, k, begin)
        column, table = array_structs.item_of(columns, k), state.tables + 8 * k * width
        length = array_structs.read_addresses(column, constants, table, num_sources)
        if length < 0:
            return np.int64(-1)
        begin += length * constants.itemsize
    intrinsics.store(state.begins, count, begin)
    return begin


@jit.njit(nogil=True)
def _overlap(state, column, start, stop):  # type: ignore[no-untyped-def]
    """Return the bytes of a column, from one to another, that lie in ``start`` to ``stop``."""
    low = max(start, intrinsics.load(state.begins, column))
    return low, min(stop, intrinsics.load(state.begins, column + 1))


@jit.njit(nogil=True)
def _address(state, column, k, byte):  # type: ignore[no-untyped-def]
    """Return the address of a byte, counted over all columns, in array ``k`` of its column."""
    width = state.num_sources + state.num_targets
    array = intrinsics.load(state.tables, column * width + k)
    return array + byte - intrinsics.load(state.begins, column)


@jit.njit(nogil=True)
def _stage(state, job, buffer, start, stop):  # type: ignore[no-untyped-def]
    """Write the reduction of the sources' bytes ``start`` to ``stop`` to a staging buffer."""
    constants, num_sources = recipe.recipe_at(state.recipe), state.num_sources
    table, column = _table_of(job), state.column
    while column < state.num_columns and intrinsics.load(state.begins, column) < stop:
        low, high = _overlap(state, column, start, stop)
        if high > low:
            staged = buffer + low - start
            if num_sources == 1:
                intrinsics.copy(staged, _address(state, column, 0, low), high - low)
            else:
                for k in range(num_sources):
                    intrinsics.store(table, k, _address(state, column, k, low))
                intrinsics.store(table, num_sources, staged)
                length = (high - low) // constants.itemsize
                _combine(job, constants.runner, num_sources, 1, 1, length)
        column += 1
    return 0


@jit.njit(nogil=True)
def _reduce_to_targets(state, job, buffers, count, divisor, column, start, stop):  # type: ignore[no-untyped-def]
    """Write the reduction of a piece in ``count`` staging buffers to the targets."""
    constants, table = recipe.recipe_at(state.recipe), _table_of(job)
    while column < state.num_columns and intrinsics.load(state.begins, column) < stop:
        low, high = _overlap(state, column, start, stop)
        if high > low:
            staged = buffers + low - start
            for member in range(count):
                intrinsics.store(table, member, staged + member * state.buffer_nbytes)
            for k in range(state.num_targets):
                target = _address(state, column, state.num_sources + k, low)
                if count == 1:
                    intrinsics.copy(target, staged, high - low)
                intrinsics.store(table, count + k, target)
            if count > 1:
                length = (high - low) // constants.itemsize
                _combine(job, constants.runner, count, state.num_targets, divisor, length)
        column += 1
    return 0


@jit.njit(nogil=True)
def _combine_part(state, job, buffers, divisor, nbytes):  # type: ignore[no-untyped-def]
    """Combine this member's part of a piece in all staging buffers into the buffer behind them."""
    constants, count = recipe.recipe_at(state.recipe), state.num_members
    num_lines = (nbytes + _LINE - 1) // _LINE
    low = num_lines * state.rank // count * _LINE
    high = min(nbytes, num_lines * (state.rank + 1) // count * _LINE)
    if high > low:
        for k in range(count + 1):
            intrinsics.store(_table_of(job), k, buffers + k * state.buffer_nbytes + low)
        _combine(job, constants.runner, count, 1, divisor, (high - low) // constants.itemsize)
    return 0


@jit.njit("int64(int64, int64, int64, int64, int64)", nogil=True)
def _run(state_address, job, fingerprint, divisor, phase):  # type: ignore[no-untyped-def]
    """Reduce from the current piece on; return the outcome."""
    state = _state_at(state_address)
    lines, count, rank = state.lines, state.num_members, state.rank
    buffer_nbytes = state.buffer_nbytes
    total = intrinsics.load(state.begins, state.num_columns)
    if recipe.recipe_at(state.recipe).is_mean:
        divisor = count
    while True:
        start = state.start  # in parts, the last round has no piece
        stop = min(start + buffer_nbytes, total)
        epoch = state.epoch + np.int64(phase != _CONTINUE)
        buffers = state.buffers + (epoch & 1) * state.parity_stride
        if phase != _CONTINUE:
            _stage(state, job, buffers + rank * buffer_nbytes, start, stop)
            if phase == _STAGE:
                return DONE
            state.epoch = epoch
            shm_barrier.arrive_at(lines, rank, epoch, fingerprint, stop - start)
        outcome = shm_barrier.await_members(lines, count, rank, epoch, state.num_pauses)
        if outcome != AGREED:
            return outcome
        phase = _ALL
        column = state.column
        if state.in_parts:
            if start > 0:
                before = (start - 1) // buffer_nbytes * buffer_nbytes
                results = state.buffers + (~epoch & 1) * state.parity_stride
                results += count * buffer_nbytes
                _reduce_to_targets(state, job, results, 1, 1, state.previous_column, before, start)
            if start >= total:
                return DONE
            _combine_part(state, job, buffers, divisor, stop - start)
        else:
            _reduce_to_targets(state, job, buffers, count, divisor, column, start, stop)
            if stop >= total:
                return DONE
        state.previous_column = column
        while column < state.num_columns and intrinsics.load(state.begins, column + 1) <= stop:
            column += 1
        state.column = column
        state.start = stop


# Reads Python lists, so it keeps the interpreter's lock.
@jit.njit("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def _run_short(arrays, recipe_address, layout, state_address, job, epoch, fingerprint, divisor):  # type: ignore[no-untyped-def]
    """Reduce a short array to another, in the round after ``epoch``; return the outcome."""
    state, constants = _state_at(state_address), recipe.recipe_at(recipe_address)
    state.begins, state.tables = layout, layout + 16
    length = array_structs.read_addresses(arrays, constants, state.tables, 1)
    nbytes = length * constants.itemsize
    if nbytes < 0 or nbytes > _SHORT_NBYTES:
        return np.int64(DECLINED)
    intrinsics.store(state.begins, 0, 0)
    intrinsics.store(state.begins, 1, nbytes)
    state.start = state.column = state.in_parts = 0
    state.num_columns = state.num_sources = state.num_targets = 1
    state.recipe, state.epoch = recipe_address, epoch
    num_pauses = state.num_pauses
    state.num_pauses = min(num_pauses, _SHORT_PAUSES)
    outcome = _run(state_address, job, fingerprint, divisor, _ALL)
    state.num_pauses = num_pauses
    return outcome


# The functions behind the dispatchers: a call is cheaper, for the arguments are integers.
_lay_out_now = _lay_out.get_overload((types.int64,) * 5)
_run_now = _run.get_overload((types.int64,) * 5)
_run_short_now = _run_short.get_overload((types.int64,) * 8)


def _recipe_of(op: Reduction, dtype: np.dtype[Any]) -> recipe.Recipe | None:
    found = recipe.recipes.get((op, dtype))
    if found is None:
        recipe.register(op, dtype)
        found = recipe.recipes.get((op, dtype))
    return found


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

    def __init__(
        self, lines: int, rank: int, buffers: HostArray, size: int, num_pauses: int
    ) -> None:
        self._buffers = buffers  # kept alive: the state holds addresses only
        self._state = np.array(
            _State(
                lines=lines,
                num_members=size,
                rank=rank,
                buffers=checks.address(buffers),
                parity_stride=buffers.strides[0],
                buffer_nbytes=buffers.shape[2],
                num_pauses=num_pauses,
            )
        )
        self._address = checks.address(self._state)
        self._job = fast_path.new_job(size + _MOST_ARRAYS)
        self._size = size
        self._set_layout(intrinsics.words(4))  # of one source and one target

    def _set_layout(self, words: HostArray) -> None:
        self._layout, self._layout_address = words, checks.address(words)

    def lay_out(
        self, columns: Sequence[Sequence[HostArray]], num_sources: int, op: Reduction
    ) -> bool:
        """Begin the all-reduce of columns of [*sources, *targets]; False: declined.

        All columns have equally many sources and targets. This member contributes the reduction
        of a column's sources, from the first to the last. Targets may be sources. The caller keeps
        the arrays alive: only their addresses are kept here.
        """
        lists = [column if type(column) is list else [*column] for column in columns]
        width = len(lists[0])
        dtype = lists[0][0].dtype
        found = _recipe_of(op, dtype)
        if found is None or width > _MOST_ARRAYS:
            return False
        num_words = len(lists) * (1 + width) + 1
        if len(self._layout) < num_words:
            self._set_layout(intrinsics.words(2 * num_words))
        addresses = (found.address, self._layout_address, self._address)
        nbytes = int(_lay_out_now(id(lists), num_sources, *addresses))
        self._state[_IN_PARTS] = self.is_in_parts(nbytes)
        return nbytes >= 0

    def run_short(
        self, arrays: list[HostArray], op: Reduction, epoch: int, fingerprint: int, divisor: int
    ) -> int:
        """Reduce a short source to a target; return the outcome, DECLINED if it has not begun.

        Else this member has arrived in the round after ``epoch``. It waits for microseconds only.
        """
        found = _recipe_of(op, arrays[0].dtype)
        if found is None:
            return DECLINED
        addresses = (found.address, self._layout_address, self._address, self._job[1])
        return int(_run_short_now(id(arrays), *addresses, epoch, fingerprint, divisor))

    def is_in_parts(self, nbytes: int) -> bool:
        """Return whether each member combines a part of the pieces; all members agree on it."""
        return self._size >= _LEAST_MEMBERS_FOR_PARTS and nbytes > self._buffers.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the current piece."""
        state = _State(*map(int, self._state))
        return min(int(self._layout[state.num_columns]) - state.start, state.buffer_nbytes)

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
