"""Recipes: the constants of an operation and a dtype, from which compiled code makes a job.

Compiled code takes them where Python would check and compute them anew in each call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import arithmetic, checks, jit
from dvkernels.kernels.cpu.engine import array_structs, loops, records, thread_pool
from dvkernels.kernels.cpu.engine.job_layout import MOST_QUEUES, PIECE_NBYTES
from dvkernels.reduce_op import ReduceOp, Reduction

__all__: list[str] = []


class _RecipeWords(NamedTuple):
    array_type: int  # addresses of objects
    dtype: int
    runner: int
    itemsize: int  # bytes of the runner's elements
    factor: int  # their number per element of the dtype
    is_mean: int
    shared_nbytes: int  # bytes moved from which on threads share a job
    num_threads: int


recipe_at = records.view(records.layout(_RecipeWords))


class Recipe(NamedTuple):
    """Recipe in memory."""

    words: HostArray
    address: int
    itemsize: int
    is_mean: bool
    dtype: np.dtype[Any]  # kept alive: its address is one of the words


recipes: dict[tuple[Any, Any], Recipe] = {}


def register(op: Reduction, dtype: np.dtype[Any]) -> None:
    """Enable the fast path for an operation and a dtype that have passed all checks."""
    if not array_structs.IS_SUPPORTED or type(op) is not ReduceOp or (op, dtype) in recipes:
        return
    made = new(loops.runner(op, dtype), dtype, arithmetic.factor(op, dtype), op is ReduceOp.MEAN)
    recipes[op, dtype] = recipes[op.value, dtype] = made


def new(runner: int, dtype: np.dtype[Any], factor: int = 1, is_mean: bool = False) -> Recipe:
    """Return the recipe of the runner at an address.

    An element of the dtype is ``factor`` elements of the runner.
    """
    # Arrays of a built-in dtype share one dtype object; arrays of other dtypes are declined.
    values = _RecipeWords(
        array_type=id(np.ndarray),
        dtype=id(dtype),
        runner=runner,
        itemsize=dtype.itemsize // factor,
        factor=factor,
        is_mean=is_mean,
        shared_nbytes=thread_pool.SHARED_NBYTES,
        num_threads=thread_pool.num_threads(),
    )
    words = np.array(values, np.int64)
    return Recipe(words, checks.address(words), values.itemsize, is_mean, dtype)


@jit.njit()
def cut(job, recipe, length, num_arrays, moved):  # type: ignore[no-untyped-def]
    """Cut a job that moves so many bytes into pieces, and into queues if threads share it.

    ``length`` counts the elements of all items. The job's counters, and ``in_memory``, are left
    alone.
    """
    job.piece_length = max(length, 1)
    job.num_queues = 1
    if moved >= recipe.shared_nbytes:
        target_nbytes = max(4096, min(PIECE_NBYTES // num_arrays, length * recipe.itemsize // 4))
        job.piece_length = (target_nbytes & -128) // recipe.itemsize
        job.num_queues = min(recipe.num_threads, MOST_QUEUES)
    job.num_arrays = num_arrays
    job.runner = recipe.runner
