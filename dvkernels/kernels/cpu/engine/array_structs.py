"""C structs of CPython lists and NumPy arrays, read in place by compiled code.

The address of an array costs 1.5 us in Python, checking it as much again. Compiled code reads
address, shape, dtype and flags from the structs in nanoseconds. It never raises: it declines
unusual arrays before any array is touched, and the caller takes the slow path, whose checks raise
the errors.

The layouts of the structs belong to the stable binary interfaces of CPython and NumPy; still, they
are verified on known objects at import, and the fast path is disabled where they differ.
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
    "length_of",
    "read_addresses",
    "recipes",
    "register",
]


# Offsets in words: of a list's fields, and of an array's, after the object header.
_HEAD = object.__basicsize__ // 8
_TYPE = _HEAD - 1
_LENGTH, _ITEMS = _HEAD, _HEAD + 1
_DATA, _NUM_DIMS, _DIMS, _DTYPE, _FLAGS = _HEAD, _HEAD + 1, _HEAD + 2, _HEAD + 5, _HEAD + 6
_CONTIGUOUS, _WRITEABLE = 0x1, 0x400
# The words of a recipe.
_ARRAY_TYPE, _DTYPE_OBJECT, RUNNER, ITEMSIZE, _FACTOR, IS_MEAN, SHARED, THREADS = range(8)


class ReductionWords(NamedTuple):
    """Recipe of a reduction: the constants of an operation and a dtype, as words."""

    words: Any
    address: int
    dtype: Any  # kept alive: its address is one of the words


recipes: dict[tuple[Any, Any], ReductionWords] = {}


@jit.njit()
def length_of(list_address):  # type: ignore[no-untyped-def]
    """Return the length of a list."""
    return intrinsics.load(list_address, _LENGTH)


@jit.njit()
def item_of(list_address, k):  # type: ignore[no-untyped-def]
    """Return the address of item ``k`` of a list."""
    return intrinsics.load(intrinsics.load(list_address, _ITEMS), k)


@jit.njit()
def read_addresses(list_address, recipe, table, num_read_only):  # type: ignore[no-untyped-def]
    """Write the addresses of a list of arrays to ``table``; return their length, or -1.

    The arrays must be contiguous, of one shape and of the recipe's dtype, and all but the first
    ``num_read_only`` writable. The length counts elements of the runner.
    """
    first = item_of(list_address, 0)
    num_dims = intrinsics.load_int32(first, 2 * _NUM_DIMS)
    extents = intrinsics.load(first, _DIMS)
    for k in range(length_of(list_address)):
        array = item_of(list_address, k)
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


def register(op: Reduction, dtype: np.dtype[Any]) -> None:
    """Enable the fast path for an operation and a dtype that have passed all checks."""
    if not _is_supported or type(op) is not ReduceOp or (op, dtype) in recipes:
        return
    factor = arithmetic.factor(op, dtype)
    # Arrays of a built-in dtype share one dtype object; arrays of other dtypes are declined.
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


def _has_expected_layout() -> bool:
    """Return whether known objects have the layout, and the GIL keeps lists from changing."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return False
    array = np.zeros((3, 5))[:, 1:3]
    array.flags.writeable = False
    arrays = [array, np.zeros(1)]
    in_list = (ctypes.c_int64 * (_ITEMS + 1)).from_address(id(arrays))
    items = (ctypes.c_int64 * 2).from_address(in_list[_ITEMS])
    words = (ctypes.c_int64 * (_FLAGS + 1)).from_address(id(array))
    if in_list[_LENGTH] != 2 or list(items) != [*map(id, arrays)]:
        return False
    extents = (ctypes.c_int64 * 2).from_address(words[_DIMS])
    flags = [words[_FLAGS] & (_CONTIGUOUS | _WRITEABLE)]
    other = (ctypes.c_int64 * (_FLAGS + 1)).from_address(id(arrays[1]))
    flags.append(other[_FLAGS] & (_CONTIGUOUS | _WRITEABLE))
    return (
        words[_TYPE] == id(np.ndarray)
        and words[_DATA] == array.ctypes.data
        and words[_NUM_DIMS] & 0xFFFFFFFF == 2
        and list(extents) == [3, 2]
        and words[_DTYPE] == id(array.dtype)
        and flags == [0, _CONTIGUOUS | _WRITEABLE]
    )


_is_supported = _has_expected_layout()
