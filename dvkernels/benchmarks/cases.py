"""Benchmark cases of the collectives: inputs, the call, NumPy's result, the least bytes moved.

Inputs are random whole numbers, small enough that every sum is exact in any order and dtype, so
that a single wrong element is found with every algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dvkernels import kernels, reduce_op
from dvkernels.errors import AlgorithmError, BufferMismatchError, UnsupportedDTypeError
from dvkernels.reduce_op import ReduceOp

__all__ = ["COLLECTIVES", "Case", "case", "dtype_of"]

Array = np.ndarray[Any, Any]


class _Collective(NamedTuple):
    """Call and lower bounds of a collective, for R replicas of S bytes."""

    call: Callable[..., Any]  # (buffers, outs, op, algorithm)
    outs: Callable[[list[Array]], list[Array]]  # preallocated outputs
    expected: Callable[[list[Array], ReduceOp], list[Array]]
    moved: Callable[[int], int]  # R -> multiples of S, with streaming stores if out of place
    bus: Callable[[int], float]  # R -> busbw / algbw, as in nccl-tests
    reduces: bool


def _reduced(buffers: list[Array], op: ReduceOp) -> Array:
    """Return NumPy's reduction; 16-bit floats are accumulated in float32 and rounded once."""
    dtype = buffers[0].dtype
    wide = np.dtype(np.float32) if reduce_op.is_half(dtype) else dtype
    stacked = [buffer.astype(wide, copy=False) for buffer in buffers]
    folds: dict[ReduceOp, Callable[[Array, Array], Array]] = {
        ReduceOp.MIN: np.minimum,
        ReduceOp.MAX: np.maximum,
        ReduceOp.PROD: np.multiply,
    }
    total = stacked[0].copy()
    for other in stacked[1:]:
        total = folds.get(op, np.add)(total, other)
    if op is ReduceOp.MEAN:
        total = total / wide.type(len(buffers))
    return total.astype(dtype, copy=False)


def _parts(array: Array, count: int) -> list[Array]:
    return np.array_split(array, count)


def _exchanged(buffers: list[Array]) -> list[Array]:
    count = len(buffers)
    return [
        np.concatenate([_parts(buffer, count)[rank] for buffer in buffers]) for rank in range(count)
    ]


COLLECTIVES: dict[str, _Collective] = {
    "all_reduce": _Collective(
        lambda buffers, outs, op, algorithm: kernels.all_reduce(buffers, op, algorithm=algorithm),
        list,
        lambda buffers, op: [_reduced(buffers, op)] * len(buffers),
        lambda count: 2 * count,
        lambda count: 2 * (count - 1) / count,
        True,
    ),
    "broadcast": _Collective(
        lambda buffers, outs, op, algorithm: kernels.broadcast(buffers),
        list,
        lambda buffers, op: [buffers[0]] * len(buffers),
        lambda count: count,
        lambda count: 1.0,
        False,
    ),
    "reduce": _Collective(
        lambda buffers, outs, op, algorithm: kernels.reduce(buffers, op, out=outs[0]),
        lambda buffers: [np.zeros_like(buffers[0])],
        lambda buffers, op: [_reduced(buffers, op)],
        lambda count: count + 1,
        lambda count: 1.0,
        True,
    ),
    "reduce_scatter": _Collective(
        lambda buffers, outs, op, algorithm: kernels.reduce_scatter(buffers, op, out=outs),
        lambda buffers: [np.zeros_like(part) for part in _parts(buffers[0], len(buffers))],
        lambda buffers, op: _parts(_reduced(buffers, op), len(buffers)),
        lambda count: count + 1,
        lambda count: (count - 1) / count,
        True,
    ),
    "all_gather": _Collective(
        lambda buffers, outs, op, algorithm: kernels.all_gather(buffers, out=outs),
        lambda buffers: [np.zeros_like(np.concatenate(buffers)) for _ in buffers],
        lambda buffers, op: [np.concatenate(buffers)] * len(buffers),
        lambda count: count + count * count,
        lambda count: float(count - 1),
        False,
    ),
    "all_to_all": _Collective(
        lambda buffers, outs, op, algorithm: kernels.all_to_all(buffers, out=outs),
        lambda buffers: [np.zeros_like(result) for result in _exchanged(buffers)],
        lambda buffers, op: _exchanged(buffers),
        lambda count: 2 * count,
        lambda count: (count - 1) / count,
        False,
    ),
}


