"""Scatter operations: writes of some rows of a variable, such as ``scatter_add``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels import reduce_op
from dvkernels.communicators.base import Workers
from dvkernels.devices import interop
from dvkernels.devices.array_spec import Spec, refuse_masked, spec
from dvkernels.errors import BufferMismatchError, NotABufferError
from dvkernels.profiler import debugging
from dvkernels.user_errors import brief
from dvkernels.variables.copies import Copies

__all__: list[str] = []


# The operation of an update on a row; several updates of one row are applied one after another.
_CHANGES: dict[str, np.ufunc] = {
    "scatter_add": np.add,
    "scatter_sub": np.subtract,
    "scatter_mul": np.multiply,
    "scatter_div": np.divide,
    "scatter_min": np.minimum,
    "scatter_max": np.maximum,
}
# For these the result of several replicas' updates depends on their order or on the extreme one, so
# neither SUM nor MEAN defines it.
NOT_ADDITIVE = frozenset({"scatter_update", "scatter_min", "scatter_max"})


class Updates(NamedTuple):
    """Updates of rows: ``updates[k]`` applies to row ``indices[k]``."""

    indices: Any
    updates: Any


def checked_rows(copies: Copies, verb: str, indices: Any, replica: int | None) -> Any:
    """Return row indices as an integer array on the host; malformed or out of range they raise."""
    shape = copies.arrays[0].shape
    what = f"{verb} of variable {copies.name!r}"
    origin = "" if replica is None else f" from replica {replica}"
    if not shape:
        raise BufferMismatchError(f"{what}: a 0-d variable has no rows; use the whole value")
    refuse_masked(indices, f"{what}: the indices{origin}")
    rows = copies.memory.to_host(indices) if interop.is_on_gpu(indices) else np.asarray(indices)
    if rows.size == 0 and rows.dtype.kind == "f":
        rows = rows.astype(np.int64)  # an empty list
    if rows.dtype.kind not in "iu":
        raise NotABufferError(
            f"{what}: expected integers as indices, got {brief(indices, 60)}{origin}"
        )
    outside = rows[(rows < 0) | (rows >= shape[0])]
    if outside.size:
        raise IndexError(
            f"{what}: got index {outside.flat[0]}{origin}; the rows are 0 to {shape[0] - 1}, and "
            f"negative ones do not count from the end"
        )
    return rows


def checked(copies: Copies, verb: str, indices: Any, updates: Any, replica: int | None) -> Updates:
    """Return the updates with flat indices; wrong indices, shapes or dtypes raise."""
    shape, dtype = copies.arrays[0].shape, copies.arrays[0].dtype
    what = f"{verb} of variable {copies.name!r}"
    origin = "" if replica is None else f" from replica {replica}"
    rows = checked_rows(copies, verb, indices, replica)
    array = copies.converted(updates, verb, replica)
    expected = Spec((*rows.shape, *shape[1:]), dtype)
    is_number = isinstance(updates, (bool, int, float, complex)) and array.ndim == 0
    if is_number and array.dtype == dtype:
        array = np.broadcast_to(array, expected.shape)
    if spec(array) != expected:
        raise BufferMismatchError(
            f"{what} at indices of shape {rows.shape} expected {expected}, or a number, got "
            f"{spec(array)}{origin}"
        )
    if debugging.active is not None:
        debugging.check_finite(what, [array])
    flat = array.reshape(-1, *shape[1:]) if rows.size else array.reshape(0, *shape[1:])
    near = copies.memory.to_device_of(flat, copies.read_by(replica))
    return Updates(rows.reshape(-1).astype(np.int64), near)


def concatenated(copies: Copies, parts: Sequence[Updates], like: Updates) -> Updates:
    """Concatenate updates in order, on the first copy's device; without parts, none of ``like``."""
    if not parts:
        return Updates(like.indices[:0], _wide(like.updates[:0]))
    memory = copies.memory
    indices = np.concatenate([part.indices for part in parts])
    each = [_wide(memory.to_device_of(part.updates, copies.arrays[0])) for part in parts]
    return Updates(indices, memory.apply(_concatenate, *each))


def gathered_from_workers(given: Updates, workers: Workers) -> Updates:
    """Return the updates of all workers, in rank order."""
    return Updates(*(workers.all_gather([array], 0)[0] for array in given))


def divided(given: Updates, divisor: int) -> Updates:
    """Return the updates divided by an integer."""
    if divisor == 1:
        return given
    return Updates(given.indices, given.updates / given.updates.dtype.type(divisor))


def new_rows(copies: Copies, array: Any, verb: str, given: Updates) -> tuple[Any, Any]:
    """Return the rows that change and their new content; ``array``, a copy, is unchanged.

    float16 and bfloat16 are computed in float32 and rounded once.
    """
    return copies.memory.apply(_new_rows, array, copies.memory.accumulate, verb, given)  # type: ignore[no-any-return]


def _new_rows(array: Any, accumulate: Any, verb: str, given: Updates) -> tuple[Any, Any]:
    if verb == "scatter_update":  # the last of several updates of a row wins
        rows, last = np.unique(given.indices[::-1], return_index=True)
        return rows, given.updates[len(given.indices) - 1 - last]
    change = _CHANGES[verb]
    if change is np.divide and array.dtype.kind in "iu":
        change = np.floor_divide
    rows, positions = np.unique(given.indices, return_inverse=True)
    content = _wide(array[rows])
    updates = given.updates.astype(content.dtype, copy=False)
    accumulate(change, content, positions.reshape(-1), updates)
    return rows, content.astype(array.dtype, copy=False)


def _concatenate(*arrays: Any) -> Any:
    return np.concatenate(arrays)


def _wide(array: Any) -> Any:
    return array.astype(reduce_op.working_dtype(array.dtype), copy=False)
