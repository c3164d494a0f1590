"""Rows of a variable: their indices, checked, and a gather of copies of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from dvkernels.devices import array_memory, interop
from dvkernels.devices.array_spec import Array, HostArray, Spec, refuse_masked, spec
from dvkernels.errors import BufferMismatchError, NotABufferError
from dvkernels.kernels import backends
from dvkernels.schedules import cost_model
from dvkernels.user_errors import brief, text_of
from dvkernels.variables.copies import Copies

__all__: list[str] = []

_SHARED_NBYTES = cost_model.CPU.sharing_pays_from()  # read and written


def checked_rows(copies: Copies, verb: str, indices: Any, replica: int | None) -> HostArray:
    """Return row indices as a new int64 array on the host; malformed or out of range they raise."""
    what = f"{verb} of variable {copies.name!r}"
    origin = "" if replica is None else f" from replica {replica}"
    shape = copies.arrays[0].shape
    if not shape:
        raise BufferMismatchError(f"{what}: a 0-d variable has no rows; use the whole value")
    refuse_masked(indices, f"{what}: the indices{origin}")
    try:
        rows = copies.memory.to_host(indices) if interop.is_on_gpu(indices) else np.asarray(indices)
    except ValueError as error:  # lists of different lengths
        raise NotABufferError(
            f"{what}: expected integers as indices, got {brief(indices, 60)}{origin}, which is no "
            f"array: {text_of(error)}"
        ) from error
    if rows.size and rows.dtype.kind not in "iu":
        number = _first_fraction(rows)
        first = rows.reshape(-1).tolist()[number]
        raise NotABufferError(
            f"{what}: expected integers as indices, got {brief(first, 60)}"
            f"{_place(rows, number)}{origin}, of dtype {rows.dtype}; cast with .astype(int) if "
            f"that is what they mean"
        )
    given = np.array(rows, np.int64, order="C")  # nobody else changes it
    # A negative one is larger than any row.
    if given.size and int(given.view(np.uint64).max()) >= shape[0]:
        number = int(np.flatnonzero((given < 0) | (given >= shape[0]))[0])
        known = f"the rows are 0 to {shape[0] - 1}" if shape[0] else "it has no rows"
        raise IndexError(
            f"{what}: got index {rows.flat[number]}{_place(rows, number)}{origin}; {known}, and "
            f"negative ones do not count from the end"
        )
    return given


def _first_fraction(rows: HostArray) -> int:
    """Return the position of the first number that is not whole, or 0."""
    if rows.dtype.kind != "f":
        return 0
    return int(np.argmax((rows != np.floor(rows)) | ~np.isfinite(rows)))


def _place(rows: HostArray, number: int) -> str:
    if rows.ndim < 2:
        return f" at position {number}" * rows.ndim
    return f" at position {tuple(map(int, np.unravel_index(number, rows.shape)))}"


def gather(copies: Copies, array: Array, rows: HostArray, target: Any = None) -> Any:
    """Return rows of a copy as a new array, or in ``target``, of :func:`checked_out`."""
    memory = copies.memory
    if memory is not array_memory.HOST:
        taken = memory.apply(_take, array, rows)
        if target is not None:
            memory.overwrite([target], [taken])
        return taken
    if target is None:
        target = np.empty((*rows.shape, *array.shape[1:]), array.dtype)
    if 2 * target.nbytes < _SHARED_NBYTES or not target.flags.c_contiguous:
        source: Any = array
        np.take(source, rows, axis=0, out=target, mode="clip")  # the indices have been checked
    else:
        lines = target.reshape(-1, *array.shape[1:])
        backends.take().RowTaker([array]).take_into([lines], rows.reshape(-1))
    return target


def gather_first(copies: Copies, rows: HostArray, target: Any) -> Any:
    """Return rows of the first copy, as :func:`gather` does."""
    return gather(copies, copies.arrays[0], rows, target)


def _take(array: Any, rows: HostArray) -> Any:
    return array[rows.reshape(-1)].reshape(*rows.shape, *array.shape[1:])


def checked_out(copies: Copies, rows: HostArray, out: Any, replica: int | None) -> Any:
    """Return the array in which :func:`gather` leaves the rows; one that does not fit raises."""
    array = copies.arrays[0]
    expected = Spec((*rows.shape, *array.shape[1:]), array.dtype)
    verb = f"gather_rows of variable {copies.name!r}"
    who = "out" if replica is None else f"out of replica {replica}"
    target = copies.memory.view(verb, out, who) if interop.is_foreign(out) else out
    if not hasattr(target, "dtype") or not hasattr(target, "shape"):
        raise NotABufferError(f"{verb}: {who} must be an array, got a {type(out).__name__}")
    is_writable = array_memory.holding(target).is_writable(target)
    if spec(target) != expected or not is_writable:
        raise BufferMismatchError(
            f"{verb}: {who} must be writable, {expected}; got one that is {spec(target)}, "
            f"{'writable' if is_writable else 'read-only'}"
        )
    return target
