"""Reduction along axes of each replica's value, then over the replicas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dvkernels import reduce_op
from dvkernels.communicators.base import Communicator, Workers
from dvkernels.custom_reduction import CustomReduction
from dvkernels.devices import array_memory
from dvkernels.devices.buffers import Spec, spec
from dvkernels.errors import BufferMismatchError
from dvkernels.kernels import backends
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.values.distributed import is_integer

__all__: list[str] = []

_ALONG: dict[ReduceOp, Callable[..., Any]] = {
    ReduceOp.SUM: np.sum,
    ReduceOp.MEAN: np.sum,
    ReduceOp.MIN: np.min,
    ReduceOp.MAX: np.max,
    ReduceOp.PROD: np.prod,
}


def reduce_along(
    op: Reduction,
    arrays: list[Any],
    axis: int | Sequence[int],
    communicator: Communicator,
    workers: Workers,
) -> Any:
    """Return the reduction of all elements along the axes, over all replicas.

    Replicas may hold different numbers of elements along the axes, also none; MEAN divides the sum
    by the number of all of them. Sums and products of small integers and bool are as wide as
    NumPy's.
    """
    axes = _normalized(axis, arrays)
    dtype = _dtype_of_total(op, arrays[0].dtype)
    reduce_op.check_dtype("reduce", op, dtype)
    rest = [
        Spec(tuple(n for k, n in enumerate(array.shape) if k not in axes), array.dtype)
        for array in arrays
    ]
    for rank, left in enumerate(rest):
        if left != rest[0] or arrays[rank].ndim != arrays[0].ndim:
            raise BufferMismatchError(
                f"reduce along axes {axes} needs one dtype and one shape of what remains: replica "
                f"0 leaves {rest[0]}, replica {rank} leaves {left}"
            )
    count = sum(workers.exchange(sum(math.prod(array.shape[k] for k in axes) for array in arrays)))
    if count == 0 and op in (ReduceOp.MEAN, ReduceOp.MIN, ReduceOp.MAX):
        raise ValueError(
            f"reduce: {op.name} along axes {axes} of nothing: every replica's value is empty there"
        )
    if type(op) is CustomReduction:
        parts = [_combined_along(op, array, axes) for array in arrays]
        return communicator.reduce(parts, op)
    assert type(op) is ReduceOp
    if reduce_op.is_half(dtype):  # in float32, and rounded once
        arrays = [array.astype(reduce_op.working_dtype(dtype)) for array in arrays]
    working = reduce_op.working_dtype(dtype)
    parts = [
        array_memory.holding(array).apply(_along, array, op, axes, working) for array in arrays
    ]
    total = communicator.reduce(parts, ReduceOp.SUM if op is ReduceOp.MEAN else op)
    if op is ReduceOp.MEAN:
        array_memory.holding(total).apply(np.divide, total, total.dtype.type(count), total)
    return total.astype(dtype, copy=False)


def _dtype_of_total(op: Reduction, dtype: Any) -> Any:
    """Return the dtype of ``np.sum`` and ``np.prod`` along an axis: no narrower than int64."""
    if op in (ReduceOp.SUM, ReduceOp.PROD) and dtype.kind in "biu" and dtype.isnative:
        return np.sum(np.empty(0, dtype)).dtype
    return dtype


def _along(array: Any, op: ReduceOp, axes: tuple[int, ...], dtype: Any) -> Any:
    """Return one replica's elements along the axes combined; of none, what changes nothing."""
    rest = tuple(extent for k, extent in enumerate(array.shape) if k not in axes)
    if array.size == 0:
        return np.full_like(array, reduce_op.identity(op, dtype), dtype=dtype, shape=rest)
    extra = {} if op in (ReduceOp.MIN, ReduceOp.MAX) else {"dtype": dtype}
    return _ALONG[op](array, axis=axes, keepdims=True, **extra).reshape(rest)


def _combined_along(op: CustomReduction, array: Any, axes: tuple[int, ...]) -> Any:
    """Return one replica's elements along the axes combined, from the first to the last."""
    front = np.moveaxis(array, axes, range(len(axes)))
    rest = front.shape[len(axes) :]
    rows = front.reshape(-1, *rest)
    if len(rows) == 0:
        return np.full(rest, reduce_op.identity(op, array.dtype))
    return backends.of(rows).reduce([rows[k, ...] for k in range(len(rows))], op)


def _normalized(axis: int | Sequence[int], arrays: list[Any]) -> tuple[int, ...]:
    axes = [axis] if isinstance(axis, (int, np.integer)) else axis
    if not isinstance(axes, (list, tuple)) or not all(is_integer(one) for one in axes):
        raise TypeError(f"reduce: axis must be an integer or a list of them, got {axis!r}")
    ndim = arrays[0].ndim
    for one in axes:
        if not -ndim <= one < ndim:
            raise ValueError(f"reduce: axis {one} is out of range for {spec(arrays[0])}")
    found = sorted(int(one) % ndim for one in axes)
    if len(set(found)) < len(found):
        raise ValueError(f"reduce: an axis stands twice in {axis!r}")
    return tuple(found)
