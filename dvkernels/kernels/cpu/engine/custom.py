"""Runners of custom reductions: a user's compiled function of two numbers, block by block.

The loop over a block of the accumulator and of one source is plain, so that LLVM can vectorize it
where the function allows. Runners are compiled in each process: a cache cannot tell whether a
user's function has changed.
"""

from __future__ import annotations

import weakref
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import errors as numba_errors

from dvkernels.custom_reduction import CustomReduction
from dvkernels.errors import UnsupportedDTypeError
from dvkernels.kernels import jit
from dvkernels.kernels.cpu.engine import intrinsics, loops

__all__ = ["runner"]


carray: Any = vars(numba)["carray"]  # it is missing from Numba's stubs
_BLOCK = 1024

_runners: weakref.WeakKeyDictionary[CustomReduction, dict[np.dtype[Any], Any]] = (
    weakref.WeakKeyDictionary()
)


def runner(op: CustomReduction, dtype: np.dtype[Any]) -> int:
    """Return the address of the runner of ``op`` over ``dtype``, compiled when first asked for."""
    found = _runners.setdefault(op, {})
    if dtype not in found:
        try:
            # Under NUMBA_DISABLE_JIT the user's function is not compiled; the runner needs it so.
            fn = op.fn if hasattr(op.fn, "py_func") else jit.njit(cache=False)(op.fn)
            found[dtype] = _make(fn, dtype.type)
        except numba_errors.NumbaError as error:
            raise UnsupportedDTypeError(
                f"{op!r} cannot be compiled for {dtype}: {str(error).strip():.300}"
            ) from error
    address: int = found[dtype].address
    return address


def _make(fn: Any, real: Any) -> Any:
    itemsize = np.dtype(real).itemsize

    @jit.cfunc(types.void(types.int64), cache=False)
    def run(job):  # type: ignore[no-untyped-def]
        width, num_parts = intrinsics.load(job, 16), intrinsics.load(job, 17)
        program, num_rows = job + 8 * intrinsics.load(job, 13), intrinsics.load(job, 14)
        scratch = np.empty(width, np.int64)
        table = np.int64(scratch.ctypes.data)
        block = np.empty(_BLOCK, real)
        ordinal = intrinsics.fetch_add(job, 0, 1)
        attempt, begin, end = loops.claim(job, ordinal, 0)
        while begin < end:
            for piece in range(begin, end):
                lines, column, length, line, last_line = loops.locate(job, piece)
                while line < last_line:
                    loops.addresses_on(line, lines, width, table)
                    for row in range(num_rows):
                        step = program + 48 * row
                        first, count = column, length
                        chunk = intrinsics.load(step, 0)
                        if chunk >= 0:
                            start, count = loops.part(length, num_parts, chunk)
                            first += start
                        sources = table + 8 * intrinsics.load(step, 1)
                        targets = table + 8 * intrinsics.load(step, 3)
                        for offset in range(first, first + count, _BLOCK):
                            size = min(_BLOCK, first + count - offset)
                            for k in range(intrinsics.load(step, 2)):
                                address = intrinsics.load(sources, k) + offset * itemsize
                                source = carray(intrinsics.pointer(address), size, real)
                                if k == 0:
                                    block[:size] = source
                                else:
                                    for i in range(size):
                                        block[i] = fn(block[i], source[i])
                            for k in range(intrinsics.load(step, 4)):
                                address = intrinsics.load(targets, k) + offset * itemsize
                                carray(intrinsics.pointer(address), size, real)[:] = block[:size]
                    line += 1
            attempt, begin, end = loops.claim(job, ordinal, attempt)

    return run
