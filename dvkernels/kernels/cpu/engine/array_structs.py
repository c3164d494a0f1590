"""Lists of NumPy arrays as compiled code sees them: addresses and lengths, read in place.

Asking an array for its address costs 1.5 us in Python, checking it as much again. Compiled code
reads both from the objects themselves in nanoseconds. It raises nothing: where anything is unusual
it declines, before anything is touched, and the caller goes the long way, whose checks say what
is wrong.

What it reads is CPython's and NumPy's layout of a list and of an array. Both are part of a stable
binary interface; still, a look at known objects decides at import whether this way is open.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple

import numpy as np

from dvkernels.kernels import arithmetic, checks, jit
from dvkernels.kernels.cpu.engine import intrinsics, loops, thread_pool
from dvkernels.reduce_op import ReduceOp, Reduction

__all__ = [
    "IS_MEAN",
    "ITEMSIZE",
    "RUNNER",
    "SHARED",
    "THREADS",
    "item_of",
    "learn",
    "length_of",
    "look",
    "recipes",
]


# Where things lie: words of a list, and of an array, after the object header.
_HEAD = object.__basicsize__ // 8
_TYPE = _HEAD - 1
_LENGTH, _ITEMS = _HEAD, _HEAD + 1
_DATA, _NUM_DIMS, _DIMS, _DTYPE, _FLAGS = _HEAD, _HEAD + 1, _HEAD + 2, _HEAD + 5, _HEAD + 6
_CONTIGUOUS, _WRITEABLE = 0x1, 0x400
# The words of a recipe.
_ARRAY_TYPE, _DTYPE_OBJECT, RUNNER, ITEMSIZE, _FACTOR, IS_MEAN, SHARED, THREADS = range(8)


class ReductionWords(NamedTuple):
    """What is known of an operation and a dtype, as words."""

    words: Any
    address: int
    dtype: Any  # kept alive: its address is one of the words


recipes: dict[tuple[Any, Any], ReductionWords] = {}


@jit.njit()
def length_of(listed):  # type: ignore[no-untyped-def]
    """Return how many objects a list holds."""
    return intrinsics.load(listed, _LENGTH)


@jit.njit()
def item_of(listed, k):  # type: ignore[no-untyped-def]
    """Return the address of an object in a list."""
    return intrinsics.load(intrinsics.load(listed, _ITEMS), k)


@jit.njit()
def look(listed, recipe, table, num_read_only):  # type: ignore[no-untyped-def]
    """Write the addresses of a list of arrays to ``table``; return their length, or -1.

    They must be contiguous, of one shape and of the dtype of the recipe, and, but for the first
    few, writable. The length counts elements of the runner.
    """
    first = item_of(listed, 0)
    num_dims = intrinsics.load_int32(first, 2 * _NUM_DIMS)
    extents = intrinsics.load(first, _DIMS)
    for k in range(length_of(listed)):
        array = item_of(listed, k)
        needed = _CONTIGUOUS if k < num_read_only else _CONTIGUOUS | _WRITEABLE
        if (
            intrinsics.load(array, _TYPE) != intrinsics.load(recipe, _ARRAY_TYPE)
            or intrinsics.load(array, _DTYPE) != intrinsics.load(recipe, _DTYPE_OBJECT)
            or intrinsics.load_int32(array, 2 * _FLAGS) & needed != needed
            or intrinsics.load_int32(array, 2 * _NUM_DIMS) != num_dims
        ):
            return np.int64(-1)
        for axis in range(num_dims):
            if intrinsics.load(intrinsics.load(array, _DIMS), axis) != intrinsics.load(
                extents, axis
            ):
                return np.int64(-1)
        intrinsics.store(table, k, intrinsics.load(array, _DATA))
    length = intrinsics.load(recipe, _FACTOR)
    for axis in range(num_dims):
        length *= intrinsics.load(extents, axis)
    return length


def learn(op: Reduction, dtype: np.dtype[Any]) -> None:
    """Open the short way for an operation and a dtype that have passed all checks."""
    if not _is_open or type(op) is not ReduceOp or (op, dtype) in recipes:
        return
    factor = arithmetic.factor(op, dtype)
    # Arrays of one dtype share one dtype object where the dtype is built in; others decline.
    words = np.array(
        [
            id(np.ndarray),
            id(dtype),
            loops.runner(op, dtype),
            dtype.itemsize // factor,
            factor,
            op is ReduceOp.MEAN,
            thread_pool.SHARED_NBYTES,
            thread_pool.num_threads(),
        ],
        np.int64,
    )
    recipe = ReductionWords(words, checks.address(words), dtype)
    recipes[op, dtype] = recipes[op.value, dtype] = recipe


def _is_as_expected() -> bool:
    """Look at known objects, and whether the interpreter's lock keeps a list from changing."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return False
    array = np.zeros((3, 5))[:, 1:3]
    array.flags.writeable = False
    listed = [array, np.zeros(1)]
    in_list = (ctypes.c_int64 * (_ITEMS + 1)).from_address(id(listed))
    items = (ctypes.c_int64 * 2).from_address(in_list[_ITEMS])
    words = (ctypes.c_int64 * (_FLAGS + 1)).from_address(id(array))
    if in_list[_LENGTH] != 2 or list(items) != [*map(id, listed)]:
        return False
    extents = (ctypes.c_int64 * 2).from_address(words[_DIMS])
    flags = [words[_FLAGS] & (_CONTIGUOUS | _WRITEABLE)]
    other = (ctypes.c_int64 * (_FLAGS + 1)).from_address(id(listed[1]))
    flags.append(other[_FLAGS] & (_CONTIGUOUS | _WRITEABLE))
    return (
        words[_TYPE] == id(np.ndarray)
        and words[_DATA] == array.ctypes.data
        and words[_NUM_DIMS] & 0xFFFFFFFF == 2
        and list(extents) == [3, 2]
        and words[_DTYPE] == id(array.dtype)
        and flags == [0, _CONTIGUOUS | _WRITEABLE]
    )


_is_open = _is_as_expected()
