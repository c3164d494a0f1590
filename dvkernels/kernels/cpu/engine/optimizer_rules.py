"""Runners of the fused optimizers: blocks of gradients are summed, and applied while in the cache.

The rules are those of kernels/update_rules.py, on float32 and float64.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import types

from dvkernels.kernels import arithmetic, jit, update_rules
from dvkernels.kernels.cpu.engine import array_structs, intrinsics, job_layout, loops, recipe
from dvkernels.kernels.cpu.engine.intrinsics import carray
from dvkernels.kernels.cpu.engine.span import span
from dvkernels.kernels.update_rules import ADAGRAD, ADAM, NUM_COEFFICIENTS, PLAIN, Coefficients

__all__: list[str] = []


# Elements of a block. Its gradient, parameter and two moments are 128 KiB of float32, in L2.
# Four replicas of 64 MiB, mean and Adam: 50 ms with blocks of 256, 35 of 1 024, 31 of 4 096, 29 of
# 8 192 (2 cores of an AMD EPYC, 2026-11). Prefetching the states while the gradients are summed
# gave a tenth of that.
_BLOCK = 8192
WEIGHTED = 0  # the divisor that marks a weighted sum
_sgd_step = jit.njit(nogil=True, error_model="numpy")(update_rules.sgd_step)
_adagrad_step = jit.njit(nogil=True, error_model="numpy")(update_rules.adagrad_step)
_adam_step = jit.njit(nogil=True, error_model="numpy")(update_rules.adam_step)


def constants(coefficients: Coefficients, shares: Sequence[float]) -> list[float]:
    """Return the constants of a runner's job: room for the coefficients of any rule, the shares."""
    return [*coefficients, *[0.0] * (NUM_COEFFICIENTS - len(coefficients)), *shares]


_runners: dict[tuple[int, np.dtype[Any]], Any] = {}


def runner(rule: int, dtype: np.dtype[Any]) -> int:
    """Return the address of the runner of a rule over float32 or float64, compiled if need be."""
    found = _runners.get((rule, dtype))
    if found is None:
        code = arithmetic.type_code(dtype)
        found = _runners[rule, dtype] = _make(rule, code, dtype.itemsize, dtype.type)
    address: int = found.address
    return address


@functools.cache
def recipe_of(rule: int, dtype: np.dtype[Any]) -> recipe.Recipe | None:
    """Return the recipe of a rule; None where compiled code cannot read arrays."""
    return recipe.new(runner(rule, dtype), dtype) if array_structs.IS_SUPPORTED else None


