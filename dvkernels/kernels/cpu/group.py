"""Collectives inside compiled code: replicas meet without returning to Python.

A replica's own ``@numba.njit(nogil=True)`` function calls :func:`barrier`, :func:`all_reduce` and
:func:`broadcast` with the ``state`` of a :class:`Group` and its rank. Each waits by spinning, then
by giving its core to others; a deadline and an abort word end every wait.

    words of a state, a cache line each where several threads write:
    [0] how many have arrived   [8] the number of barriers passed   [16] aborted
    [24] replicas   [25] patience in s
    [32 + 8 r] what replica r brings: the address, the elements, the root
"""

from __future__ import annotations

import os
from typing import Any

import numba
import numpy as np
from numba import extending, types

from dvkernels.errors import CollectiveMismatchError, CollectiveTimeoutError
from dvkernels.kernels import arithmetic, compiled
from dvkernels.kernels.cpu import elementwise, memory
from dvkernels.reduce_op import ReduceOp, parse

__all__ = ["Group", "all_reduce", "barrier", "broadcast"]


_SLOTS = 32
_TURNS_PER_LOOK = 1 << 16  # at the clock: about every 2 ms

# Whole seconds since 1970. A deadline may so be noticed up to a second late.
_int64: Any = types.int64
_seconds: Any = types.ExternalFunction("time" if os.name == "posix" else "_time64", _int64(_int64))


class Group:
    """Replicas, each on a thread of its own, that meet inside compiled code.

    Parameters
    ----------
    num_replicas : int
        How many. Each uses its own rank, from 0.
    timeout_seconds : float
        How long one waits for the others. Noticed up to a second late.

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
        self.state = memory.words(_SLOTS + 8 * self.num_replicas)
        self.reset()

    def abort(self) -> None:
        """End every wait in this group, now and later, with ``CollectiveMismatchError``."""
        self.state[16] = 1

    def reset(self) -> None:
        """Make the group usable again. Nobody may be waiting in it."""
        self.state[:] = 0
        self.state[24] = self.num_replicas
        self.state[25] = max(1, round(self.timeout_seconds))


@compiled.njit(nogil=True)
def _meet(state):  # type: ignore[no-untyped-def]
    """Wait for all; 0: they came, 1: the deadline passed, 2: aborted."""
    passed = memory.load_shared(state, 8)
    if memory.fetch_add(state, 0, 1) == memory.load(state, 24) - 1:
        memory.store_shared(state, 0, 0)
        memory.store_shared(state, 8, passed + 1)
        return 0 if memory.load_shared(state, 16) == 0 else 2
    deadline = np.int64(0)
    turn = 0
    while memory.load_shared(state, 8) == passed:
        if memory.load_shared(state, 16) != 0:
            return 2
        memory.relax(turn)
        turn += 1
        if turn % _TURNS_PER_LOOK == 0:
            now = _seconds(0)
            if deadline == 0:
                deadline = now + memory.load(state, 25)
            elif now > deadline:
                memory.store_shared(state, 16, 1)
                return 1
    return 0 if memory.load_shared(state, 16) == 0 else 2


@compiled.njit(nogil=True)
def _meet_or_raise(state):  # type: ignore[no-untyped-def]
    outcome = _meet(state)
    if outcome == 1:
        raise CollectiveTimeoutError("a replica of the group waited in vain for the others")
    if outcome == 2:
        raise CollectiveMismatchError(
            "the group was aborted: a replica failed, was late or brought another array"
        )


@compiled.njit(nogil=True)
def _bring(state, rank, address, length, root):  # type: ignore[no-untyped-def]
    """Show the others what this replica brings, and check that all bring the like."""
    num_replicas = memory.load(state, 24)
    if rank < 0 or rank >= num_replicas or root < 0 or root >= num_replicas:
        memory.store_shared(state, 16, 1)
        raise ValueError("a rank or a root is not one of the group's")
    slot = state + 8 * (_SLOTS + 8 * rank)
    memory.store_shared(slot, 0, address)
    memory.store_shared(slot, 1, length)
    memory.store_shared(slot, 2, root)
    _meet_or_raise(state)
    for other in range(num_replicas):
        theirs = state + 8 * (_SLOTS + 8 * other)
        if memory.load_shared(theirs, 1) != length or memory.load_shared(theirs, 2) != root:
            memory.store_shared(state, 16, 1)
            raise CollectiveMismatchError(
                "the replicas of the group brought arrays of different lengths, or other roots"
            )


@compiled.njit(called_with="(int64[::1], int64)", nogil=True)
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
    CollectiveTimeoutError, CollectiveMismatchError
        The others did not come in time; the group was aborted.

    Notes
    -----
    0.2 us with a core for each of two replicas.
    """
    _meet_or_raise(np.int64(state.ctypes.data))


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
        The others did not come in time; they brought another length, or the group was aborted;
        a rank out of range.

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

    def reduce_in_place(state, rank, array, op="sum"):  # type: ignore[no-untyped-def]
        words = np.int64(state.ctypes.data)
        length = np.int64(array.size)
        _bring(words, np.int64(rank), np.int64(array.ctypes.data), length, np.int64(0))
        num_replicas = memory.load(words, 24)
        table = np.empty(num_replicas, np.int64)
        for k in range(num_replicas):
            table[k] = memory.load_shared(words + 8 * (_SLOTS + 8 * k), 0)
        first, count = elementwise.part(length, num_replicas, np.int64(rank))
        divisor = num_replicas if is_mean else np.int64(1)
        if count > 0:
            elementwise.span(
                np.int64(table.ctypes.data), np.int64(0), num_replicas, np.int64(0), num_replicas,
                divisor, first, count, np.int64(0), operation, code,
            )  # fmt: skip
        _meet_or_raise(words)

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

    def copy_from_root(state, rank, array, root):  # type: ignore[no-untyped-def]
        words = np.int64(state.ctypes.data)
        nbytes = np.int64(array.size * array.itemsize)
        own = np.int64(array.ctypes.data)
        _bring(words, np.int64(rank), own, nbytes, np.int64(root))
        if rank != root:
            table = np.empty(2, np.int64)
            table[0] = memory.load_shared(words + 8 * (_SLOTS + 8 * root), 0)
            table[1] = own
            one = np.int64(1)
            elementwise.span(
                np.int64(table.ctypes.data), np.int64(0), one, one, one, one, np.int64(0), nbytes,
                np.int64(0), 0, code,
            )  # fmt: skip
        _meet_or_raise(words)

    return copy_from_root


def _dtype_of(array: Any) -> np.dtype[Any] | None:
    """Return the dtype of a Numba array type that can be reduced here."""
    if not isinstance(array, types.Array) or array.layout not in "CF" or not array.mutable:
        return None
    number = array.dtype
    if isinstance(number, (types.Integer, types.Float)):
        return np.dtype(str(number))
    return None
