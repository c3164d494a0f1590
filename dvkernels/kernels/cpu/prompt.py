"""The short way of the common call: a list of NumPy arrays, reduced in place.

What a call costs in Python (checks, addresses, the job: 5 us) is more than the sum of 64 KiB. So
compiled code reads the arrays themselves, checks them, and fills a job that is used again and
again. It raises nothing: where anything is unusual it declines, before anything is touched, and
the caller goes the long way, whose checks say what is wrong.

What it reads is CPython's and NumPy's layout of a list and of an array. Both are part of a stable
binary interface; still, a look at known objects decides at import whether this way is open.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types

from dvkernels.kernels.cpu import elementwise, jobs, memory, pool
from dvkernels.reduce_op import ReduceOp

__all__ = ["all_reduce", "learn"]

ELEMENTWISE = "df83701b"
JOBS = "b1163942"
MEMORY = "747edcf9"
POOL = "7ef00d54"


class _Recipe(NamedTuple):
    """What is known of an operation and a dtype, as words."""

    words: Any
    address: int
    dtype: Any  # kept alive: its address is one of the words


_MOST_REPLICAS = 64
_ITEM, _ROW, _TABLE = jobs.HEADER, jobs.HEADER + 4, jobs.HEADER + 10  # one item, one row
# Up to here a call keeps the interpreter's lock: 10 us, less than giving it up may cost.
_SHORT_NBYTES = 512 * 1024
_DECLINED, _DONE = -1, -2
_PIECE_NBYTES, _FAR_NBYTES, _SHARED_NBYTES = jobs.PIECE_NBYTES, jobs.FAR_NBYTES, pool.SHARED_NBYTES

# Where things lie: words of a list, and of an array after the object header.
_HEAD = object.__basicsize__ // 8
_LENGTH, _ITEMS = _HEAD, _HEAD + 1
_DATA, _NUM_DIMS, _DIMS, _DTYPE, _FLAGS = _HEAD, _HEAD + 1, _HEAD + 2, _HEAD + 5, _HEAD + 6
_TYPE = _HEAD - 1
_CONTIGUOUS, _WRITEABLE = 0x1, 0x400
# The words of a recipe: what is known of an operation and a dtype.
_ARRAY_TYPE, _DTYPE_OBJECT, _RUNNER, _ITEMSIZE, _FACTOR, _IS_MEAN = range(6)


@numba.njit("int64(int64, int64, int64)", cache=True)
def _prepare(views, recipe, job):  # type: ignore[no-untyped-def]
    """Fill the job that reduces a list of arrays, run it if it is short; say how it went.

    Returns the bytes to be moved by whoever runs the job, or _DONE, or _DECLINED.
    """
    count = memory.load(views, _LENGTH)
    arrays = memory.load(views, _ITEMS)
    if count < 1 or count > _MOST_REPLICAS:
        return _DECLINED
    first = memory.load(arrays, 0)
    num_dims = memory.load_int32(first, 2 * _NUM_DIMS)
    needed = _CONTIGUOUS | _WRITEABLE
    for k in range(count):
        array = memory.load(arrays, k)
        if (
            memory.load(array, _TYPE) != memory.load(recipe, _ARRAY_TYPE)
            or memory.load(array, _DTYPE) != memory.load(recipe, _DTYPE_OBJECT)
            or memory.load_int32(array, 2 * _FLAGS) & needed != needed
            or memory.load_int32(array, 2 * _NUM_DIMS) != num_dims
        ):
            return _DECLINED
        for axis in range(num_dims):
            dims = memory.load(array, _DIMS)
            if memory.load(dims, axis) != memory.load(memory.load(first, _DIMS), axis):
                return _DECLINED
        memory.store(job, _TABLE + k, memory.load(array, _DATA))
    itemsize = memory.load(recipe, _ITEMSIZE)
    length = memory.load(recipe, _FACTOR)
    for axis in range(num_dims):
        length *= memory.load(memory.load(first, _DIMS), axis)
    nbytes = length * itemsize
    for k in range(count):
        start = memory.load(job, _TABLE + k)
        for other in range(k):
            if abs(start - memory.load(job, _TABLE + other)) < nbytes:
                return _DECLINED  # they overlap
    moved = 2 * count * nbytes
    longest = length
    if moved >= _SHARED_NBYTES:
        wanted = max(4096, min(_PIECE_NBYTES // count, nbytes // 4))
        longest = (wanted & -128) // itemsize
    memory.store(job, 0, 0)
    memory.store(job, 8, 0 if length == 0 else -(-length // longest))
    memory.store(job, 10, longest)
    memory.store(job, 15, np.int64(moved >= _FAR_NBYTES))
    memory.store(job, 16, count)
    memory.store(job, 18, memory.load(recipe, _RUNNER))
    memory.store(job, _ITEM + 1, length)
    row = job + 8 * _ROW
    memory.store(row, 2, count)
    memory.store(row, 4, count)
    memory.store(row, 5, count if memory.load(recipe, _IS_MEAN) else 1)
    if moved <= _SHORT_NBYTES:
        memory.call(memory.load(recipe, _RUNNER), job)
        return _DONE
    return moved


# The function behind the dispatcher: 0.1 us less, for its arguments are known to be integers.
_prepare_now = _prepare.get_overload((types.int64,) * 3)


def _new_job() -> tuple[Any, int]:
    job = memory.words(_TABLE + _MOST_REPLICAS)
    job[9] = job[11] = job[14] = job[17] = 1  # claims of one piece, one item, one row, one part
    job[12], job[13] = _ITEM, _ROW
    job[_ITEM:_ROW] = (0, 0, 1, _TABLE)
    job[_ROW:_TABLE] = (-1, 0, 0, 0, 0, 1)
    return job, memory.address_of(job)


_free: list[tuple[Any, int]] = []
_recipes: dict[tuple[Any, Any], _Recipe] = {}


def all_reduce(buffers: Any, op: Any) -> list[Any] | None:
    """Reduce in place by the direct algorithm and return the buffers; None: declined."""
    try:
        recipe = _recipes[op, buffers[0].dtype]
    except (KeyError, TypeError, AttributeError, IndexError):
        return None
    views = [*buffers]
    try:
        job = _free.pop()
    except IndexError:
        job = _new_job()
    moved = _prepare_now(id(views), recipe.address, job[1])
    if moved > 0:
        pool.execute(job[0], job[1], moved)
    _free.append(job)
    return views if moved != _DECLINED else None


def learn(op: ReduceOp, dtype: np.dtype[Any]) -> None:
    """Open the short way for an operation and a dtype that have passed all checks."""
    if not _is_open or (op, dtype) in _recipes:
        return
    factor = elementwise.factor(op, dtype)
    # Arrays of one dtype share one dtype object where the dtype is built in; others decline.
    words = np.array(
        [
            id(np.ndarray),
            id(dtype),
            elementwise.runner(op, dtype),
            dtype.itemsize // factor,
            factor,
            op is ReduceOp.MEAN,
        ],
        np.int64,
    )
    _recipes[op, dtype] = _recipes[op.value, dtype] = _Recipe(
        words, memory.address_of(words), dtype
    )


def _is_layout_as_expected() -> bool:
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


_is_open = _is_layout_as_expected()
