"""Reductions: their names, the dtypes they are defined for, and their identities."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dvkernels.custom_reduction import CustomReduction
from dvkernels.enumeration import NamedEnum
from dvkernels.errors import ReduceOpError, UnsupportedDTypeError

__all__ = ["ReduceOp", "Reduction"]


class ReduceOp(NamedEnum):
    """How the contributions of the replicas become one value.

    Wherever a ``ReduceOp`` is accepted, its name in any case is accepted too.
    MIN and MAX propagate NaN; sums and products of integers wrap, as in NumPy.

    Examples
    --------
    >>> import numpy as np
    >>> import dvkernels as dv
    >>> dv.kernels.reduce([np.array([1, 5]), np.array([4, 2])], dv.ReduceOp.MAX)
    array([4, 5])
    """

    SUM = "sum"
    MEAN = "mean"
    MIN = "min"
    MAX = "max"
    PROD = "prod"


Reduction = ReduceOp | CustomReduction

# Kinds of dtype (numpy.dtype.kind) that a reduction is defined for; see `kind` for bfloat16.
_KINDS = {
    ReduceOp.SUM: "fciu",
    ReduceOp.MEAN: "fc",
    ReduceOp.MIN: "fiub",
    ReduceOp.MAX: "fiub",
    ReduceOp.PROD: "fciu",
}
_FLOATS = {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_NAMES = _FLOATS | _INTEGERS | {"bool"}

# Pairs that have passed the check, and the common spellings. A verb looks here before it calls.
SUPPORTED: set[tuple[Reduction, np.dtype[Any]]] = set()
BY_NAME = {op.value: op for op in ReduceOp}


def parse(op: object) -> Reduction:
    """Return the reduction that ``op`` is or names; raise :class:`ReduceOpError` otherwise."""
    if type(op) is ReduceOp or type(op) is CustomReduction:
        return op
    named = BY_NAME.get(op) if type(op) is str else None
    return named or ReduceOp.of(op, ReduceOpError)


def check_dtype(verb: str, op: Reduction, dtype: np.dtype[Any]) -> None:
    """Raise :class:`UnsupportedDTypeError` unless ``op`` is defined for ``dtype``."""
    if type(op) is CustomReduction:
        if dtype.name not in _NAMES or is_half(dtype) or not dtype.isnative:
            raise UnsupportedDTypeError(
                f"{verb}: {op!r} works on integers, bool, float32, float64 and complex numbers, "
                f"not on {dtype}; cast first"
            )
        return
    assert type(op) is ReduceOp
    if (op, dtype) in SUPPORTED:
        return
    supported = dtype.name in _NAMES and kind(dtype) in _KINDS[op]
    if supported and dtype.isnative:
        SUPPORTED.add((op, dtype))
        return
    if op is ReduceOp.MEAN and dtype.kind in "iub":
        remedy = f"the mean of {dtype} would not be a {dtype}; cast to float32 or float64 first"
    elif dtype.kind == "c" and dtype.name in _NAMES:
        remedy = "complex numbers have no order; reduce .real and .imag, or the absolute value"
    elif dtype.kind == "b":
        remedy = "bool has MIN (all) and MAX (any); cast to an integer to count"
    elif not dtype.isnative:
        remedy = f"its byte order is foreign; convert with .astype({dtype.newbyteorder('=')!s:.10})"
    else:
        remedy = (
            "use float16, bfloat16, float32, float64, complex64, complex128, an integer dtype, or "
            "bool with MIN and MAX"
        )
    raise UnsupportedDTypeError(f"{verb}: {op.name} is not defined for {dtype}: {remedy}")


@functools.cache
def is_half(dtype: np.dtype[Any]) -> bool:
    """Return whether ``dtype`` is float16 or bfloat16, which is summed in float32, rounded once."""
    return dtype.itemsize == 2 and kind(dtype) == "f"


def working_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which values of ``dtype`` are computed: float32 for the half types."""
    return np.dtype(np.float32) if is_half(dtype) else dtype


def kind(dtype: np.dtype[Any]) -> str:
    """Return ``dtype.kind``, and "f" for bfloat16 too, which ml_dtypes calls "V"."""
    return "f" if dtype.name == "bfloat16" else dtype.kind


def shares(weights: Sequence[float], verb: str) -> list[float]:
    """Return the quotient of each weight by their sum; raise ValueError where all are 0.

    The weights are first scaled by a power of two, which rounds nothing: the sum of large finite
    weights may overflow, and the quotient of two subnormal ones has few bits.
    """
    largest = max(weights)
    if largest == 0:
        raise ValueError(f"{verb}: all weights are 0; there is no mean of nothing")
    exponent = math.frexp(largest)[1]
    scaled = [math.ldexp(weight, -exponent) for weight in weights]
    total = sum(scaled)
    return [weight / total for weight in scaled]


def identity(op: Reduction, dtype: np.dtype[Any]) -> Any:
    """Return the scalar that changes nothing when reduced with ``op``."""
    if type(op) is CustomReduction:
        return dtype.type(op.identity)
    if op in (ReduceOp.SUM, ReduceOp.MEAN):
        return dtype.type(0)
    if op is ReduceOp.PROD:
        return dtype.type(1)
    lowest = op is ReduceOp.MAX
    if kind(dtype) == "f":
        return dtype.type(-np.inf if lowest else np.inf)
    if dtype.kind == "b":
        return dtype.type(not lowest)
    limits = np.iinfo(dtype)
    return dtype.type(limits.min if lowest else limits.max)
