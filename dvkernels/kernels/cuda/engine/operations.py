"""Operation and element type of a reduction, as the kernels take them.

An operation is one of kernels/arithmetic.py, or a user's function, which is compiled into the same
loops.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from dvkernels.devices import cuda as devices
from dvkernels.errors import DeviceError, UnsupportedDTypeError
from dvkernels.kernels import arithmetic, numba_import
from dvkernels.kernels.cuda.engine import simulator
from dvkernels.reduce_op import ReduceOp, Reduction

__all__ = ["Custom", "Operation", "resolve"]


class Custom(NamedTuple):
    """User's function of two elements, compiled by ``numba.njit``, and its signature."""

    function: Any
    signature: Any


Operation = int | Custom


def resolve(op: Reduction, dtype: np.dtype[Any]) -> tuple[Operation, int]:
    """Return the operation and the type code of a reduction that is defined for the dtype.

    Raises
    ------
    UnsupportedDTypeError
        The user's function does not compile for GPUs, which is tried on its first use.
    DeviceError
        No function does: a part of the compiler is missing.
    """
    if isinstance(op, ReduceOp):
        return arithmetic.operation_code(op), arithmetic.type_code(dtype, op)
    if not simulator.IS_ON:
        devices.require_compiler(repr(op))
    try:
        custom = _check_compiles(op.fn, dtype)
    except DeviceError:
        raise
    except Exception as error:  # Numba raises many classes without a common base
        raise UnsupportedDTypeError(
            f"{op!r} cannot be compiled for {dtype} on a GPU: {str(error).strip():.300}"
        ) from error
    # Type codes that keep complex numbers complex and unsigned integers unsigned.
    alike = ReduceOp.PROD if dtype.kind == "c" else ReduceOp.MAX
    return custom, arithmetic.type_code(dtype, alike)


@functools.cache
def _check_compiles(function: Any, dtype: np.dtype[Any]) -> Custom:
    """Return the function with its signature; raise unless it compiles (simulator: for the CPU)."""
    element = numba_import.module("numba.np.numpy_support").from_dtype(dtype)
    signature = element(element, element)
    if simulator.IS_ON:
        function.compile((element, element))
    else:
        compiler = numba_import.module("dvkernels.kernels.cuda.engine.compiler")
        compiler.check(function.py_func, signature)
    return Custom(function, signature)
