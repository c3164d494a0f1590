"""Collectives inside compiled code, without returning to Python.

A replica's own ``@numba.njit(nogil=True)`` function calls :func:`barrier`, :func:`all_reduce` and
:func:`broadcast` with the ``state`` of a :class:`Group` and its rank. A waiting replica spins, and
now and then yields its core; a deadline and an abort word end every wait. Each replica publishes
the fingerprint of its call and compares those of all: nothing is written unless all are equal.

The barrier is that of shm_barrier.py, with the threads as its members. The words that they publish
are the addresses of their arrays.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import extending, types

from dvkernels.errors import CollectiveMismatchError, CollectiveTimeoutError
from dvkernels.kernels import arithmetic, jit
from dvkernels.kernels.cpu.engine import intrinsics, loops, records, shm_barrier
from dvkernels.kernels.cpu.engine.shm_barrier import AGREED, ENDED, LATE, MISMATCHED
from dvkernels.kernels.cpu.engine.span import span
from dvkernels.reduce_op import ReduceOp, parse

__all__ = ["Group", "all_reduce", "barrier", "broadcast"]


class _GroupHead(NamedTuple):
    num_replicas: int
    timeout_ms: int
    layout: int


# The words of a state: the head, unused words, the end of the group, the replicas' control lines.
_head_at = records.view(records.layout(_GroupHead))
_LINES = 32
_END = _LINES - records.LINE_NBYTES // 8
_LAYOUT = 0x64766B67726F7570 + 3  # changes with the meaning of the words: users cache compiled code
_PAUSES_PER_CLOCK_READ = 1 << 16  # about 2 ms
# The fields of a fingerprint: a verb, an operation, a root, and the type of the elements. A
# multiple of the length is added: equal fields with another length make another fingerprint.
_BARRIER, _ALL_REDUCE, _BROADCAST = range(1, 4)
_OPERATION, _ROOT, _ELEMENTS = 1 << 4, 1 << 8, 1 << 32
_LENGTH = 0x1E3779B97F4A7C15


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
        self.state = intrinsics.words(_LINES + 8 * self.num_replicas)
        self.reset()

    def abort(self) -> None:
        """End every wait in this group, now and later, with ``CollectiveMismatchError``."""
        self.state[_END] = ENDED

    def reset(self) -> None:
        """Make the group usable again. No replica may be waiting in it."""
        self.state[:] = 0
        timeout_ms = max(1, round(1000 * self.timeout_seconds))
        self.state[: len(_GroupHead._fields)] = _GroupHead(self.num_replicas, timeout_ms, _LAYOUT)


@jit.njit(nogil=True)
def _await_all(state, rank, epoch):  # type: ignore[no-untyped-def]
    """Wait for all replicas until the deadline; return the outcome."""
    head, lines = _head_at(state), state + 8 * _LINES
    end = shm_barrier.end_at(lines)
    deadline = np.int64(0)
    while True:
        outcome = shm_barrier.await_members(
            lines, head.num_replicas, rank, epoch, _PAUSES_PER_CLOCK_READ
        )
        if outcome == ENDED:
            reason = intrinsics.load_shared(end, "reason")
            return ENDED if reason == LATE else reason  # only who waited in vain reports LATE
        if outcome == LATE:
            now = intrinsics.milliseconds()
            if deadline == 0:
                deadline = now + head.timeout_ms
            if now <= deadline:
                continue
        if outcome != AGREED:
            intrinsics.store_shared(end, "reason", outcome)
        return outcome


@jit.njit(nogil=True)
def _rendezvous(state, rank, fingerprint, length, address):  # type: ignore[no-untyped-def]
    """Publish a call and an address, and wait for all replicas; return the epoch, or raise."""
    lines = state + 8 * _LINES
    epoch = shm_barrier.epoch_of(lines, rank) + 1
    shm_barrier.arrive_at(lines, rank, epoch, fingerprint + length * _LENGTH, address)
    outcome = _await_all(state, rank, epoch)
    if outcome == LATE:
        raise CollectiveTimeoutError("a replica of the group waited in vain for the others")
    if outcome == MISMATCHED:
        raise CollectiveMismatchError(
            "the replicas of the group called different functions, or with different operations, "
            "roots, dtypes or lengths; nothing was written: make the same call in all of them, "
            "then reset() the group"
        )
    if outcome == ENDED:
        raise CollectiveMismatchError(
            "the group was aborted: a replica failed, was late or made a different call"
        )
    return epoch


@jit.njit(nogil=True)
def _published(state, replica, epoch):  # type: ignore[no-untyped-def]
    """Return the address that a replica has published."""
    return intrinsics.load_shared(shm_barrier.vote_at(state + 8 * _LINES, replica, epoch), "word")


@jit.njit(nogil=True)
def _abort(state):  # type: ignore[no-untyped-def]
    intrinsics.store_shared(shm_barrier.end_at(state + 8 * _LINES), "reason", ENDED)


@jit.njit(nogil=True)
def _check_state(state, rank, root):  # type: ignore[no-untyped-def]
    """Return the address of a state; raise unless it is a group's, with such a rank and root."""
    address = np.int64(state.ctypes.data)
    head = _head_at(address)
    if state.size * state.itemsize < 8 * _LINES or head.layout != _LAYOUT:
        raise ValueError(
            "that is no state of a Group, or compiled code of another version of dvkernels was "
            "kept by numba.njit(cache=True): delete its cache"
        )
    num_replicas = head.num_replicas
    if rank < 0 or rank >= num_replicas or root < 0 or root >= num_replicas:
        _abort(address)
        raise ValueError("a rank or a root is not one of the group's")
    return address


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

    Examples
    --------
    >>> import numba
    >>> from dvkernels.kernels.cpu import group
    >>> alone = group.Group(1)
    >>> numba.njit(lambda state: group.barrier(state, 0))(alone.state)
    """
    zero = np.int64(0)
    address = _check_state(state, np.int64(rank), zero)
    _rendezvous(address, np.int64(rank), np.int64(_BARRIER), zero, zero)


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

    Examples
    --------
    >>> import numba
    >>> import numpy as np
    >>> from dvkernels.kernels.cpu import group
    >>> alone, values = group.Group(1), np.array([1.0, 3.0])
    >>> numba.njit(lambda state, array: group.all_reduce(state, 0, array))(alone.state, values)
    >>> values  # the sum of one replica; `Group` has an example of two
    array([1., 3.])
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
        rank, zero = np.int64(rank), np.int64(0)
        words = _check_state(state, rank, zero)
        length = np.int64(array.size)
        epoch = _rendezvous(words, rank, fingerprint, length, np.int64(array.ctypes.data))
        num_replicas = _head_at(words).num_replicas
        table = np.empty(num_replicas, np.int64)
        for k in range(num_replicas):
            table[k] = _published(words, k, epoch)
        first, count = loops.part(length, num_replicas, rank)
        divisor = num_replicas if is_mean else np.int64(1)
        if count > 0:
            span(
                intrinsics.address_of(table), zero, num_replicas, zero, num_replicas, divisor,
                first, count, zero, operation, code,
            )  # fmt: skip
        intrinsics.keep_alive(table)
        _rendezvous(words, rank, fingerprint, length, zero)

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

    Examples
    --------
    >>> import numba
    >>> import numpy as np
    >>> from dvkernels.kernels.cpu import group
    >>> alone, values = group.Group(1), np.array([1.0, 3.0])
    >>> numba.njit(lambda state, array: group.broadcast(state, 0, array, 0))(alone.state, values)
    >>> values
    array([1., 3.])
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
            _abort(words)
            raise ValueError("group.broadcast would write into a read-only array")
        epoch = _rendezvous(words, rank, fingerprint, nbytes, own)
        zero, one = np.int64(0), np.int64(1)
        if rank != root:
            table = np.array([_published(words, root, epoch), own])
            span(
                intrinsics.address_of(table), zero, one, one, one, one, zero, nbytes, zero, 0, code
            )
            intrinsics.keep_alive(table)
        _rendezvous(words, rank, fingerprint, nbytes, zero)

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
