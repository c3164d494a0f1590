"""Hierarchical reductions: accumulate in a wide type on every level, divide and round once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dvkernels import reduce_op
from dvkernels.reduce_op import ReduceOp, Reduction

__all__: list[str] = []

_ROUNDED = (ReduceOp.SUM, ReduceOp.MEAN, ReduceOp.PROD)


class Accumulation(NamedTuple):
    """Operation, element type and divisor of a reduction that is carried out in several levels.

    Attributes
    ----------
    op : Reduction
        The operation of every level: SUM where the caller asked for MEAN.
    wide : dtype
        The element type of the partial results: float32 for half types, which are therefore rounded
        once, after the last level.
    divisor : int
        The divisor of the final result: the number of values for MEAN, else 1.
    """

    op: Reduction
    wide: np.dtype[Any]
    divisor: int

    def divide(self, total: Any) -> None:
        """Divide the result of the last level in place."""
        divide(total, self.divisor)


def divide(total: Any, divisor: int) -> None:
    """Divide an array in place, correctly rounded; a complex array by a real divisor."""
    if divisor > 1:
        parts = (total.real, total.imag) if total.dtype.kind == "c" else (total,)
        for part in parts:
            np.divide(part, part.dtype.type(divisor), out=part)


def write(total: Any, result: Any) -> None:
    """Write a total to ``result``; a half type is rounded, and overflows to infinity."""
    with np.errstate(over="ignore"):  # as in the kernels
        result[...] = total


def of(op: Reduction, dtype: np.dtype[Any], count: int) -> Accumulation:
    """Return how to reduce ``count`` values of a dtype in several levels."""
    wide = reduce_op.working_dtype(dtype) if op in _ROUNDED else dtype
    return (
        Accumulation(ReduceOp.SUM, wide, count)
        if op is ReduceOp.MEAN
        else Accumulation(op, wide, 1)
    )
