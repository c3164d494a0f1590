"""The reductions, and what is neutral to each of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from dvkernels.enumeration import NamedEnum
from dvkernels.errors import ReduceOpError, UnsupportedDTypeError

__all__ = ["ReduceOp"]


class ReduceOp(NamedEnum):
    """How the contributions of the replicas become one value.

    Wherever a ``ReduceOp`` is accepted, its name in any case is accepted too.
    MIN and MAX propagate NaN; sums and products of integers wrap, as in NumPy.
    """

    SUM = "sum"
    MEAN = "mean"
    MIN = "min"
    MAX = "max"
    PROD = "prod"


# Which kinds of dtype (numpy.dtype.kind) a reduction is defined for.
_KINDS = {
    ReduceOp.SUM: "fiu",
    ReduceOp.MEAN: "f",
    ReduceOp.MIN: "fiub",
    ReduceOp.MAX: "fiub",
    ReduceOp.PROD: "fiu",
}

# float16, bfloat16 and complex numbers are not reduced yet: see docs/reference/kernels.md.
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

_supported: set[tuple[ReduceOp, np.dtype[Any]]] = set()  # what has passed, to be quick next time


_BY_NAME = {op.value: op for op in ReduceOp}  # the common way to write them, without a search


def parse(op: object) -> ReduceOp:
    """Return the ``ReduceOp`` that ``op`` is or names, else raise :class:`ReduceOpError`."""
    if type(op) is ReduceOp:
        return op
    known = _BY_NAME.get(op) if type(op) is str else None
    return known or ReduceOp.of(op, ReduceOpError)


def check_dtype(verb: str, op: ReduceOp, dtype: np.dtype[Any]) -> None:
    """Raise :class:`UnsupportedDTypeError` unless ``op`` is defined for ``dtype``."""
    if (op, dtype) in _supported:
        return
    supported = dtype.kind in _KINDS[op] and (dtype.kind != "f" or dtype in _FLOATS)
    if supported and dtype.isnative:
        _supported.add((op, dtype))
        return
    if op is ReduceOp.MEAN and dtype.kind in "iub":
        remedy = f"the mean of {dtype} would not be a {dtype}; cast to float32 or float64 first"
    elif dtype.kind == "b":
        remedy = "bool has MIN (all) and MAX (any); cast to an integer to count"
    elif not dtype.isnative:
        remedy = f"its byte order is foreign; convert with .astype({dtype.newbyteorder('=')!s:.10})"
    else:
        remedy = "use float32, float64, an integer dtype, or bool with MIN and MAX"
    raise UnsupportedDTypeError(f"{verb}: {op.name} is not defined for {dtype}: {remedy}")


def identity(op: ReduceOp, dtype: np.dtype[Any]) -> Any:
    """Return the scalar that changes nothing when reduced with ``op``."""
    if op in (ReduceOp.SUM, ReduceOp.MEAN):
        return dtype.type(0)
    if op is ReduceOp.PROD:
        return dtype.type(1)
    lowest = op is ReduceOp.MAX
    if dtype.kind == "f":
        return dtype.type(-np.inf if lowest else np.inf)
    if dtype.kind == "b":
        return dtype.type(not lowest)
    limits = np.iinfo(dtype)
    return dtype.type(limits.min if lowest else limits.max)
