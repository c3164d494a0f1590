"""Overlaps of buffers: no element that a collective writes may be another one's, or read there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import BufferMismatchError

__all__ = ["address", "check_in_place", "check_overlaps", "raise_read_only"]

# The C struct of an ndarray starts with the object header and then the data pointer. It is part
# of NumPy's stable ABI, and reading it costs 0.2 us where `array.ctypes.data` costs 1.5 us.
_DATA = object.__basicsize__
_pointer_at = ctypes.c_void_p.from_address


def _address_from_struct(array: HostArray) -> int:
    return _pointer_at(id(array) + _DATA).value or 0


def _address_from_ctypes(array: HostArray) -> int:
    return int(array.ctypes.data)


_probe = np.zeros(1)
address = (
    _address_from_struct
    if _address_from_struct(_probe) == _address_from_ctypes(_probe)
    else _address_from_ctypes
)


def check_in_place(
    verb: str, written: Sequence[HostArray], name_of: Callable[[int], str] = "replica {}".format
) -> None:
    """Raise unless every buffer is writable and none shares an element with another.

    ``name_of`` returns the name of a buffer in messages.
    """
    is_dense = True
    for index, view in enumerate(written):
        flags = view.flags
        if not flags.writeable:
            raise_read_only(verb, name_of(index))
        is_dense = is_dense and flags.c_contiguous
    if is_dense:  # the common case, decided in 1 us: each buffer starts behind the previous one
        end = 0
        for start, nbytes in sorted((address(view), view.nbytes) for view in written):
            if start < end:
                break
            end = start + nbytes
        else:
            return
    check_overlaps(verb, written, (), name_of)


def raise_read_only(verb: str, name: str) -> NoReturn:
    """Raise: the array that ``name`` names is read-only."""
    raise BufferMismatchError(
        f"{verb} writes its results in place: {name} is read-only; "
        "pass a writable copy, or separate arrays as out where the function takes it"
    )


def check_overlaps(
    verb: str,
    writes: Sequence[HostArray],
    reads: Sequence[HostArray],
    name_of: Callable[[int], str],
    may_be_inputs: bool = True,
) -> None:
    """Raise if two elements of written arrays, or a written and a read one, share memory.

    Where ``may_be_inputs``, a written array may be the very buffer of its replica, in place.
    """
    spans = []
    for index, view in enumerate(writes):
        if not (view.flags.c_contiguous or view.flags.f_contiguous) and _overlaps_itself(view):
            raise BufferMismatchError(
                f"{verb} writes every element once, and {name_of(index)} holds elements that share "
                f"memory (shape {view.shape}, strides {view.strides}); pass a copy of it"
            )
        spans.append((*_bounds(view), True, index))
    spans += [(*_bounds(view), False, index) for index, view in enumerate(reads)]
    spans.sort()
    # After sorting, a span can overlap only those before it that end behind its start.
    active: list[tuple[int, int, bool, int]] = []
    for span in spans:
        active = [other for other in active if other[1] > span[0]]
        for other in active:
            _check_two_spans(verb, writes, reads, other, span, name_of, may_be_inputs)
        if span[0] < span[1]:
            active.append(span)


def _check_two_spans(
    verb: str,
    writes: Sequence[HostArray],
    reads: Sequence[HostArray],
    one: tuple[int, int, bool, int],
    other: tuple[int, int, bool, int],
    name_of: Callable[[int], str],
    may_be_inputs: bool,
) -> None:
    if not (one[2] or other[2]) or one[0] >= one[1] or other[0] >= other[1]:
        return
    (_, _, one_written, i), (_, _, other_written, j) = one, other
    first = writes[i] if one_written else reads[i]
    second = writes[j] if other_written else reads[j]
    if may_be_inputs and one_written != other_written and (i == j or len(writes) == 1):
        same = address(first) == address(second) and first.strides == second.strides
        if same:
            return
    if np.shares_memory(first, second):
        ordered = sorted((one, other), key=lambda span: (not span[2], span[3]))
        names = [name_of(k) if written else f"replica {k}" for *_, written, k in ordered]
        raise BufferMismatchError(
            f"{verb} needs written buffers that share no element with another buffer: "
            f"{names[0]} overlaps {names[1]}; pass a copy of one of them"
        )


def _bounds(view: HostArray) -> tuple[int, int]:
    """Return the address of the first byte of a view, and of the byte past its last."""
    start = address(view)
    flags = view.flags
    if flags.c_contiguous or flags.f_contiguous:
        return start, start + view.nbytes
    low, high = np.lib.array_utils.byte_bounds(view)
    return int(low), int(high)


def _overlaps_itself(view: HostArray) -> bool:
    """Return whether two elements of ``view`` share a byte; the answer is exact."""
    dims = sorted(
        (abs(stride), extent)
        for stride, extent in zip(view.strides, view.shape, strict=True)
        if extent > 1
    )
    if view.size < 2:
        return False
    reach = view.itemsize  # bytes spanned by the dimensions so far
    for stride, extent in dims:
        if stride < reach:
            break
        reach += stride * (extent - 1)
    else:
        return False
    offsets = np.zeros(1, np.int64)
    for stride, extent in dims:
        offsets = (offsets[:, None] + stride * np.arange(extent)).ravel()
    offsets.sort()
    return bool((np.diff(offsets) < view.itemsize).any())
