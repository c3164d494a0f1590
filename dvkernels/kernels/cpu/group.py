"""Collectives inside compiled code: replicas meet without returning to Python.

A replica's own ``@numba.njit(nogil=True)`` function calls :func:`barrier`, :func:`all_reduce` and
:func:`broadcast` with the ``state`` of a :class:`Group` and its rank. Each waits by spinning, then
by giving its core to others; a deadline and an abort word end every wait. Whoever meets tells the
others what for, and compares: nothing is written unless all want the same.

    words of a state, a cache line each where several threads write:
    [0] how many have arrived   [8] the number of meetings   [16] how it ended, if it did
    [24] replicas   [25] patience in ms   [26] which layout this is
    [32 + 8 r] what replica r brings: the address of its array, then
        [2] [3] what it wants of an even, of an odd meeting   [4] [5] of how many elements

A replica comes to meeting k + 1 only after it has compared what all wanted of meeting k, so that
what it wanted stays readable until it comes to meeting k + 2: two places are enough.
"""

from __future__ import annotations

import os
import time
import zlib
from typing import Any

import numba
import numpy as np
from numba import extending, types

from dvkernels.errors import CollectiveMismatchError, CollectiveTimeoutError
from dvkernels.kernels import arithmetic, jit
from dvkernels.kernels.cpu.engine import intrinsics, loops
from dvkernels.reduce_op import ReduceOp, parse

__all__ = ["Group", "all_reduce", "barrier", "broadcast"]


_SLOTS = 32
_WANTED, _LENGTH = 2, 4  # words of a slot, for even meetings
_LAYOUT = 0x64766B67726F7570 + 2  # changes with what the words mean: users keep compiled code
_TURNS_PER_LOOK = 1 << 16  # at the clock: about every 2 ms
# What is wanted: a verb, an operation, a root, and what the elements are.
_BARRIER, _ALL_REDUCE, _BROADCAST = range(1, 4)
_OPERATION, _ROOT, _ELEMENTS = 1 << 4, 1 << 8, 1 << 32
# How a meeting went.
_MET, _LATE, _ABORTED, _OTHERS_DIFFER = range(4)

_int64: Any = types.int64
_int32: Any = types.int32
if os.name == "posix":
    _clock: Any = types.ExternalFunction("clock_gettime", _int32(_int32, _int64))
    _MONOTONIC = time.CLOCK_MONOTONIC

    @jit.njit(nogil=True)
    def _milliseconds():  # type: ignore[no-untyped-def]
        """Return a time that nobody sets."""
        found = np.zeros(2, np.int64)  # seconds and nanoseconds
        _clock(_MONOTONIC, np.int64(found.ctypes.data))
        return found[0] * 1000 + found[1] // 1_000_000
else:
    _ticks: Any = types.ExternalFunction("GetTickCount64", _int64())

    @jit.njit(nogil=True)
    def _milliseconds():  # type: ignore[no-untyped-def]
        """Return a time that nobody sets."""
        return _ticks()


class Group:
    """Replicas, each on a thread of its own, that meet inside compiled code.

    Parameters
    ----------
    num_replicas : int
        How many. Each uses its own rank, from 0.
    timeout_seconds : float
        How long one waits for the others.

    Attributes
    ----------
    state : ndarray of int64
        What compiled functions take.

    Notes
    -----
    A wait that ends by the deadline, or by :meth:`abort`, aborts the group: every wait in it, also
    later ones, raises ``CollectiveTimeoutError`` or ``CollectiveMismatchError`` until
    :meth:`reset`. Arrays may then hold partial results.

    Examples
    --------
    >>> import numba
    >>> import numpy as np
    >>> import dvkernels as dv
    >>> from dvkernels.kernels.cpu import group
    >>> @numba.njit(nogil=True)
    ... def step(state, rank, values):
    ...     for _ in range(3):
    ...         group.all_reduce(state, rank, values, "mean")
    ...         values += 1
    >>> team = group.Group(2)
    >>> values = [np.zeros(2), np.ones(2)]
    >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    ...     def run():
    ...         rank = dv.get_replica_context().replica_id_in_sync_group
    ...         step(team.state, rank, values[rank])
    ...     strategy.run(run)
    >>> values[0]
    array([3.5, 3.5])
    """

    def __init__(self, num_replicas: int, timeout_seconds: float = 600.0) -> None:
        if num_replicas < 1 or not 0 < timeout_seconds < 1e9:
            raise ValueError(
                f"a Group needs at least 1 replica and a patience of 0 to 1e9 s; got "
                f"{num_replicas!r} and {timeout_seconds!r}"
            )
        self.num_replicas = int(num_replicas)
        self.timeout_seconds = float(timeout_seconds)
        self.state = intrinsics.words(_SLOTS + 8 * self.num_replicas)
        self.reset()

    def abort(self) -> None:
        """End every wait in this group, now and later, with ``CollectiveMismatchError``."""
        self.state[16] = _ABORTED

    def reset(self) -> None:
        """Make the group usable again. Nobody may be waiting in it."""
        self.state[:] = 0
        self.state[24] = self.num_replicas
        self.state[25] = max(1, round(1000 * self.timeout_seconds))
        self.state[26] = _LAYOUT


