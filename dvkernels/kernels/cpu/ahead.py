"""Compiles all that this room may ever need, for machines that must not do it themselves."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np

from dvkernels.devices import foreign
from dvkernels.errors import UnsupportedDTypeError
from dvkernels.kernels import compiled, steps
from dvkernels.kernels.cpu import elementwise, gate, group, many, optimizers, permutation, relay
from dvkernels.reduce_op import ReduceOp, check_dtype

__all__ = ["compile_all"]

# Whose functions are compiled when they are imported, or wait for their first call.
_MODULES: list[Any] = [gate, group, many, permutation, relay]
_DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
)  # fmt: skip


def compile_all() -> None:
    """Compile for every operation and dtype, and for every rule of the fused optimizers."""
    for op, name in itertools.product(ReduceOp, _DTYPES):
        dtype = foreign.dtype_named(name)
        with contextlib.suppress(UnsupportedDTypeError):
            check_dtype("compile", op, dtype)
            elementwise.runner(op, dtype)
    rules = (steps.PLAIN, steps.MOMENTUM, steps.NESTEROV, steps.ADAM)
    for rule, real in itertools.product(rules, (np.float32, np.float64)):
        optimizers.runner(rule, np.dtype(real))
    compiled.ahead()