def _make(rule: int, code: int, itemsize: int, real: Any) -> Any:
    """Compile the runner of a rule over ``real``, which is float32 or float64."""
    num_slots = update_rules.NUM_SLOTS[rule]

    @jit.cfunc(types.void(types.int64), error_model="numpy")
    def run(address):  # type: ignore[no-untyped-def]
        job = job_layout.job_at(address)
        row, in_memory = job_layout.row_at(job.rows, 0), job.in_memory
        num_replicas, num_copies = row.num_sources, row.num_targets
        coefficients = carray(intrinsics.pointer(job.constants), NUM_COEFFICIENTS, np.float64)
        after = job.constants + 8 * NUM_COEFFICIENTS
        shares = carray(intrinsics.pointer(after), num_replicas, np.float64)
        # The arrays of each kind have consecutive entries in the table, gradients first. The block
        # of the summed gradients has the last entry.
        block_entry, parameters = job.num_arrays - 1, num_replicas
        slots = parameters + num_copies if num_slots > 0 else parameters
        others = slots + num_copies if num_slots > 1 else slots
        scratch = np.empty(job.num_arrays, np.int64)
        table = intrinsics.address_of(scratch)
        block = np.empty(_BLOCK + 16, real)
        at = loops.join(job)
        while True:
            at = loops.advance(job, at, table)
            if at.length < 0:
                break
            for offset in range(at.first, at.first + at.length, _BLOCK):
                count = min(_BLOCK, at.first + at.length - offset)
                shift = offset * itemsize
                # The block is aligned in its cache lines as the gradients are in theirs.
                start = intrinsics.address_of(block)
                start += (intrinsics.load(table, 0) + shift - start) & 63
                intrinsics.store(table, block_entry, start - shift)
                if in_memory:
                    for state in range(num_slots + 1):
                        ahead = intrinsics.load(table, parameters + state * num_copies) + shift
                        for k in range(0, _BLOCK * itemsize, 64):
                            intrinsics.prefetch(ahead + k)
                gradient = carray(intrinsics.pointer(start), count, real)
                if row.divisor != WEIGHTED:
                    span(
                        table, 0, num_replicas, block_entry, 1, row.divisor, offset, count,
                        in_memory, 0, code,
                    )  # fmt: skip
                else:
                    gradient[:] = 0
                    for k in range(num_replicas):
                        if shares[k] > 0:
                            pointer = intrinsics.pointer(intrinsics.load(table, k) + shift)
                            _add_share(gradient, carray(pointer, count, real), shares[k])
                parameter = _elements(table, parameters, shift, count, real)
                slot = _elements(table, slots, shift, count, real)
                other = _elements(table, others, shift, count, real)
                if rule == ADAM:
                    _adam(gradient, parameter, slot, other, coefficients)
                elif rule == ADAGRAD:
                    _adagrad(gradient, parameter, slot, coefficients)
                else:
                    _sgd(rule, gradient, parameter, slot, coefficients)
                if num_copies > 1:
                    for state in range(num_slots + 1):
                        source = parameters + state * num_copies
                        span(
                            table, source, 1, source + 1, num_copies - 1, 1, offset, count,
                            2 * in_memory, 0, code,
                        )  # fmt: skip
        intrinsics.keep_alive(scratch)

    return run


@jit.njit(nogil=True)
def _elements(table, entry, shift, count, real):  # type: ignore[no-untyped-def]
    """Return ``count`` elements of an array of the table, ``shift`` bytes after its start."""
    return carray(intrinsics.pointer(intrinsics.load(table, entry) + shift), count, real)


@jit.njit(nogil=True, error_model="numpy")
def _add_share(total, gradient, share):  # type: ignore[no-untyped-def]
    factor = gradient.dtype.type(share)
    for i in range(len(gradient)):
        total[i] += factor * gradient[i]


@jit.njit(nogil=True, error_model="numpy")
def _sgd(rule, gradient, parameter, velocity, coefficients):  # type: ignore[no-untyped-def]
    real = gradient.dtype.type
    rounded = real(coefficients[0]), real(coefficients[1]), real(coefficients[2])
    for i in range(len(gradient)):
        new, speed = _sgd_step(rule, gradient[i], parameter[i], velocity[i], rounded)
        if rule != PLAIN:
            velocity[i] = speed
        parameter[i] = new


@jit.njit(nogil=True, error_model="numpy")
def _adagrad(gradient, parameter, squares, coefficients):  # type: ignore[no-untyped-def]
    real = gradient.dtype.type
    rounded = real(coefficients[0]), real(coefficients[1]), real(coefficients[2])
    for i in range(len(gradient)):
        new, total = _adagrad_step(gradient[i], parameter[i], squares[i], rounded)
        squares[i], parameter[i] = total, new


@jit.njit(nogil=True, error_model="numpy")
def _adam(gradient, parameter, first, second, coefficients):  # type: ignore[no-untyped-def]
    real = gradient.dtype.type
    rounded = (
        real(coefficients[0]), real(coefficients[1]), real(coefficients[2]), real(coefficients[3]),
        real(coefficients[4]), real(coefficients[5]), real(coefficients[6]), real(coefficients[7]),
        real(coefficients[8]),
    )  # fmt: skip
    for i in range(len(gradient)):
        new, mean, square = _adam_step(gradient[i], parameter[i], first[i], second[i], rounded)
        first[i], second[i], parameter[i] = mean, square, new
