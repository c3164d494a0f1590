"""Collectives inside compiled code, without returning to Python.

A replica's own ``@numba.njit(nogil=True)`` function calls :func:`barrier`, :func:`all_reduce` and
:func:`broadcast` with the ``state`` of a :class:`Group` and its rank. A waiting replica spins, and
now and then yields its core; a deadline and an abort word end every wait. Each replica publishes
the fingerprint of its call and compares those of all: nothing is written unless all are equal.

The barrier is centralized: a counter of arrivals, and an epoch that takes the place of the sense
of a sense-reversing barrier (J. M. Mellor-Crummey, M. L. Scott, ACM Trans. Comput. Syst. 9(1),
21-65, 1991, doi:10.1145/103727.103729).

    words of a state, a cache line each where several threads write:
    [0] arrivals   [8] epoch   [16] why the group ended, if it did
    [24] replicas   [25] timeout in ms   [26] version of this layout
    [32 + 8 r] slot of replica r: the address of its array, then
        [2] [3] fingerprint of its call in an even, in an odd epoch   [4] [5] its elements

A replica enters epoch k + 1 only after it has compared the fingerprints of epoch k, so its own
stays readable until it enters epoch k + 2: words for two epochs are enough.
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
_FINGERPRINT, _LENGTH = 2, 4  # words of a slot, for even epochs
_LAYOUT = 0x64766B67726F7570 + 2  # changes with the meaning of the words: users cache compiled code
_TURNS_PER_CLOCK_READ = 1 << 16  # about 2 ms
# The fields of a fingerprint: a verb, an operation, a root, and the type of the elements.
_BARRIER, _ALL_REDUCE, _BROADCAST = range(1, 4)
_OPERATION, _ROOT, _ELEMENTS = 1 << 4, 1 << 8, 1 << 32
# Outcomes of a rendezvous.
_AGREED, _LATE, _ABORTED, _MISMATCHED = range(4)

_int64: Any = types.int64
_int32: Any = types.int32
if os.name == "posix":
    _clock: Any = types.ExternalFunction("clock_gettime", _int32(_int32, _int64))
    _MONOTONIC = time.CLOCK_MONOTONIC

    @jit.njit(nogil=True)
    def _milliseconds():  # type: ignore[no-untyped-def]
        """Return the time of a monotonic clock."""
        found = np.zeros(2, np.int64)  # seconds and nanoseconds
        _clock(_MONOTONIC, np.int64(found.ctypes.data))
        return found[0] * 1000 + found[1] // 1_000_000
else:
    _ticks: Any = types.ExternalFunction("GetTickCount64", _int64())

    @jit.njit(nogil=True)
    def _milliseconds():  # type: ignore[no-untyped-def]
        """Return the time of a monotonic clock."""
        return _ticks()


class Group:
    """Group of replicas, each on a thread of its own, for collectives inside compiled code.

    Parameters
    ----------
    num_replicas : int
        Number of replicas. Each uses its own rank, from 0.
    timeout_seconds : float
        How long a replica waits for the others.

    Attributes
    ----------
    state : ndarray of int64, shape (32 + 8 num_replicas,)
        Argument of the compiled functions.

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
                f"a Group needs at least 1 replica and a timeout of 0 to 1e9 s; got "
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
        """Make the group usable again. No replica may be waiting in it."""
        self.state[:] = 0
        self.state[24] = self.num_replicas
        self.state[25] = max(1, round(1000 * self.timeout_seconds))
        self.state[26] = _LAYOUT


@jit.njit(nogil=True)
def _abort_outcome(state):  # type: ignore[no-untyped-def]
    outcome = intrinsics.load_shared(state, 16)
    return _ABORTED if outcome == _LATE else outcome  # only the replica that waited reports LATE


@jit.njit(nogil=True)
def _rendezvous(state, rank, fingerprint, length):  # type: ignore[no-untyped-def]
    """Publish a fingerprint, wait for all replicas, compare theirs; return the outcome."""
    if intrinsics.load_shared(state, 16) != _AGREED:
        return _abort_outcome(state)
    epoch = intrinsics.load_shared(state, 8)
    num_replicas = intrinsics.load(state, 24)
    parity = epoch & 1
    slot = state + 8 * (_SLOTS + 8 * rank)
    intrinsics.store_shared(slot, _FINGERPRINT + parity, fingerprint)
    intrinsics.store_shared(slot, _LENGTH + parity, length)
    if intrinsics.fetch_add(state, 0, 1) == num_replicas - 1:
        intrinsics.store_shared(state, 0, 0)
        intrinsics.store_shared(state, 8, epoch + 1)
    deadline = np.int64(0)
    turn = 0
    while intrinsics.load_shared(state, 8) == epoch:
        if intrinsics.load_shared(state, 16) != _AGREED:
            return _abort_outcome(state)
        intrinsics.relax(turn)
        turn += 1
        if turn % _TURNS_PER_CLOCK_READ == 0:
            now = _milliseconds()
            if deadline == 0:
                deadline = now + intrinsics.load(state, 25)
            elif now > deadline:
                intrinsics.store_shared(state, 16, _LATE)
                return _LATE
    for other in range(num_replicas):
        other_slot = state + 8 * (_SLOTS + 8 * other)
        if (
            intrinsics.load_shared(other_slot, _FINGERPRINT + parity) != fingerprint
            or intrinsics.load_shared(other_slot, _LENGTH + parity) != length
        ):
            intrinsics.store_shared(state, 16, _MISMATCHED)
            return _MISMATCHED
    return _abort_outcome(state)


