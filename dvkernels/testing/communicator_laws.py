"""What every communicator must do, ours and others'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce as fold
from typing import Any

import ml_dtypes
import numpy as np

from dvkernels import reduce_op
from dvkernels.communicators.base import Communicator
from dvkernels.reduce_op import ReduceOp

__all__ = ["check_communicator"]

_DTYPES = ("float32", "float64", "complex64", "int32", "uint8", "float16", "bfloat16", "bool")
_SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7, 3), (4099,))
_COMBINE: dict[ReduceOp, Any] = {
    ReduceOp.SUM: np.add,
    ReduceOp.MEAN: np.add,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
    ReduceOp.PROD: np.multiply,
}


def check_communicator(
    make: Callable[[int], Communicator],
    sizes: Sequence[int] = (1, 2, 3, 5),
    *,
    dtypes: Sequence[str] = _DTYPES,
    local: Sequence[int] | None = None,
) -> None:
    """Assert the laws of the :class:`Communicator` protocol.

    Parameters
    ----------
    make : callable
        Makes a communicator of so many ranks.
    sizes : sequence of int
        Numbers of ranks to try.
    dtypes : sequence of str
        Those that the communicator supports.
    local : sequence of int, optional
        The ranks of this process, where every process calls this; all if not given.

    Raises
    ------
    AssertionError
        A law is broken; the message names verb, size, op, dtype and shape.

    Notes
    -----
    Against NumPy on small whole numbers, whose sums no order of additions changes: every verb,
    every op that is defined for the dtype, scalars, empty arrays, lengths that the ranks do not
    divide, arrays that are not contiguous. Results are new and writable, share nothing with the
    inputs or each other, and the inputs stay as they were. Random numbers give the same bits on
    every rank and in every call. NaN of any rank reaches minimum and maximum.

    Examples
    --------
    >>> from dvkernels.communicators.local import Local
    >>> from dvkernels.testing import check_communicator
    >>> check_communicator(lambda size: Local(size, "ring"), sizes=[2], dtypes=["float32"])
    """
    for size in sizes:
        communicator = make(size)
        what = f"{type(communicator).__name__} of {size}"
        assert isinstance(communicator, Communicator), f"{what} lacks methods of the protocol"
        assert communicator.size == size, f"{what} says its size is {communicator.size}"
        here = _Here(communicator, range(size) if local is None else local)
        for dtype in dtypes:
            for shape in _SHAPES:
                _check_values(here, what, np.dtype(_named(dtype)), shape)
        _check_nan(here, what)
        _check_determinism(here, what)


class _Here:
    """The verbs over the values of all ranks, of which this process brings its own."""

    def __init__(self, communicator: Communicator, local: Sequence[int]) -> None:
        self._communicator, self.local = communicator, local
        self.size = communicator.size

    def own(self, values: Sequence[Any]) -> list[Any]:
        return [values[rank] for rank in self.local]

    def all_reduce(self, values: Sequence[Any], op: ReduceOp, out: Any = None) -> list[Any]:
        into = None if out is None else self.own(out)
        return self._communicator.all_reduce(self.own(values), op, into)

    def reduce(self, values: Sequence[Any], op: ReduceOp) -> Any:
        return self._communicator.reduce(self.own(values), op)

    def reduce_scatter(self, values: Sequence[Any], op: ReduceOp) -> list[Any]:
        return self._communicator.reduce_scatter(self.own(values), op)

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        return self._communicator.all_gather(self.own(values), axis)

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        return self._communicator.broadcast(self.own(values), root)


def _named(dtype: str) -> Any:
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype


def _inputs(size: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng([size, *shape])
    return [np.asarray(rng.integers(0, 3, shape).astype(dtype)) for _ in range(size)]


def _ops(dtype: np.dtype[Any]) -> Iterator[ReduceOp]:
    for op in ReduceOp:
        try:
            reduce_op.check_dtype("check_communicator", op, dtype)
        except TypeError:
            continue
        yield op


def _check_values(
    communicator: _Here, what: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> None:
    size = communicator.size
    for op in _ops(dtype):
        values = _inputs(size, dtype, shape)
        right = _reduced(values, op)
        where = f"{what}, {op.name} of {dtype}{list(shape)}"
        with _Unchanged(values, where):
            every = communicator.own([right] * size)
            _agree(f"all_reduce, {where}", communicator.all_reduce(values, op), every, values)
            _agree(f"reduce, {where}", [communicator.reduce(values, op)], [right], values)
            strided = [_apart(value) for value in values]
            found = communicator.all_reduce(strided, op)
            _agree(f"all_reduce of strided arrays, {where}", found, every, strided)
            if shape:
                parts = communicator.own(np.array_split(right, size))
                found = communicator.reduce_scatter(values, op)
                _agree(f"reduce_scatter, {where}", found, parts, values)
        outs = [np.empty_like(right) for _ in range(size)]
        communicator.all_reduce(values, op, outs)
        _agree(f"all_reduce with out, {where}", communicator.own(outs), every, values)
        own = [value.copy() for value in values]
        communicator.all_reduce(own, op, own)
        _agree(f"all_reduce in place, {where}", communicator.own(own), every, values)
    values = _inputs(size, dtype, shape)
    with _Unchanged(values, what):
        for root in range(size):
            found = communicator.broadcast(values, root)
            where = f"broadcast from {root}, {what}, {dtype}{list(shape)}"
            _agree(where, found, communicator.own([values[root]] * size), values)
        for axis in range(len(shape)):
            uneven = [np.repeat(value, rank + 1, axis) for rank, value in enumerate(values)]
            found = communicator.all_gather(uneven, axis)
            whole = np.concatenate(uneven, axis)
            where = f"all_gather along {axis}, {what}, {dtype}{list(shape)}"
            _agree(where, found, communicator.own([whole] * size), uneven)


def _reduced(values: Sequence[Any], op: ReduceOp) -> Any:
    dtype = values[0].dtype
    wide = reduce_op.working_dtype(dtype)
    with np.errstate(all="ignore"):
        total = fold(_COMBINE[op], [value.astype(wide) for value in values])
        if op is ReduceOp.MEAN:
            total = total / wide.type(len(values))
    return np.asarray(total).astype(dtype)


def _apart(value: Any) -> Any:
    """Return the same content with elements that do not lie side by side."""
    room = np.zeros((*value.shape, 2), value.dtype)
    room[..., 0] = value
    return room[..., 0]


def _agree(where: str, found: Sequence[Any], right: Sequence[Any], inputs: Sequence[Any]) -> None:
    assert len(found) == len(right), f"{where}: {len(found)} results instead of {len(right)}"
    for rank, (mine, wanted) in enumerate(zip(found, right, strict=True)):
        got = np.asarray(mine)
        kinds = f"{got.dtype}{got.shape} instead of {wanted.dtype}{wanted.shape}"
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), f"{where}: {kinds}"
        same = np.allclose(
            got.astype(np.complex128), wanted.astype(np.complex128), 1e-6, 0, equal_nan=True
        )
        assert same, f"{where}: rank {rank} got {got}, expected {wanted}"
        assert got.flags.writeable, f"{where}: rank {rank} got a read-only array"
        others = [*inputs, *found[:rank]]
        shared = any(np.shares_memory(got, other) for other in others)
        assert not shared, f"{where}: the result of rank {rank} shares memory with another array"


class _Unchanged:
    """Asserts that arrays are the same after as before."""

    def __init__(self, values: Sequence[Any], where: str) -> None:
        self._values, self._where = values, where
        self._before = [value.tobytes() for value in values]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        after = [value.tobytes() for value in self._values]
        assert after == self._before, f"{self._where}: an input was changed"


def _check_nan(communicator: _Here, what: str) -> None:
    """Whichever rank brings NaN, minimum and maximum are NaN there and only there."""
    for op in (ReduceOp.MIN, ReduceOp.MAX):
        for bad in range(communicator.size):
            values = [np.array([1.0, 2.0], np.float32) for _ in range(communicator.size)]
            values[bad][0] = np.nan
            right = [np.array([np.nan, 2.0], np.float32)] * len(communicator.local)
            where = f"{op.name} where rank {bad} has NaN, {what}"
            _agree(f"all_reduce, {where}", communicator.all_reduce(values, op), right, values)
            _agree(f"reduce, {where}", [communicator.reduce(values, op)], right[:1], values)


def _check_determinism(communicator: _Here, what: str) -> None:
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(10_007).astype(np.float32) for _ in range(communicator.size)]
    first = communicator.all_reduce(values, ReduceOp.SUM)
    for again in (first, communicator.all_reduce(values, ReduceOp.SUM)):
        for rank, result in enumerate(again):
            same = result.tobytes() == first[0].tobytes()
            assert same, f"{what}: rank {rank} got other bits than rank 0, or than before"