@jit.njit(nogil=True)
def _how_it_ended(state):  # type: ignore[no-untyped-def]
    how = intrinsics.load_shared(state, 16)
    return _ABORTED if how == _LATE else how  # late was who waited


@jit.njit(nogil=True)
def _meet(state, rank, wanted, length):  # type: ignore[no-untyped-def]
    """Wait for all, and compare what they want; return how it went."""
    if intrinsics.load_shared(state, 16) != _MET:
        return _how_it_ended(state)
    meeting = intrinsics.load_shared(state, 8)
    num_replicas = intrinsics.load(state, 24)
    place = meeting & 1
    mine = state + 8 * (_SLOTS + 8 * rank)
    intrinsics.store_shared(mine, _WANTED + place, wanted)
    intrinsics.store_shared(mine, _LENGTH + place, length)
    if intrinsics.fetch_add(state, 0, 1) == num_replicas - 1:
        intrinsics.store_shared(state, 0, 0)
        intrinsics.store_shared(state, 8, meeting + 1)
    deadline = np.int64(0)
    turn = 0
    while intrinsics.load_shared(state, 8) == meeting:
        if intrinsics.load_shared(state, 16) != _MET:
            return _how_it_ended(state)
        intrinsics.relax(turn)
        turn += 1
        if turn % _TURNS_PER_LOOK == 0:
            now = _milliseconds()
            if deadline == 0:
                deadline = now + intrinsics.load(state, 25)
            elif now > deadline:
                intrinsics.store_shared(state, 16, _LATE)
                return _LATE
    for other in range(num_replicas):
        theirs = state + 8 * (_SLOTS + 8 * other)
        if (
            intrinsics.load_shared(theirs, _WANTED + place) != wanted
            or intrinsics.load_shared(theirs, _LENGTH + place) != length
        ):
            intrinsics.store_shared(state, 16, _OTHERS_DIFFER)
            return _OTHERS_DIFFER
    return _how_it_ended(state)


@jit.njit(nogil=True)
def _meet_or_raise(state, rank, wanted, length):  # type: ignore[no-untyped-def]
    outcome = _meet(state, rank, wanted, length)
    if outcome == _LATE:
        raise CollectiveTimeoutError("a replica of the group waited in vain for the others")
    if outcome == _OTHERS_DIFFER:
        raise CollectiveMismatchError(
            "the replicas of the group called different functions, or with different operations, "
            "roots, dtypes or lengths; nothing was written: bring the same in all of them, then "
            "reset() the group"
        )
    if outcome == _ABORTED:
        raise CollectiveMismatchError(
            "the group was aborted: a replica failed, was late or wanted something else"
        )


@jit.njit(nogil=True)
def _checked(state, rank, root):  # type: ignore[no-untyped-def]
    """Return where the words of a state are, that are a group's with such a rank and root."""
    words = np.int64(state.ctypes.data)
    if state.size * state.itemsize < 8 * _SLOTS or intrinsics.load(words, 26) != _LAYOUT:
        raise ValueError(
            "that is no state of a Group, or compiled code of another version of dvkernels was "
            "kept by numba.njit(cache=True): delete its cache"
        )
    num_replicas = intrinsics.load(words, 24)
    if rank < 0 or rank >= num_replicas or root < 0 or root >= num_replicas:
        intrinsics.store_shared(words, 16, _ABORTED)
        raise ValueError("a rank or a root is not one of the group's")
    return words


@jit.njit(nogil=True)
def _bring(words, rank, address, wanted, length):  # type: ignore[no-untyped-def]
    """Show the others what this replica brings, and check that all bring the like."""
    intrinsics.store_shared(words + 8 * (_SLOTS + 8 * rank), 0, address)
    _meet_or_raise(words, rank, wanted, length)


@jit.njit(called_with="(int64[::1], int64)", nogil=True)
def barrier(state, rank):  # type: ignore[no-untyped-def]
    """Return when every replica of the group has called this.

    Parameters
    ----------
    state : ndarray of int64
        That of a :class:`Group`.
    rank : int
        Which replica this is.

    Raises
    ------
    CollectiveTimeoutError, CollectiveMismatchError, ValueError
        The others did not come in time; they called something else, or the group was aborted; a
        rank out of range, or a state that is no group's.

    Notes
    -----
    0.2 us with a core for each of two replicas.
    """
    words = _checked(state, np.int64(rank), np.int64(0))
    _meet_or_raise(words, np.int64(rank), np.int64(_BARRIER), np.int64(0))


def all_reduce(state: Any, rank: int, array: Any, op: str = "sum") -> None:
    """Leave the reduction in every replica's array. For compiled code.

    Parameters
    ----------
    state : ndarray of int64
        That of a :class:`Group`.
    rank : int
        Which replica this is.
    array : contiguous array of float32, float64 or integers
        Of one type and length in all replicas. Overwritten.
    op : str, a literal
        ``"sum"``, ``"mean"`` (of floats), ``"min"``, ``"max"`` or ``"prod"``.

    Raises
    ------
    CollectiveTimeoutError, CollectiveMismatchError, ValueError
        The others did not come in time; they brought another length, dtype or operation, or the
        group was aborted: nothing is written; a rank out of range, or a state that is no group's.

    Notes
    -----
    Each replica reduces its part, so all cores work: 2 R S bytes, two barriers. The bits are those
    of ``kernels.direct_all_reduce``.
    """
    raise TypeError("group.all_reduce is for functions compiled by numba.njit; see kernels")