@jit.njit(nogil=True)
def _rendezvous_or_raise(state, rank, fingerprint, length):  # type: ignore[no-untyped-def]
    outcome = _rendezvous(state, rank, fingerprint, length)
    if outcome == _LATE:
        raise CollectiveTimeoutError("a replica of the group waited in vain for the others")
    if outcome == _MISMATCHED:
        raise CollectiveMismatchError(
            "the replicas of the group called different functions, or with different operations, "
            "roots, dtypes or lengths; nothing was written: make the same call in all of them, "
            "then reset() the group"
        )
    if outcome == _ABORTED:
        raise CollectiveMismatchError(
            "the group was aborted: a replica failed, was late or made a different call"
        )


@jit.njit(nogil=True)
def _check_state(state, rank, root):  # type: ignore[no-untyped-def]
    """Return the address of a state; raise unless it is a group's, with such a rank and root."""
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
def _publish(words, rank, address, fingerprint, length):  # type: ignore[no-untyped-def]
    """Publish the address of this replica's array, and meet the others."""
    intrinsics.store_shared(words + 8 * (_SLOTS + 8 * rank), 0, address)
    _rendezvous_or_raise(words, rank, fingerprint, length)


@jit.njit(called_with="(int64[::1], int64)", nogil=True)
def barrier(state, rank):  # type: ignore[no-untyped-def]
    """Wait until every replica of the group has called this.

    Parameters
    ----------
    state : ndarray of int64
        ``state`` of a :class:`Group`.
    rank : int
        Rank of this replica.

    Raises
    ------
    CollectiveTimeoutError
        A replica did not call in time.
    CollectiveMismatchError
        A replica called another function, or the group was aborted.
    ValueError
        The rank is out of range, or the state is not a group's.

    Notes
    -----
    It takes 0.2 us with a core for each of two replicas.
    """
    words = _check_state(state, np.int64(rank), np.int64(0))
    _rendezvous_or_raise(words, np.int64(rank), np.int64(_BARRIER), np.int64(0))


def all_reduce(state: Any, rank: int, array: Any, op: str = "sum") -> None:
    """Leave the reduction in every replica's array; only in compiled code.

    Parameters
    ----------
    state : ndarray of int64
        ``state`` of a :class:`Group`.
    rank : int
        Rank of this replica.
    array : contiguous array of float32, float64 or integers, any shape
        Its dtype and size must be the same on all replicas. Overwritten.
    op : str, a literal
        ``"sum"``, ``"mean"`` (of floats), ``"min"``, ``"max"`` or ``"prod"``.

    Raises
    ------
    CollectiveTimeoutError, CollectiveMismatchError, ValueError
        As in :func:`barrier`; also where a replica passes another size, dtype or operation:
        nothing is written then.

    Notes
    -----
    Each of R replicas reduces its part of S bytes, so all cores work: 2 R S bytes, two barriers.
    The bits are those of ``kernels.direct_all_reduce``.
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
    fingerprint = _ALL_REDUCE + [*ReduceOp].index(known) * _OPERATION + _elements(array)

    def reduce_in_place(state, rank, array, op="sum"):  # type: ignore[no-untyped-def]
        rank = np.int64(rank)
        words = _check_state(state, rank, np.int64(0))
        length = np.int64(array.size)
        _publish(words, rank, np.int64(array.ctypes.data), fingerprint, length)
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
        _rendezvous_or_raise(words, rank, fingerprint, length)

    return reduce_in_place


def broadcast(state: Any, rank: int, array: Any, root: int) -> None:
    """Copy the root's array into every replica's; only in compiled code.

    Parameters
    ----------
    state, rank, array
        As in :func:`all_reduce`; any dtype of fixed size.
    root : int
        Rank of the replica whose array is copied.

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
        words = _check_state(state, rank, root)
        fingerprint = base + root * _ROOT
        nbytes = np.int64(array.size * array.itemsize)
        own = np.int64(array.ctypes.data)
        if rank != root and not is_mutable:
            intrinsics.store_shared(words, 16, _ABORTED)
            raise ValueError("group.broadcast would write into a read-only array")
        _publish(words, rank, own, fingerprint, nbytes)
        if rank != root:
            table = np.empty(2, np.int64)
            table[0] = intrinsics.load_shared(words + 8 * (_SLOTS + 8 * root), 0)
            table[1] = own
            one = np.int64(1)
            loops.span(
                np.int64(table.ctypes.data), np.int64(0), one, one, one, one, np.int64(0), nbytes,
                np.int64(0), 0, code,
            )  # fmt: skip
        _rendezvous_or_raise(words, rank, fingerprint, nbytes)

    return copy_from_root


def _dtype_of(array: Any) -> np.dtype[Any] | None:
    """Return the dtype of a Numba array type; None where it cannot be reduced here."""
    if not isinstance(array, types.Array) or array.layout not in "CF" or not array.mutable:
        return None
    number = array.dtype
    if isinstance(number, (types.Integer, types.Float)):
        return np.dtype(str(number))
    return None


def _elements(array: Any) -> int:
    """Return the field of a fingerprint for an array type: its dtype and memory order."""
    order = array.layout if array.ndim > 1 else ""
    return (zlib.crc32(f"{array.dtype} {order}".encode()) >> 1) * _ELEMENTS
