"""Arrays that go through shared memory piece by piece, reduced on the way, in one call.

Each member brings a piece of its array to its place, or what a piece of each of its arrays makes,
waits until all have (see shm_barrier.py), and combines those of all into its results: each array is
read once and written once. Of many columns of arrays a piece holds what comes one after another,
so they need no bucket: the places are one.

Of n members and S bytes that moves (n + 3) S bytes a member. Four and more combine a part of a
long array's pieces each, which all take over one round later: (5 + 1/n) S, and a round more.

    after round     0          1                      2                      3
    piece 0         is combined, then taken
    piece 1                    is combined, then      taken
    piece 2                                           is combined, then      taken

A piece done in Python costs 15 us beside the copy and the sum. Two processes took 27 ms for 64 MiB
in pieces of 256 KiB that way, and 13 ms in this one (2 cores of an AMD EPYC, November 2026).
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

__all__ = ["DONE", "Relay"]


# How it went, unless as a wait does that finds the members not all there, or not agreed.
DONE = -2
_AGREED = shm_barrier.AGREED
# The words of a route: where the rounds are, who takes part, where the places are.
_LINES, _COUNT, _RANK, _PLACES, _EVEN_TO_ODD, _PLACE_NBYTES, _PAUSES = range(7)
# The latest round; the first byte of the piece that it carries, and the column that this lies in.
_NUMBER, _STARTED, _COLUMN = range(7, 10)
# What one call carries.
_LAYOUT, _NUM_COLUMNS, _NUM_SOURCES, _NUM_TARGETS, _RECIPE = range(10, 15)
# The column that the piece before lies in; whether members combine a part each.
_COLUMN_BEFORE, _IN_PARTS = 15, 16
_NUM_WORDS = 24
_LINE = 64
# From 3 on (5 + 1/n) S is less than (n + 3) S, but the round more costs something, most of all
# where processes wait for cores. On two cores of an AMD EPYC 4 processes took 1.0 times as long in
# parts for 1 MiB and 0.86 for 16 MiB, 6 took 0.85 and 0.77, 8 took 0.74 and 0.72, but 3 took 1.2
# and 1.0 (November 2026).
_LEAST_MEMBERS = 4
# What there is to do: all of it, all but to bring the piece at hand, nothing but that.
_WHOLE, _GO_ON, _BRING = range(3)
_RUNNER, _ITEMSIZE, _IS_MEAN = array_structs.RUNNER, array_structs.ITEMSIZE, array_structs.IS_MEAN
_ITEM, _ROW, _TABLE, _COUNTERS = (
    fast_path.ITEM,
    fast_path.ROW,
    fast_path.TABLE,
    20,
)  # words of a job
_MOST_ARRAYS = fast_path.MOST_ARRAYS  # of a column
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_intrinsic: _Decorator = extending.intrinsic
_cgutils: Any = numba_cgutils  # its functions carry no types


@_intrinsic
def _copy(typing: Any, target: Any, source: Any, nbytes: Any) -> Any:
    """Copy bytes from one address to another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        places = [builder.inttoptr(address, byte) for address in args[:2]]
        _cgutils.raw_memcpy(builder, *places, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@jit.njit(nogil=True)
def _combine(job, runner, num_sources, num_targets, divisor, length):  # type: ignore[no-untyped-def]
    """Combine the arrays that the table begins with into those that follow."""
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


# It reads lists of Python, so it keeps the interpreter's lock.
@jit.njit("int64(int64, int64, int64, int64, int64)")
def _lay_out(columns, num_sources, recipe, layout, route):  # type: ignore[no-untyped-def]
    """Write each column's first byte and its arrays' addresses; return the bytes of all, or -1.

    After the last column stands where it ends.
    """
    count = array_structs.length_of(columns)
    first = array_structs.item_of(columns, 0)
    width = 1 + array_structs.length_of(first)
    begin = np.int64(0)
    intrinsics.store(route, _STARTED, 0)
    intrinsics.store(route, _COLUMN, 0)
    intrinsics.store(route, _LAYOUT, layout)
    intrinsics.store(route, _NUM_COLUMNS, count)
    intrinsics.store(route, _NUM_SOURCES, num_sources)
    intrinsics.store(route, _NUM_TARGETS, width - 1 - num_sources)
    intrinsics.store(route, _RECIPE, recipe)
    for k in range(count):
        column = array_structs.item_of(columns, k)
        line = layout + 8 * k * width
        intrinsics.store(line, 0, begin)
        length = array_structs.look(column, recipe, line + 8, num_sources)
        if length < 0:
            return np.int64(-1)
        begin += length * intrinsics.load(recipe, _ITEMSIZE)
    intrinsics.store(layout, count * width, begin)
    return begin


@jit.njit(nogil=True)
def _bring(route, job, place, start, stop):  # type: ignore[no-untyped-def]
    """Bring what the bytes of a piece make to a place."""
    layout, recipe = intrinsics.load(route, _LAYOUT), intrinsics.load(route, _RECIPE)
    num_sources, num_targets = (
        intrinsics.load(route, _NUM_SOURCES),
        intrinsics.load(route, _NUM_TARGETS),
    )
    runner, itemsize = intrinsics.load(recipe, _RUNNER), intrinsics.load(recipe, _ITEMSIZE)
    table = job + 8 * _TABLE
    width = 8 * (1 + num_sources + num_targets)
    line = layout + intrinsics.load(route, _COLUMN) * width
    last = layout + intrinsics.load(route, _NUM_COLUMNS) * width
    while line < last and intrinsics.load(line, 0) < stop:
        begin, end = intrinsics.load(line, 0), intrinsics.load(line + width, 0)
        low, high = max(start, begin), min(stop, end)
        if high > low:
            here = place + low - start
            if num_sources == 1:
                _copy(here, intrinsics.load(line, 1) + low - begin, high - low)
            else:
                for k in range(num_sources):
                    intrinsics.store(table, k, intrinsics.load(line, 1 + k) + low - begin)
                intrinsics.store(table, num_sources, here)
                _combine(job, runner, num_sources, 1, 1, (high - low) // itemsize)
        line += width
    return 0


@jit.njit(nogil=True)
def _take(route, job, places, count, divisor, column, start, stop):  # type: ignore[no-untyped-def]
    """Take what the bytes of a piece in ``count`` places make to the targets."""
    layout, recipe = intrinsics.load(route, _LAYOUT), intrinsics.load(route, _RECIPE)
    num_sources, num_targets = (
        intrinsics.load(route, _NUM_SOURCES),
        intrinsics.load(route, _NUM_TARGETS),
    )
    runner, itemsize = intrinsics.load(recipe, _RUNNER), intrinsics.load(recipe, _ITEMSIZE)
    place_nbytes = intrinsics.load(route, _PLACE_NBYTES)
    table = job + 8 * _TABLE
    width = 8 * (1 + num_sources + num_targets)
    line = layout + column * width
    last = layout + intrinsics.load(route, _NUM_COLUMNS) * width
    while line < last and intrinsics.load(line, 0) < stop:
        begin, end = intrinsics.load(line, 0), intrinsics.load(line + width, 0)
        low, high = max(start, begin), min(stop, end)
        if high > low:
            here = places + low - start
            for member in range(count):
                intrinsics.store(table, member, here + member * place_nbytes)
            for k in range(num_targets):
                target = intrinsics.load(line, 1 + num_sources + k) + low - begin
                if count == 1:
                    _copy(target, here, high - low)
                intrinsics.store(table, count + k, target)
            if count > 1:
                _combine(job, runner, count, num_targets, divisor, (high - low) // itemsize)
        line += width
    return 0


@jit.njit(nogil=True)
def _combine_part(route, job, places, divisor, nbytes):  # type: ignore[no-untyped-def]
    """Combine this member's part of a piece in all places into the place behind them."""
    recipe = intrinsics.load(route, _RECIPE)
    count, rank = intrinsics.load(route, _COUNT), intrinsics.load(route, _RANK)
    place_nbytes = intrinsics.load(route, _PLACE_NBYTES)
    lines = (nbytes + _LINE - 1) // _LINE
    low = lines * rank // count * _LINE
    high = min(nbytes, lines * (rank + 1) // count * _LINE)
    if high > low:
        for k in range(count + 1):
            intrinsics.store(job + 8 * _TABLE, k, places + k * place_nbytes + low)
        length = (high - low) // intrinsics.load(recipe, _ITEMSIZE)
        _combine(job, intrinsics.load(recipe, _RUNNER), count, 1, divisor, length)
    return 0


@jit.njit("int64(int64, int64, int64, int64, int64)", nogil=True)
def _relay(route, job, wanted, divisor, what):  # type: ignore[no-untyped-def]
    """Reduce from the piece at hand on; return how it went."""
    layout, recipe = intrinsics.load(route, _LAYOUT), intrinsics.load(route, _RECIPE)
    num_columns = intrinsics.load(route, _NUM_COLUMNS)
    width = 1 + intrinsics.load(route, _NUM_SOURCES) + intrinsics.load(route, _NUM_TARGETS)
    total = intrinsics.load(layout, num_columns * width)
    lines, place_nbytes = intrinsics.load(route, _LINES), intrinsics.load(route, _PLACE_NBYTES)
    count, rank = intrinsics.load(route, _COUNT), intrinsics.load(route, _RANK)
    in_parts = intrinsics.load(route, _IN_PARTS)
    if intrinsics.load(recipe, _IS_MEAN):
        divisor = count
    while True:
        start = intrinsics.load(route, _STARTED)  # in parts it is in the end that of no piece
        stop = min(start + place_nbytes, total)
        number = intrinsics.load(route, _NUMBER) + np.int64(what != _GO_ON)
        half = intrinsics.load(route, _EVEN_TO_ODD)
        places = intrinsics.load(route, _PLACES) + (number & 1) * half
        if what != _GO_ON:
            _bring(route, job, places + rank * place_nbytes, start, stop)
            if what == _BRING:
                return DONE
            intrinsics.store(route, _NUMBER, number)
            shm_barrier.come_to(lines, rank, number, wanted, stop - start)
        outcome = shm_barrier.await_members(
            lines, count, rank, number, intrinsics.load(route, _PAUSES)
        )
        if outcome != _AGREED:
            return outcome
        what = _WHOLE
        column = intrinsics.load(route, _COLUMN)
        if in_parts:
            if start > 0:
                before = (start - 1) // place_nbytes * place_nbytes
                results = (
                    intrinsics.load(route, _PLACES) + (~number & 1) * half + count * place_nbytes
                )
                column_before = intrinsics.load(route, _COLUMN_BEFORE)
                _take(route, job, results, 1, 1, column_before, before, start)
            if start >= total:
                return DONE
            _combine_part(route, job, places, divisor, stop - start)
        else:
            _take(route, job, places, count, divisor, column, start, stop)
            if stop >= total:
                return DONE
        intrinsics.store(route, _COLUMN_BEFORE, column)
        while column < num_columns and intrinsics.load(layout, (column + 1) * width) <= stop:
            column += 1
        intrinsics.store(route, _COLUMN, column)
        intrinsics.store(route, _STARTED, stop)


# The functions behind the dispatchers: less to do for each call, for the arguments are integers.
_lay_out_now = _lay_out.get_overload((types.int64,) * 5)
_relay_now = _relay.get_overload((types.int64,) * 5)


@final
class Relay:
    """The way of one member's arrays.

    Parameters
    ----------
    lines : int
        The address of the members' lines.
    rank : int
    places : ndarray of uint8, (2, size + 1, nbytes)
        Where members put pieces in even and odd rounds, and what becomes of them.
    size : int
        How many members there are.
    num_pauses : int
        How long to wait in each round.
    """

    def __init__(self, lines: int, rank: int, places: Any, size: int, num_pauses: int) -> None:
        self._places = places  # kept alive: the route knows addresses only
        self._route = intrinsics.words(_NUM_WORDS)
        self._route[:_NUMBER] = (
            lines, size, rank, checks.address(places), places.strides[0], places.shape[2],
            num_pauses,
        )  # fmt: skip
        self._address = checks.address(self._route)
        self._job = fast_path.new_job(size + _MOST_ARRAYS)
        self._size = size
        self._lay_out_in(intrinsics.words(_NUM_WORDS))

    def _lay_out_in(self, words: Any) -> None:
        self._layout, self._layout_address = words, checks.address(words)

    def lay_out(self, columns: Sequence[Sequence[Any]], num_sources: int, op: Reduction) -> bool:
        """Take columns of [*sources, *targets], all as many, to be reduced; False: declined.

        This member brings what the sources of a column make, from the first to the last. Targets
        may be sources. The caller keeps the arrays alive: only their addresses are kept here.
        """
        held = [column if type(column) is list else [*column] for column in columns]
        width = len(held[0])
        dtype = held[0][0].dtype
        recipe = array_structs.recipes.get((op, dtype))
        if recipe is None:
            array_structs.learn(op, dtype)
            recipe = array_structs.recipes.get((op, dtype))
        if recipe is None or width > _MOST_ARRAYS:
            return False
        num_words = len(held) * (1 + width) + 1
        if len(self._layout) < num_words:
            self._lay_out_in(intrinsics.words(2 * num_words))
        given = (recipe.address, self._layout_address, self._address)
        nbytes = int(_lay_out_now(id(held), num_sources, *given))
        self._route[_IN_PARTS] = self.is_in_parts(nbytes)
        return nbytes >= 0

    def is_in_parts(self, nbytes: int) -> bool:
        """Tell whether each member combines a part of pieces of so many bytes: the same for all."""
        return self._size >= _LEAST_MEMBERS and nbytes > int(self._route[_PLACE_NBYTES])

    @property
    def nbytes(self) -> int:
        """Of the piece at hand."""
        route = self._route
        width = 1 + int(route[_NUM_SOURCES] + route[_NUM_TARGETS])
        left = self._layout[route[_NUM_COLUMNS] * width] - route[_STARTED]
        return int(min(left, route[_PLACE_NBYTES]))

    def run(self, number: int, wanted: int, divisor: int, *, has_come: bool) -> tuple[int, int]:
        """Reduce from the piece at hand on; return how it went, and the latest round.

        ``number`` is that of the latest round that this member has come to; it has come for the
        piece at hand if ``has_come``, and has brought it. The sum is divided by ``divisor``, or for
        MEAN by the number of members.

        DONE, or what the wait for the others has found in the round of the piece then at hand.
        """
        self._route[_NUMBER] = number
        what = _GO_ON if has_come else _WHOLE
        how = int(_relay_now(self._address, self._job[1], wanted, divisor, what))
        return how, int(self._route[_NUMBER])

    def bring(self, number: int) -> None:
        """Bring the piece at hand, for the round after ``number``."""
        self._route[_NUMBER] = number
        _relay_now(self._address, self._job[1], 0, 1, _BRING)
