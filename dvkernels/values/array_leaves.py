"""Conversion of a pytree to the arrays of a collective, and of results back to the pytree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels import pytree
from dvkernels.communicators.base import Workers
from dvkernels.devices import array_memory, interop
from dvkernels.devices.array_spec import Spec, refuse_masked, spec
from dvkernels.errors import NotABufferError
from dvkernels.user_errors import brief, text_of
from dvkernels.values.distributed import is_integer

__all__: list[str] = []


class ArrayLeaves(NamedTuple):
    """The leaves of a pytree as NumPy arrays or, on GPUs, CuPy arrays."""

    arrays: list[Any]
    structure: Any  # optree's PyTreeSpec; None: a single array, no pytree
    specs: Any  # the shape and dtype of the single array, or a tuple of one per array
    originals: Sequence[Any] | None  # the leaves as passed, if any is another library's array

    def restored(self, results: Sequence[Any]) -> Any:
        """Return results as a pytree of this structure, each of the array type of its leaf."""
        if self.originals is not None:
            results = [
                array_memory.holding(array).like(array, leaf)
                for array, leaf in zip(results, self.originals, strict=True)
            ]
        return results[0] if self.structure is None else pytree.unflatten(self.structure, results)


def arrays_of(
    value: Any,
    verb: str,
    replica: int,
    own_of: Callable[[Any], Any],
    memory: array_memory.ArrayMemory,
) -> ArrayLeaves:
    """Return the leaves of a pytree as arrays; a distributed leaf gives this replica's component.

    ``replica`` is the id of the replica, for messages; ``own_of`` returns its component of a leaf;
    ``memory`` is the memory in which arrays of other libraries may lie.
    """
    if type(value) is np.ndarray:
        return ArrayLeaves([value], None, spec(value), None)
    leaves, structure = pytree.flatten(value)
    own = [own_of(leaf) for leaf in leaves]
    arrays = [as_array(leaf, verb, replica, memory) for leaf in own]
    specs = tuple(spec(array) for array in arrays)
    originals = own if any(interop.is_foreign(leaf) for leaf in own) else None
    if len(leaves) == 1 and leaves[0] is value:
        return ArrayLeaves(arrays, None, specs[0], originals)
    return ArrayLeaves(arrays, structure, specs, originals)


def as_array(
    value: Any, verb: str, replica: int, memory: array_memory.ArrayMemory = array_memory.HOST
) -> Any:
    """Return a leaf as an array; objects and ragged lists raise ``NotABufferError``."""
    if interop.is_foreign(value):
        return memory.view(verb, value, f"the {type(value).__name__} of replica {replica}")
    if type(value) is not np.ndarray:
        refuse_masked(value, f"{verb}: the value of replica {replica}")
    array: Any
    try:
        array = np.asarray(value)
    except Exception as error:
        raise NotABufferError(
            f"{verb}: replica {replica} passed a {type(value).__name__} that is not an array or a "
            f"number ({text_of(error)})"
        ) from error
    if array.dtype.hasobject and isinstance(value, np.ndarray):
        raise NotABufferError(
            f"{verb}: expected numbers, or strings of fixed width, replica {replica} passed an "
            f"array of {array.dtype}, which holds references; convert it with .astype first"
        )
    if array.dtype.hasobject:
        raise NotABufferError(
            f"{verb}: expected an array or a number, replica {replica} passed {brief(value, 60)} "
            f"of type {type(value).__name__}"
        )
    return array


def prepare_gather(
    verb: str, arrays: list[Any], axis: int, replica: int
) -> tuple[list[Any], list[int], tuple[Any, ...]]:
    """Return arrays to concatenate, the non-negative axis of each, and the specs that must agree.

    0-d arrays become arrays of length 1. In the specs the length along the axis is ``"any"``, and
    strings have no width.
    """
    if not is_integer(axis):
        raise ValueError(f"{verb}: axis must be an integer, got {axis!r}")
    ready, axes, described = [], [], []
    for array in arrays:
        stacked = array.reshape(1) if array.ndim == 0 else array
        if not -stacked.ndim <= axis < stacked.ndim:
            raise ValueError(
                f"{verb}: axis {axis} is out of range for {spec(array)} of replica {replica}"
            )
        position = int(axis) % stacked.ndim
        shape = (*stacked.shape[:position], "any", *stacked.shape[position + 1 :])
        ready.append(stacked)
        axes.append(position)
        described.append(Spec(shape, _STRINGS.get(array.dtype.kind, array.dtype)))
    return ready, axes, tuple(described)


# The name in specs of strings of any width: they are gathered with the widest width.
_STRINGS = {"U": "str", "S": "bytes"}


def with_common_dtype(column: Sequence[Any], workers: Workers) -> Sequence[Any]:
    """Return arrays to concatenate with one dtype: strings get the widest width of all workers.

    Every worker must call this: the workers exchange their widths.
    """
    if column[0].dtype.kind not in _STRINGS:
        return column
    dtype = np.result_type(*(array.dtype for array in column))
    widest = max(workers.exchange(dtype.itemsize))
    if dtype.itemsize < widest:
        dtype = np.dtype((dtype.type, widest // np.dtype((dtype.type, 1)).itemsize))
    return [array.astype(dtype, copy=False) for array in column]