@extending.overload(all_reduce, prefer_literal=True, strict=False, jit_options={"nogil": True})
def _all_reduce(state: Any, rank: Any, array: Any, op: Any = "sum") -> Any:
    name = op if isinstance(op, str) else getattr(op, "literal_value", getattr(op, "value", None))
    if name is None:
        return None  # not a literal: Numba says that no implementation fits
    known = parse(name)
    assert isinstance(known, ReduceOp)
    dtype = _dtype_of(array)
    is_fit = dtype is not None and (known is not ReduceOp.MEAN or dtype.kind == "f")
    if not is_fit or dtype is None:
        raise numba.core.errors.TypingError(
            f"group.all_reduce needs a contiguous array of float32, float64 or integers (no mean "
            f"of those); got {known.value} of {array}"
        )
    operation, code = arithmetic.operation_code(known), arithmetic.type_code(dtype)
    is_mean = known is ReduceOp.MEAN
    wanted = _ALL_REDUCE + [*ReduceOp].index(known) * _OPERATION + _elements(array)

    def reduce_in_place(state, rank, array, op="sum"):  # type: ignore[no-untyped-def]
        rank = np.int64(rank)
        words = _checked(state, rank, np.int64(0))
        length = np.int64(array.size)
        _bring(words, rank, np.int64(array.ctypes.data), wanted, length)
        num_replicas = intrinsics.load(words, 24)
        table = np.empty(num_replicas, np.int64)
        for k in range(num_replicas):
            table[k] = intrinsics.load_shared(words + 8 * (_SLOTS + 8 * k), 0)
        first, count = loops.part(length, num_replicas, rank)
        divisor = num_replicas if is_mean else np.int64(1)
        if count > 0:
            loops.span(
                np.int64(table.ctypes.data), np.int64(0), num_replicas, np.int64(0), num_replicas,
                divisor, first, count, np.int64(0), operation, code,
            )  # fmt: skip
        _meet_or_raise(words, rank, wanted, length)

    return reduce_in_place


def broadcast(state: Any, rank: int, array: Any, root: int) -> None:
    """Leave the root's array in every replica's. For compiled code.

    Parameters
    ----------
    state, rank, array
        As in :func:`all_reduce`; any dtype of fixed size.
    root : int
        Whose array is copied.

    Raises
    ------
    CollectiveTimeoutError, CollectiveMismatchError, ValueError
        As in :func:`all_reduce`.
    """
    raise TypeError("group.broadcast is for functions compiled by numba.njit; see kernels")


@extending.overload(broadcast, strict=False, jit_options={"nogil": True})
def _broadcast(state: Any, rank: Any, array: Any, root: Any) -> Any:
    if not isinstance(array, types.Array) or array.layout not in "CF":
        raise numba.core.errors.TypingError(
            f"group.broadcast needs a contiguous array; got {array}"
        )
    code = arithmetic.type_code(np.dtype(np.int8))
    base = _BROADCAST + _elements(array)
    is_mutable = array.mutable

    def copy_from_root(state, rank, array, root):  # type: ignore[no-untyped-def]
        rank, root = np.int64(rank), np.int64(root)
        words = _checked(state, rank, root)
        wanted = base + root * _ROOT
        nbytes = np.int64(array.size * array.itemsize)
        own = np.int64(array.ctypes.data)
        if rank != root and not is_mutable:
            intrinsics.store_shared(words, 16, _ABORTED)
            raise ValueError("group.broadcast would write into a read-only array")
        _bring(words, rank, own, wanted, nbytes)
        if rank != root:
            table = np.empty(2, np.int64)
            table[0] = intrinsics.load_shared(words + 8 * (_SLOTS + 8 * root), 0)
            table[1] = own
            one = np.int64(1)
            loops.span(
                np.int64(table.ctypes.data), np.int64(0), one, one, one, one, np.int64(0), nbytes,
                np.int64(0), 0, code,
            )  # fmt: skip
        _meet_or_raise(words, rank, wanted, nbytes)

    return copy_from_root


def _dtype_of(array: Any) -> np.dtype[Any] | None:
    """Return the dtype of a Numba array type that can be reduced here."""
    if not isinstance(array, types.Array) or array.layout not in "CF" or not array.mutable:
        return None
    number = array.dtype
    if isinstance(number, (types.Integer, types.Float)):
        return np.dtype(str(number))
    return None


def _elements(array: Any) -> int:
    """Return a number that differs where the elements of two arrays do not correspond."""
    order = array.layout if array.ndim > 1 else ""
    return (zlib.crc32(f"{array.dtype} {order}".encode()) >> 1) * _ELEMENTS
