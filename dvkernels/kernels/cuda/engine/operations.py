"""What kernels are told of a reduction: its operation, and the type of its numbers.

An operation is one of kernels/arithmetic.py, or a function of the user's, which is compiled into
the very loops that the others have.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numba.np import numpy_support

from dvkernels.errors import UnsupportedDTypeError
from dvkernels.kernels import arithmetic
from dvkernels.kernels.cuda.engine import compiler, intrinsics
from dvkernels.reduce_op import ReduceOp, Reduction

__all__ = ["Custom", "Operation", "told"]


class Custom(NamedTuple):
    """A function of two elements, compiled by ``numba.njit``, and its signature."""

    function: Any
    signature: Any


Operation = int | Custom


def told(op: Reduction, dtype: np.dtype[Any]) -> tuple[Operation, int]:
    """Return the operation, and the code of the type, of a reduction that suits the dtype.

    Raises
    ------
    UnsupportedDTypeError
        A function of the user's does not compile for GPUs. It is tried when first asked for.
    """
    if isinstance(op, ReduceOp):
        return arithmetic.operation_code(op), arithmetic.type_code(dtype, op)
    try:
        custom = _compiled(op.fn, dtype)
    except Exception as error:  # Numba's own are many, and not of one family
        raise UnsupportedDTypeError(
            f"{op!r} cannot be compiled for {dtype} on a GPU: {str(error).strip():.300}"
        ) from error
    # Of the codes, those that keep complex numbers and unsigned integers what they are.
    alike = ReduceOp.PROD if dtype.kind == "c" else ReduceOp.MAX
    return custom, arithmetic.type_code(dtype, alike)


@functools.cache
def _compiled(function: Any, dtype: np.dtype[Any]) -> Custom:
    """Return what compiles, tried without a device; in the simulator, for the CPU."""
    element = numpy_support.from_dtype(dtype)
    signature = element(element, element)
    if intrinsics.SIMULATED:
        function.compile((element, element))
    else:
        compiler.check(function.py_func, signature)
    return Custom(function, signature)