@dataclass(frozen=True)
class Case:
    """A collective with its size, dtype, operation, replicas and algorithm."""

    collective: str
    nbytes: int  # of one replica's buffer
    dtype: np.dtype[Any]
    op: ReduceOp
    num_replicas: int
    algorithm: str

    @property
    def count(self) -> int:
        """Elements of one replica's buffer."""
        return max(1, self.nbytes // self.dtype.itemsize)

    @property
    def moved(self) -> int:
        """The least bytes that must be read and written."""
        multiples = COLLECTIVES[self.collective].moved(self.num_replicas)
        return multiples * self.count * self.dtype.itemsize

    @property
    def footprint(self) -> int:
        """The bytes of all arrays of a measurement."""
        return 3 * max(self.moved, 2 * self.num_replicas * self.nbytes)

    def random_buffers(self, seed: int) -> list[Array]:
        """Return random inputs whose reductions are exact."""
        rng = np.random.default_rng(seed)
        largest = 2 if self.op is ReduceOp.PROD else 4
        low = 1 if self.op is ReduceOp.PROD else 0 if self.dtype.kind in "ub" else -largest
        return [
            rng.integers(low, largest + 1, self.count, dtype=np.int8).astype(self.dtype)
            for _ in range(self.num_replicas)
        ]

    @property
    def most_repeats(self) -> int:
        """Number of calls in place before the inputs must be renewed.

        Each sum in place multiplies the values by the number of replicas. Overflowed values, or
        integers that wrapped to zero, would distort the times: zeros are written twice as fast.
        """
        grows = self.collective == "all_reduce" and self.op is ReduceOp.SUM
        if not grows or self.num_replicas == 1:
            return 1 << 30
        widths = {"float16": 10, "bfloat16": 100, "float32": 100, "complex64": 100}
        bits = 8 * self.dtype.itemsize - 4
        room = widths.get(self.dtype.name, bits if self.dtype.kind in "iu" else 500)
        return max(1, int(room / math.log2(self.num_replicas)))

    def steady_buffers(self, seed: int) -> list[Array]:
        """Return inputs that stay neither zero nor infinite over :attr:`most_repeats` calls."""
        buffers = self.random_buffers(seed)
        for buffer in buffers:
            buffer[buffer == 0] = 1
            if self.op is ReduceOp.PROD:
                buffer[...] = 1
            elif self.dtype.kind in "fcV" and self.dtype.name != "float16":
                buffer *= self.dtype.type(2.0**-50)
        return buffers

    def caller(self, buffers: list[Array]) -> tuple[Callable[[], Any], list[Array]]:
        """Return the call over ``buffers``, and the arrays that receive its results."""
        collective = COLLECTIVES[self.collective]
        outs = collective.outs(buffers)
        op, algorithm, call = self.op, self.algorithm, collective.call
        return lambda: call(buffers, outs, op, algorithm), outs

    def probed(self, buffers: list[Array], outs: list[Array]) -> tuple[list[Array], list[Array]]:
        """Return the arrays that the probe reads and those it writes; none of these: in place."""
        if self.collective == "all_reduce":
            return buffers, []
        if self.collective == "broadcast":
            return buffers[:1], buffers[1:]
        return buffers, outs

    def wrong_elements(self, seed: int) -> int:
        """Return the number of result elements that differ from NumPy's, on random inputs."""
        buffers = self.random_buffers(seed)
        expected = COLLECTIVES[self.collective].expected(
            [buffer.copy() for buffer in buffers], self.op
        )
        call, results = self.caller(buffers)
        call()
        pairs = zip(results, expected, strict=True)
        return sum(int(np.count_nonzero(result != right)) for result, right in pairs)

    def rates(self, seconds: float) -> tuple[float, float]:
        """Return algbw and busbw in GB/s."""
        algbw = self.count * self.dtype.itemsize / seconds / 1e9
        return algbw, algbw * COLLECTIVES[self.collective].bus(self.num_replicas)


def dtype_of(name: str) -> np.dtype[Any]:
    """Return a dtype by name, bfloat16 included."""
    try:
        return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    except TypeError:
        raise UnsupportedDTypeError(
            f"bench: {name!r} is no dtype; use one such as float32"
        ) from None


def case(
    collective: str, nbytes: int, dtype: str, op: str, num_replicas: int, algorithm: str
) -> Case:
    """Return a checked case; errors are those of the library."""
    if collective not in COLLECTIVES:
        known = ", ".join(COLLECTIVES)
        raise AlgorithmError(f"bench: {collective!r} is no collective; use one of {known}")
    if num_replicas < 1 or nbytes < 1:
        raise BufferMismatchError(
            f"bench: expected at least 1 replica and 1 byte; got {num_replicas} and {nbytes}"
        )
    if algorithm not in ("auto", "direct", "ring"):
        raise AlgorithmError(f"bench: {algorithm!r} is no algorithm; use auto, direct or ring")
    known_op = reduce_op.parse(op)
    assert isinstance(known_op, ReduceOp)
    known_dtype = dtype_of(dtype)
    if COLLECTIVES[collective].reduces:
        reduce_op.check_dtype("bench", known_op, known_dtype)
    elif known_dtype.hasobject:
        raise UnsupportedDTypeError(f"bench: {known_dtype} is not a numeric dtype")
    return Case(collective, nbytes, known_dtype, known_op, num_replicas, algorithm)
