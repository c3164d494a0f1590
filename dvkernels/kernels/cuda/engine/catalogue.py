"""Catalogue of the CUDA kernels: the name of each, its launch bounds, and which of them ship.

There is one kernel for each pair of an operation, or a rule, and an element type; several
reductions and dtypes share one. Those over functions of the user's have no name, and do not ship.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from dvkernels import reduce_op
from dvkernels.errors import UnsupportedDTypeError
from dvkernels.kernels import arithmetic, update_rules
from dvkernels.kernels.cuda.engine import simulator
from dvkernels.kernels.cuda.engine.kernel import Kernel, LaunchBounds
from dvkernels.kernels.cuda.engine.operations import Operation
from dvkernels.reduce_op import ReduceOp

__all__ = ["DTYPES", "collective", "optimizer", "row", "shipped", "waiting"]

# Element types of the reductions.
DTYPES = [
    *map(np.dtype, ["f2", ml_dtypes.bfloat16, "f4", "f8", "c8", "c16", "?"]),
    *[np.dtype(f"{sign}{nbytes}") for sign in "iu" for nbytes in (1, 2, 4, 8)],
]
_OPERATIONS = {
    arithmetic.ADD: "add",
    arithmetic.MIN: "min",
    arithmetic.MAX: "max",
    arithmetic.MUL: "mul",
}
_RULES = {
    update_rules.PLAIN: "sgd",
    update_rules.MOMENTUM: "momentum",
    update_rules.NESTEROV: "nesterov",
    update_rules.ADAM: "adam",
    update_rules.ADAGRAD: "adagrad",
}

# Launch bounds. Left alone, ptxas counts on blocks of 1024 threads, and saves registers by loading
# later. A multiprocessor has 65,536 registers: three blocks of 256 threads may take 80 a thread,
# two 128, and one of 512 threads 128. Its bytes in flight are blocks x threads x 16 x loads of a
# thread; an H200 wants 48 KiB (see docs/explanation/gpu-performance.md). With eight loads, of four
# vectors of two sources, three blocks have 96 KiB in flight, and two have 64 KiB.
_THREADS, _BLOCKS, _FEWER_BLOCKS = 256, 3, 2
# Operations that unpack integers of 8 and 16 bits, and need more registers.
_UNPACKED = arithmetic.MIN, arithmetic.MAX
# Between GPUs few blocks run, one a multiprocessor, and a load takes 2 us: 32 blocks of 512 threads
# with eight loads have 2 MiB in flight.
_BETWEEN_GPUS = 512, 1


def _bounds(threads: int, blocks: int) -> LaunchBounds:
    return simulator.THREADS if simulator.IS_ON else threads, blocks


def _collective_bounds(operation: Operation, code: int) -> LaunchBounds:
    """Return three blocks, or two where the machine code of a vector would spill."""
    is_custom = not isinstance(operation, int)
    dtype = arithmetic.dtype_of(code)
    is_unpacked = operation in _UNPACKED and dtype.kind in "iu" and dtype.itemsize < 4
    return _bounds(_THREADS, _FEWER_BLOCKS if is_custom or is_unpacked else _BLOCKS)


def _optimizer_bounds(rule: int, code: int) -> LaunchBounds:
    """Return three blocks, or two for Adam in float64, whose two vectors take 88 registers."""
    is_large = rule == update_rules.ADAM and arithmetic.dtype_of(code).itemsize == 8
    return _bounds(_THREADS, _FEWER_BLOCKS if is_large else _BLOCKS)


@functools.cache
def collective(operation: Operation, code: int) -> Kernel:
    """Return the kernel of the collectives within a GPU, for an operation and an element type."""
    return Kernel(
        _name("", operation, code),
        "dvkernels.kernels.cuda.engine.loops.build",
        (operation, code),
        _collective_bounds(operation, code),
    )


@functools.cache
def waiting(operation: Operation, code: int) -> Kernel:
    """Return the kernel of an all-reduce between GPUs in which the ranks wait for each other."""
    return Kernel(
        _name("waiting ", operation, code),
        "dvkernels.kernels.cuda.multi_gpu.flag_kernel.build_waiting",
        (operation, code),
        _bounds(*_BETWEEN_GPUS),
    )


@functools.cache
def row(operation: Operation, code: int) -> Kernel:
    """Return the kernel of one row of an all-reduce between GPUs, which does not wait."""
    return Kernel(
        _name("row ", operation, code),
        "dvkernels.kernels.cuda.multi_gpu.flag_kernel.build_row",
        (operation, code),
        _bounds(*_BETWEEN_GPUS),
    )


@functools.cache
def optimizer(rule: int, code: int) -> Kernel:
    """Return the kernel of an update rule (update_rules.py) and an element type."""
    return Kernel(
        f"{_RULES[rule]} {arithmetic.dtype_of(code)}",
        "dvkernels.kernels.cuda.engine.optimizer_kernel.build",
        (rule, code),
        _optimizer_bounds(rule, code),
    )


def shipped() -> Iterator[Kernel]:
    """Yield the kernels that ship, those over the same element type one after another."""
    pairs = dict.fromkeys(
        (arithmetic.operation_code(op), arithmetic.type_code(dtype, op))
        for dtype in DTYPES
        for op in ReduceOp
        if _is_defined(op, dtype)
    )
    for operation, code in pairs:
        yield from (make(operation, code) for make in (collective, waiting, row))
    for dtype in map(np.dtype, ("f4", "f8")):
        yield from (optimizer(rule, arithmetic.type_code(dtype)) for rule in _RULES)


def _is_defined(op: ReduceOp, dtype: np.dtype[Any]) -> bool:
    try:
        reduce_op.check_dtype("reduce", op, dtype)
    except UnsupportedDTypeError:
        return False
    return True


def _name(prefix: str, operation: Operation, code: int) -> str | None:
    if not isinstance(operation, int):
        return None
    return f"{prefix}{_OPERATIONS[operation]} {arithmetic.dtype_of(code)}"
