"""Reduction along axes of each replica's array, then over the replicas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dvkernels import reduce_op
from dvkernels.communicators.base import Communicator, Workers
from dvkernels.custom_reduction import CustomReduction
from dvkernels.devices import array_memory
from dvkernels.devices.array_spec import Spec, spec
from dvkernels.errors import BufferMismatchError
from dvkernels.kernels import backends
from dvkernels.reduce_op import ReduceOp, Reduction
from dvkernels.values.scalar_checks import is_integer

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
    """Reduce the replicas' arrays along the axes, and the results over all replicas.

    Parameters
    ----------
    op : ReduceOp or CustomReduction
    arrays : list of array
        One per local replica, of one dtype. Lengths along the axes may differ, and may be 0.
    axis : int or sequence of int
    communicator : Communicator
        The collectives of the replicas.
    workers : Workers
        Exchange the numbers of elements.

    Returns
    -------
    array
        MEAN divides the sum by the number of elements of all replicas. The dtype of sums and
        products of bool and of integers below 64 bits is NumPy's wider one.
    """
    axes = _normalized(axis, arrays)
    dtype = _dtype_of_total(op, arrays[0].dtype)
    reduce_op.check_dtype("reduce", op, dtype)
    remaining = [
        Spec(tuple(n for k, n in enumerate(array.shape) if k not in axes), array.dtype)
        for array in arrays
    ]
    for rank, other in enumerate(remaining):
        if other != remaining[0] or arrays[rank].ndim != arrays[0].ndim:
            raise BufferMismatchError(
                f"reduce along axes {axes} needs one dtype and one shape of the remaining axes: "
                f"replica 0 leaves {remaining[0]}, replica {rank} leaves {other}"
            )
    count = sum(workers.exchange(sum(math.prod(array.shape[k] for k in axes) for array in arrays)))
    if count == 0 and op in (ReduceOp.MEAN, ReduceOp.MIN, ReduceOp.MAX):
        raise ValueError(
            f"reduce: {op.name} along axes {axes} of no elements: every replica's "
            f"value is empty there"
        )
    if type(op) is CustomReduction:
        parts = [_reduce_custom_along(op, array, axes) for array in arrays]
        return communicator.reduce(parts, op)
    assert type(op) is ReduceOp
    if reduce_op.is_half(dtype):  # accumulated in float32, rounded once
        arrays = [array.astype(reduce_op.working_dtype(dtype)) for array in arrays]
    working = reduce_op.working_dtype(dtype)
    parts = [
        array_memory.holding(array).apply(_reduce_one_along, array, op, axes, working)
        for array in arrays
    ]
    total = communicator.reduce(parts, ReduceOp.SUM if op is ReduceOp.MEAN else op)
    if op is ReduceOp.MEAN:
        total = array_memory.holding(total).apply(_divided, total, count)
    return total.astype(dtype, copy=False)


def _divided(total: Any, count: int) -> Any:
    return np.divide(total, total.dtype.type(count), out=total)


def _dtype_of_total(op: Reduction, dtype: Any) -> Any:
    """Return the dtype of ``np.sum`` and ``np.prod`` along an axis: no narrower than int64."""
    if op in (ReduceOp.SUM, ReduceOp.PROD) and dtype.kind in "biu" and dtype.isnative:
        return np.sum(np.empty(0, dtype)).dtype
    return dtype


def _reduce_one_along(array: Any, op: ReduceOp, axes: tuple[int, ...], dtype: Any) -> Any:
    """Reduce one array along the axes; an empty one gives the identity of the reduction."""
    rest = tuple(extent for k, extent in enumerate(array.shape) if k not in axes)
    if array.size == 0:
        return np.full_like(array, reduce_op.identity(op, dtype), dtype=dtype, shape=rest)
    extra = {} if op in (ReduceOp.MIN, ReduceOp.MAX) else {"dtype": dtype}
    return _ALONG[op](array, axis=axes, keepdims=True, **extra).reshape(rest)


def _reduce_custom_along(op: CustomReduction, array: Any, axes: tuple[int, ...]) -> Any:
    """Reduce one array along the axes by a custom reduction, from first to last element."""
    front = np.moveaxis(array, axes, range(len(axes)))
    rest = front.shape[len(axes) :]
    rows = front.reshape(-1, *rest)
    if len(rows) == 0:
        return np.full(rest, reduce_op.identity(op, array.dtype))
    return backends.of(rows).reduce([rows[k, ...] for k in range(len(rows))], op)


def _normalized(axis: int | Sequence[int], arrays: list[Any]) -> tuple[int, ...]:
    """Return the axes as ascending non-negative integers; malformed ones raise."""
    axes = [axis] if isinstance(axis, (int, np.integer)) else axis
    if not isinstance(axes, (list, tuple)) or not all(map(is_integer, axes)):
        raise TypeError(f"reduce: axis must be an integer or a list of them, got {axis!r}")
    ndim = arrays[0].ndim
    for each in axes:
        if not -ndim <= each < ndim:
            raise ValueError(f"reduce: axis {each} is out of range for {spec(arrays[0])}")
    normalized = sorted(int(each) % ndim for each in axes)
    if len(set(normalized)) < len(normalized):
        raise ValueError(f"reduce: an axis appears twice in {axis!r}")
    return tuple(normalized)
