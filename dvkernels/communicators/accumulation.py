"""A reduction that goes in levels: what each of them does, and what is left for the end."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dvkernels import reduce_op
from dvkernels.reduce_op import ReduceOp, Reduction

__all__: list[str] = []

_ROUNDED = (ReduceOp.SUM, ReduceOp.MEAN, ReduceOp.PROD)


class Accumulation(NamedTuple):
    """How many values become one, some of them first.

    Attributes
    ----------
    op : Reduction
        What every level does: SUM where a MEAN was asked for.
    wide : dtype
        What it does it in: float32 for half types, so that they are rounded once, in the end.
    divisor : int
        By which the result is divided: the number of values for MEAN, else 1.
    """

    op: Reduction
    wide: np.dtype[Any]
    divisor: int

    def divide(self, total: Any) -> None:
        """Make the result of the last level, which is overwritten, that of all."""
        divide(total, self.divisor)


def divide(total: Any, divisor: int) -> None:
    """Divide an array in place, correctly rounded: complex numbers by a real one."""
    if divisor > 1:
        parts = (total.real, total.imag) if total.dtype.kind == "c" else (total,)
        for part in parts:
            np.divide(part, part.dtype.type(divisor), out=part)


def write(total: Any, result: Any) -> None:
    """Write a total where it is to stay; as a half it is rounded, or infinite."""
    with np.errstate(over="ignore"):  # as the kernels do it
        result[...] = total


def of(op: Reduction, dtype: np.dtype[Any], count: int) -> Accumulation:
    """Return the levels in which ``count`` values of a dtype are reduced."""
    wide = reduce_op.working_dtype(dtype) if op in _ROUNDED else dtype
    return (
        Accumulation(ReduceOp.SUM, wide, count)
        if op is ReduceOp.MEAN
        else Accumulation(op, wide, 1)
    )
