"""Catalogue of all CUDA kernels, by name, for the tests of their machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numba
import numpy as np

from dvkernels import errors, reduce_op
from dvkernels.custom_reduction import CustomReduction
from dvkernels.kernels import arithmetic, update_rules
from dvkernels.kernels.cuda import optimizers
from dvkernels.kernels.cuda.engine import loops, operations
from dvkernels.kernels.cuda.multi_gpu import flag_kernel
from dvkernels.reduce_op import ReduceOp

DTYPES = [
    *map(np.dtype, ["f2", ml_dtypes.bfloat16, "f4", "f8", "c8", "c16", "?"]),
    *[np.dtype(f"{sign}{nbytes}") for sign in "iu" for nbytes in (1, 2, 4, 8)],
]
_ROWS = [*map(np.dtype, ["f2", "f4"])]
_RULES = {
    "sgd": update_rules.PLAIN,
    "momentum": update_rules.MOMENTUM,
    "nesterov": update_rules.NESTEROV,
    "adam": update_rules.ADAM,
}


# Custom reductions over all kinds of elements: wide, packed, complex, boolean.
CUSTOM = {
    "farther": (numba.njit(lambda a, b: a if abs(a) >= abs(b) else b), "fdD"),
    "xor": (numba.njit(lambda a, b: a ^ b), "bHl?"),
}


class Kernel(NamedTuple):
    """Kernel function, not compiled."""

    function: Callable[..., None]
    is_between_gpus: bool = False  # then its flags have the scope of the system


def kernels() -> dict[str, Kernel]:
    """Return every kernel by name; several dtypes and operations may share one."""
    found: dict[str, Kernel] = {}
    for op in ReduceOp:
        for dtype in DTYPES:
            try:
                reduce_op.check_dtype("compile", op, dtype)
            except errors.UnsupportedDTypeError:
                continue
            operation, code = arithmetic.operation_code(op), arithmetic.type_code(dtype, op)
            name = f"{('add', 'min', 'max', 'mul')[operation]} {arithmetic.dtype_of(code)}"
            found[name] = Kernel(loops.kernel(operation, code))
            waits = flag_kernel.waiting_kernel(operation, code)
            found[f"waiting {name}"] = Kernel(waits, is_between_gpus=True)
            if dtype in _ROWS:  # a Combine row of a waiting kernel alone
                found[f"row {name}"] = Kernel(flag_kernel.combine_kernel(operation, code))
    for name, rule in _RULES.items():
        for dtype in map(np.dtype, ("f4", "f8")):
            function = optimizers.kernel(rule, arithmetic.type_code(dtype))
            found[f"{name} {dtype}"] = Kernel(function)
    for name, (function, letters) in CUSTOM.items():
        for dtype in map(np.dtype, letters):
            resolved = operations.resolve(CustomReduction(function, 0, name), dtype)
            found[f"{name} {dtype}"] = Kernel(loops.kernel(*resolved))
            if dtype.char == "f":
                waits = flag_kernel.waiting_kernel(*resolved)
                found[f"waiting {name} {dtype}"] = Kernel(waits, is_between_gpus=True)
    return found
