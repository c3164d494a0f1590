"""Checks of the buffers of a collective, made once, before any buffer is touched.

`arrays` turns the caller's buffers into NumPy views of one shape and dtype. `check_in_place` and
`check_out` check the written buffers. Each message states the expectation, the buffer that fails
it, its replica, and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from dvkernels import reduce_op
from dvkernels.devices import interop
from dvkernels.devices.array_spec import HostArray, Spec, refuse_masked, spec
from dvkernels.errors import (
    AlgorithmError,
    BufferMismatchError,
    NotABufferError,
    UnsupportedDTypeError,
)
from dvkernels.kernels.overlaps import address as address
from dvkernels.kernels.overlaps import check_in_place as check_in_place
from dvkernels.kernels.overlaps import check_overlaps as check_overlaps
from dvkernels.kernels.overlaps import raise_read_only
from dvkernels.reduce_op import Reduction

__all__ = [
    "address",
    "algorithm",
    "arrays",
    "arrays_along",
    "as_sequence",
    "check_axis",
    "check_dtype_moves",
    "check_groups",
    "check_in_place",
    "check_out",
    "check_overlaps",
    "check_root",
    "check_shapes",
    "groups_as_lists",
    "outputs",
    "outputs_like",
    "reduction",
    "views",
]

T = TypeVar("T")


def as_sequence(verb: str, buffers: Any, name: str = "replica") -> Sequence[Any]:
    """Return the buffers as a list or tuple; an iterator is consumed here, once."""
    if isinstance(buffers, (list, tuple)):
        return buffers
    try:
        return [*buffers]
    except TypeError:
        raise NotABufferError(
            f"{verb} needs a sequence of arrays, one per {name}; got {type(buffers).__name__}"
        ) from None


def groups_as_lists(verb: str, groups: Any) -> list[list[Any]]:
    """Return groups of buffers as lists, which can be iterated over again."""
    try:
        return [[*group] for group in groups]
    except TypeError as error:
        raise NotABufferError(
            f"{verb} needs a sequence of groups, each a sequence of arrays, one per replica; "
            f"got {type(groups).__name__}: {error}"
        ) from None


def check_groups(
    verb: str, groups: Sequence[Sequence[Any]], op: Any
) -> tuple[Reduction, dict[np.dtype[Any], list[list[HostArray]]]]:
    """Return the reduction, and the groups of arrays by dtype.

    Raise unless all groups hold equally many arrays, each group of one shape and dtype, and no
    two arrays share an element.
    """
    width = len(groups[0])
    by_dtype: dict[np.dtype[Any], list[list[HostArray]]] = {}
    every: list[HostArray] = []
    names: list[str] = []
    known = None
    for k, group in enumerate(groups):
        where = f"{verb}, array {k}"
        if len(group) != width:
            raise BufferMismatchError(
                f"{where}: {len(group)} buffers, and array 0 has {width}: expected one per replica"
            )
        found = arrays(where, group)
        known = reduction(where, op, found[0].dtype)
        by_dtype.setdefault(found[0].dtype, []).append(found)
        every += found
        names += (f"array {k} of replica {replica}" for replica in range(width))
    check_in_place(verb, every, names.__getitem__)
    assert known is not None
    return known, by_dtype


def views(verb: str, buffers: Any, name: str = "replica") -> list[HostArray]:
    """Return a view of each buffer; raise unless there is at least one and all are arrays."""
    found: list[HostArray] = []
    for buffer in as_sequence(verb, buffers):
        if type(buffer) is not np.ndarray:
            buffer = _view(verb, buffer, f"{name} {len(found)}")
        found.append(buffer)
    if not found:
        raise BufferMismatchError(f"{verb} needs at least one buffer; got an empty sequence")
    return found


def arrays(verb: str, buffers: Any, name: str = "replica") -> list[HostArray]:
    """Return a view of each buffer; raise unless they are arrays of one shape and dtype."""
    found = views(verb, buffers, name)
    shape, dtype = found[0].shape, found[0].dtype
    for index, view in enumerate(found):
        if view.shape != shape or view.dtype != dtype:
            _raise_mismatch(verb, found, index, name, "one shape and dtype")
    return found


def arrays_along(verb: str, buffers: Any, axis: Any) -> tuple[list[HostArray], int]:
    """Return a view of each buffer, and the axis counted from the front.

    Raise unless the buffers are arrays of one dtype whose shapes differ at most along ``axis``.
    """
    found = views(verb, buffers)
    axis = check_axis(verb, axis, found[0])
    shape, dtype = found[0].shape, found[0].dtype
    rest = shape[:axis], shape[axis + 1 :]
    for index, view in enumerate(found):
        fits = view.ndim == len(shape) and (view.shape[:axis], view.shape[axis + 1 :]) == rest
        if not fits or view.dtype != dtype:
            _raise_mismatch(verb, found, index, "replica", f"shapes alike except along axis {axis}")
    return found, axis


def check_axis(verb: str, axis: Any, array: HostArray) -> int:
    """Return ``axis`` counted from the front; raise unless the array has it."""
    try:
        index = axis.__index__()
    except AttributeError:
        index = None
    if isinstance(axis, (bool, np.bool_)) or index is None or not -array.ndim <= index < array.ndim:
        raise BufferMismatchError(
            f"{verb} needs an axis of the buffers, which hold {spec(array)}; got {axis!r}"
            + ("; reshape scalars to (1,) first" if array.ndim == 0 else "")
        )
    return int(index) % array.ndim


def _raise_mismatch(
    verb: str, found: Sequence[HostArray], index: int, name: str, needed: str
) -> None:
    raise BufferMismatchError(
        f"{verb} needs {needed}: {name} {index} holds {spec(found[index])}, "
        f"{name} 0 holds {spec(found[0])}; pad or cast first"
    )


def check_out(
    verb: str,
    reads: Sequence[HostArray],
    writes: Sequence[HostArray],
    count: int,
) -> None:
    """Raise unless ``writes`` (``out`` of the call) fit ``reads``, and overlap them all or none.

    An ``out`` may be the very buffer, element for element; it must not overlap a part of one.
    """
    check_shapes(verb, reads[0], writes, count)
    check_overlaps(verb, writes, reads, "out {}".format)


def check_shapes(verb: str, model: HostArray, writes: Sequence[HostArray], count: int) -> None:
    """Raise unless there are ``count`` writable arrays of the model's shape and dtype."""
    _check_outs(verb, writes, [model.shape] * count, model.dtype, "np.empty_like")


