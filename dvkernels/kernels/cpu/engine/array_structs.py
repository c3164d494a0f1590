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
from typing import Any

import numpy as np

from dvkernels.kernels import jit
from dvkernels.kernels.cpu.engine import intrinsics, records

__all__: list[str] = []

_HEAD = object.__basicsize__  # bytes of the object header, whose last word is the type
_CONTIGUOUS, _WRITEABLE = 0x1, 0x400


def _struct(**fields: tuple[type, int]) -> np.dtype[Any]:
    """Return the dtype of a struct: the type and the offset in bytes of each field."""
    formats, offsets = zip(*fields.values(), strict=True)
    return np.dtype({"names": [*fields], "formats": formats, "offsets": offsets})


_LIST = _struct(length=(np.int64, _HEAD), items=(np.int64, _HEAD + 8))
_ARRAY = _struct(
    type=(np.int64, _HEAD - 8),
    data=(np.int64, _HEAD),
    num_dims=(np.int32, _HEAD + 8),
    dims=(np.int64, _HEAD + 16),
    dtype=(np.int64, _HEAD + 40),
    flags=(np.int32, _HEAD + 48),
)
_list_at = records.view(_LIST)
_array_at = records.view(_ARRAY)


@jit.njit()
def length_of(list_address):  # type: ignore[no-untyped-def]
    """Return the length of a list."""
    return _list_at(list_address).length


@jit.njit()
def item_of(list_address, k):  # type: ignore[no-untyped-def]
    """Return the address of item ``k`` of a list."""
    return intrinsics.load(_list_at(list_address).items, k)


@jit.njit()
def read_addresses(list_address, recipe, table, num_read_only):  # type: ignore[no-untyped-def]
    """Write the addresses of a list of arrays to ``table``; return their length, or -1.

    The arrays must be contiguous, of one shape and of the recipe's dtype, and all but the first
    ``num_read_only`` writable. The length counts elements of the runner.
    """
    first = _array_at(item_of(list_address, 0))
    num_dims, dims = first.num_dims, first.dims
    for k in range(length_of(list_address)):
        array = _array_at(item_of(list_address, k))
        needed = _CONTIGUOUS if k < num_read_only else _CONTIGUOUS | _WRITEABLE
        if (
            array.type != recipe.array_type
            or array.dtype != recipe.dtype
            or array.flags & needed != needed
            or array.num_dims != num_dims
        ):
            return np.int64(-1)
        for axis in range(num_dims):
            if intrinsics.load(array.dims, axis) != intrinsics.load(dims, axis):
                return np.int64(-1)
        intrinsics.set_word(table, k, array.data)
    length = recipe.factor
    for axis in range(num_dims):
        length *= intrinsics.load(dims, axis)
    return length


def _has_expected_layout() -> bool:
    """Return whether known objects have the layout, and the GIL keeps lists from changing."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return False
    part, whole = np.zeros((3, 5))[:, 1:3], np.zeros(1)
    part.flags.writeable = False
    arrays = [part, whole]
    listed, read_only = _read(arrays, _LIST), _read(part, _ARRAY)
    if listed["length"] != 2 or read_only["num_dims"] != 2:
        return False
    items = (ctypes.c_int64 * 2).from_address(int(listed["items"]))
    extents = (ctypes.c_int64 * 2).from_address(int(read_only["dims"]))
    flags = [_read(array, _ARRAY)["flags"] & (_CONTIGUOUS | _WRITEABLE) for array in arrays]
    return bool(
        list(items) == [*map(id, arrays)]
        and read_only["type"] == id(np.ndarray)
        and read_only["data"] == part.ctypes.data
        and list(extents) == [3, 2]
        and read_only["dtype"] == id(part.dtype)
        and flags == [0, _CONTIGUOUS | _WRITEABLE]
    )


def _read(value: object, struct: np.dtype[Any]) -> np.void:
    """Return a copy of an object's struct."""
    found: np.void = np.frombuffer(ctypes.string_at(id(value), struct.itemsize), struct)[0]
    return found


IS_SUPPORTED = _has_expected_layout()
