"""Ahead-of-time compilation of every kernel of the CPU, to fill the cache of a machine image."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np

from dvkernels.devices import interop
from dvkernels.errors import UnsupportedDTypeError
from dvkernels.kernels import jit, update_rules
from dvkernels.kernels.cpu import feistel, group, row_updates, shm_all_reduce, take
from dvkernels.kernels.cpu.engine import gate, grouped_job, loops, optimizer_rules
from dvkernels.reduce_op import ReduceOp, check_dtype

__all__ = ["compile_all"]

# Modules whose functions are compiled at import, or by ``jit.ahead``.
_MODULES: list[Any] = [gate, group, grouped_job, feistel, shm_all_reduce, take]
_DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
)  # fmt: skip


def compile_all() -> None:
    """Compile the kernels of every operation and dtype, and every rule of the fused optimizers."""
    for op, name in itertools.product(ReduceOp, _DTYPES):
        dtype = interop.dtype_named(name)
        with contextlib.suppress(UnsupportedDTypeError):
            check_dtype("compile", op, dtype)
            loops.runner(op, dtype)
    rules = (
        update_rules.PLAIN,
        update_rules.MOMENTUM,
        update_rules.NESTEROV,
        update_rules.ADAM,
        update_rules.ADAGRAD,
    )
    for rule, real in itertools.product(rules, (np.float32, np.float64)):
        optimizer_rules.runner(rule, np.dtype(real))
    row_updates.compile_all([interop.dtype_named(name) for name in _DTYPES])
    jit.ahead()