def outputs(
    verb: str, reads: Sequence[HostArray], out: Any, shapes: Sequence[tuple[int, ...]]
) -> list[HostArray]:
    """Return the result arrays: new ones of ``shapes``, or ``out`` where it is given.

    Raise unless ``out`` has these shapes and shares no element with itself or with ``reads``.
    """
    dtype = reads[0].dtype
    if out is None:
        return [np.empty(shape, dtype) for shape in shapes]
    writes = _outs(verb, out, len(shapes))
    _check_outs(verb, writes, shapes, dtype, "np.empty")
    check_overlaps(verb, writes, reads, "out {}".format, may_be_inputs=False)
    return writes


def _check_outs(
    verb: str,
    writes: Sequence[HostArray],
    shapes: Sequence[tuple[int, ...]],
    dtype: np.dtype[Any],
    remedy: str,
) -> None:
    for index, (write, shape) in enumerate(zip(writes, shapes, strict=True)):
        if write.shape != shape or write.dtype != dtype:
            raise BufferMismatchError(
                f"{verb} needs an out of {Spec(shape, dtype)}, as the buffers require: "
                f"out {index} holds {spec(write)}; allocate it with {remedy}"
            )
        if not write.flags.writeable:
            raise_read_only(verb, f"out {index}")


def outputs_like(verb: str, reads: Sequence[HostArray], out: Any) -> list[HostArray]:
    """Return the arrays of ``out``, one for each of ``reads``; raise unless they fit."""
    writes = _outs(verb, out, len(reads))
    check_out(verb, reads, writes, len(reads))
    return writes


def _outs(verb: str, out: Sequence[Any], count: int) -> list[HostArray]:
    """Return a view of each array of ``out``; raise unless there are ``count``."""
    if len(out) != count:
        raise BufferMismatchError(
            f"{verb} needs {count} out array{'s' * (count != 1)}; got {len(out)}; "
            "pass one per result"
        )
    return views(verb, out, "out")


def reduction(verb: str, op: Any, dtype: np.dtype[Any]) -> Reduction:
    """Return the ``ReduceOp`` that ``op`` names; raise unless it is defined for ``dtype``."""
    known = reduce_op.parse(op)
    reduce_op.check_dtype(verb, known, dtype)
    return known


def algorithm(verb: str, name: Any, known: Mapping[str, T]) -> T:
    """Return the entry of ``known`` for an algorithm's name; raise unless there is one."""
    if not isinstance(name, str) or name not in known:
        names = ", ".join(map(repr, known))
        raise AlgorithmError(f"{verb}: expected an algorithm of {names}; got {name!r}")
    return known[name]


def check_root(verb: str, root: Any, num_replicas: int) -> int:
    """Return ``root`` as an int; raise unless it names a replica."""
    try:
        index = -1 if isinstance(root, (bool, np.bool_)) else root.__index__()
    except AttributeError:
        index = -1
    if not 0 <= index < num_replicas:
        raise BufferMismatchError(
            f"{verb} needs a root in 0..{num_replicas - 1}, one of the {num_replicas} replicas; "
            f"got {root!r}"
        )
    return int(index)


def check_dtype_moves(verb: str, dtype: np.dtype[Any]) -> None:
    """Raise for dtypes whose bytes cannot be copied: references to Python objects."""
    if dtype.hasobject:
        raise UnsupportedDTypeError(
            f"{verb} moves bytes, and {dtype} holds references to Python objects; "
            "convert to a numeric dtype first"
        )


def _view(verb: str, buffer: Any, name: str) -> HostArray:
    """Return a NumPy view of a buffer that is not a plain ndarray."""
    if isinstance(buffer, np.ndarray):
        refuse_masked(buffer, f"{verb} needs arrays: {name}")
        return buffer.view(np.ndarray)
    viewed: HostArray = interop.view(verb, buffer, name)
    return viewed
