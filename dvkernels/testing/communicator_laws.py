"""Laws of communicators, those of the package and third-party ones."""

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
        Called with a number of ranks; returns a communicator of that size.
    sizes : sequence of int
        Numbers of ranks to test.
    dtypes : sequence of str
        Dtypes that the communicator supports.
    local : sequence of int, optional
        Ranks of this process, if the ranks are spread over several processes, each of which calls
        this function; all ranks if not given.

    Raises
    ------
    AssertionError
        A law is broken; the message names verb, size, op, dtype and shape.

    Notes
    -----
    Results are compared with NumPy on small integers, whose sums do not depend on the order of the
    additions: every verb, every op that is defined for the dtype, scalars, empty arrays, lengths
    that the number of ranks does not divide, arrays that are not contiguous. Results are new and
    writable and share no memory with the inputs or each other; the inputs stay unchanged. Sums of
    random numbers have the same bits on every rank and in every call. Minimum and maximum propagate
    a NaN of any rank.

    Examples
    --------
    >>> from dvkernels.communicators.local import Local
    >>> from dvkernels.testing import check_communicator
    >>> check_communicator(lambda size: Local(size, "ring"), sizes=[2], dtypes=["float32"])
    """
    for size in sizes:
        communicator = make(size)
        subject = f"{type(communicator).__name__} of {size}"
        assert isinstance(communicator, Communicator), f"{subject} lacks methods of the protocol"
        assert communicator.size == size, f"{subject} says its size is {communicator.size}"
        local_ranks = _LocalRanks(communicator, range(size) if local is None else local)
        for dtype in dtypes:
            for shape in _SHAPES:
                _check_values(local_ranks, subject, np.dtype(_named(dtype)), shape)
        _check_nan(local_ranks, subject)
        _check_determinism(local_ranks, subject)


class _LocalRanks:
    """Verbs over the values of all ranks, of which this process contributes its local ones."""

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
    communicator: _LocalRanks, subject: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> None:
    size = communicator.size
    for op in _ops(dtype):
        values = _inputs(size, dtype, shape)
        expected = _reduced(values, op)
        case = f"{subject}, {op.name} of {dtype}{list(shape)}"
        with _UnchangedInputs(values, case):
            every = communicator.own([expected] * size)
            _compare(f"all_reduce, {case}", communicator.all_reduce(values, op), every, values)
            _compare(f"reduce, {case}", [communicator.reduce(values, op)], [expected], values)
            strided = [_strided(value) for value in values]
            results = communicator.all_reduce(strided, op)
            _compare(f"all_reduce of strided arrays, {case}", results, every, strided)
            if shape:
                parts = communicator.own(np.array_split(expected, size))
                results = communicator.reduce_scatter(values, op)
                _compare(f"reduce_scatter, {case}", results, parts, values)
        outs = [np.empty_like(expected) for _ in range(size)]
        communicator.all_reduce(values, op, outs)
        _compare(f"all_reduce with out, {case}", communicator.own(outs), every, values)
        own_values = [value.copy() for value in values]
        communicator.all_reduce(own_values, op, own_values)
        _compare(f"all_reduce in place, {case}", communicator.own(own_values), every, values)
    values = _inputs(size, dtype, shape)
    with _UnchangedInputs(values, subject):
        for root in range(size):
            results = communicator.broadcast(values, root)
            case = f"broadcast from {root}, {subject}, {dtype}{list(shape)}"
            _compare(case, results, communicator.own([values[root]] * size), values)
        for axis in range(len(shape)):
            uneven = [np.repeat(value, rank + 1, axis) for rank, value in enumerate(values)]
            results = communicator.all_gather(uneven, axis)
            whole = np.concatenate(uneven, axis)
            case = f"all_gather along {axis}, {subject}, {dtype}{list(shape)}"
            _compare(case, results, communicator.own([whole] * size), uneven)


def _reduced(values: Sequence[Any], op: ReduceOp) -> Any:
    dtype = values[0].dtype
    wide = reduce_op.working_dtype(dtype)
    with np.errstate(all="ignore"):
        total = fold(_COMBINE[op], [value.astype(wide) for value in values])
        if op is ReduceOp.MEAN:
            total = total / wide.type(len(values))
    return np.asarray(total).astype(dtype)


def _strided(value: Any) -> Any:
    """Return a copy whose elements are not contiguous."""
    padded = np.zeros((*value.shape, 2), value.dtype)
    padded[..., 0] = value
    return padded[..., 0]


def _compare(
    case: str, results: Sequence[Any], expected: Sequence[Any], inputs: Sequence[Any]
) -> None:
    assert len(results) == len(expected), (
        f"{case}: {len(results)} results instead of {len(expected)}"
    )
    for rank, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        got = np.asarray(result)
        kinds = f"{got.dtype}{got.shape} instead of {wanted.dtype}{wanted.shape}"
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), f"{case}: {kinds}"
        same = np.allclose(
            got.astype(np.complex128), wanted.astype(np.complex128), 1e-6, 0, equal_nan=True
        )
        assert same, f"{case}: rank {rank} got {got}, expected {wanted}"
        assert got.flags.writeable, f"{case}: rank {rank} got a read-only array"
        others = [*inputs, *results[:rank]]
        shared = any(np.shares_memory(got, other) for other in others)
        assert not shared, f"{case}: the result of rank {rank} shares memory with another array"


class _UnchangedInputs:
    """Context manager that asserts that arrays are unchanged."""

    def __init__(self, values: Sequence[Any], case: str) -> None:
        self._values, self._case = values, case
        self._before = [value.tobytes() for value in values]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        after = [value.tobytes() for value in self._values]
        assert after == self._before, f"{self._case}: an input was changed"


def _check_nan(communicator: _LocalRanks, subject: str) -> None:
    """Assert that minimum and maximum are NaN exactly where one rank contributes NaN."""
    for op in (ReduceOp.MIN, ReduceOp.MAX):
        for nan_rank in range(communicator.size):
            values = [np.array([1.0, 2.0], np.float32) for _ in range(communicator.size)]
            values[nan_rank][0] = np.nan
            expected = [np.array([np.nan, 2.0], np.float32)] * len(communicator.local)
            case = f"{op.name} where rank {nan_rank} has NaN, {subject}"
            _compare(f"all_reduce, {case}", communicator.all_reduce(values, op), expected, values)
            _compare(f"reduce, {case}", [communicator.reduce(values, op)], expected[:1], values)


def _check_determinism(communicator: _LocalRanks, subject: str) -> None:
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(10_007).astype(np.float32) for _ in range(communicator.size)]
    first = communicator.all_reduce(values, ReduceOp.SUM)
    for again in (first, communicator.all_reduce(values, ReduceOp.SUM)):
        for rank, result in enumerate(again):
            same = result.tobytes() == first[0].tobytes()
            assert same, f"{subject}: rank {rank} got other bits than rank 0, or than before"
