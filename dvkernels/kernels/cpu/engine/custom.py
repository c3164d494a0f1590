"""Runners of custom reductions: a user's compiled function of two numbers, block by block.

The loop over a block of the accumulator and of one source is plain, so that LLVM can vectorize it
where the function allows. Runners are compiled in each process: a cache cannot tell whether a
user's function has changed.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from numba import types
from numba.core import errors as numba_errors

from dvkernels.custom_reduction import CustomReduction
from dvkernels.errors import UnsupportedDTypeError
from dvkernels.kernels import jit
from dvkernels.kernels.cpu.engine import intrinsics, job_layout, loops
from dvkernels.kernels.cpu.engine.intrinsics import carray

__all__: list[str] = []


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
    def run(address):  # type: ignore[no-untyped-def]
        job = job_layout.job_at(address)
        scratch = np.empty(job.num_arrays, np.int64)
        table = intrinsics.address_of(scratch)
        block = np.empty(_BLOCK, real)
        at = loops.join(job)
        while True:
            at = loops.advance(job, at, table)
            if at.length < 0:
                break
            for number in range(job.num_rows):
                row = job_layout.row_at(job.rows, number)
                first, count = loops.extent(job, row, at)
                for start in range(first, first + count, _BLOCK):
                    size = min(_BLOCK, first + count - start)
                    shift = start * itemsize
                    for k in range(row.num_sources):
                        pointer = intrinsics.load(table, row.first_source + k) + shift
                        source = carray(intrinsics.pointer(pointer), size, real)
                        if k == 0:
                            block[:size] = source
                        else:
                            for i in range(size):
                                block[i] = fn(block[i], source[i])
                    for k in range(row.num_targets):
                        pointer = intrinsics.load(table, row.first_target + k) + shift
                        carray(intrinsics.pointer(pointer), size, real)[:] = block[:size]
        intrinsics.keep_alive(scratch)

    return run
