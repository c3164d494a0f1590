"""What a replica brings to a collective: a nest of arrays, and how results go back into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.communicators.base import Workers
from dvkernels.devices import array_memory, interop
from dvkernels.devices.buffers import Spec, refuse_masked, spec
from dvkernels.errors import NotABufferError
from dvkernels.user_errors import shown, text_of
from dvkernels.values import regroup
from dvkernels.values.distributed import is_integer

__all__: list[str] = []


class ArrayLeaves(NamedTuple):
    """The leaves of a nest as arrays of NumPy or, on GPUs, CuPy, and what they were."""

    held: list[Any]
    structure: Any  # None: one array, no nest
    specs: Any  # one, or a tuple
    leaves: Sequence[Any] | None  # where some are arrays of other libraries

    def nest(self, results: Sequence[Any]) -> Any:
        """Return results in the place and of the kind of what came."""
        if self.leaves is not None:
            results = [
                array_memory.holding(array).like(array, leaf)
                for array, leaf in zip(results, self.leaves, strict=True)
            ]
        return results[0] if self.structure is None else regroup.unflatten(self.structure, results)


def arrays_of(
    value: Any,
    verb: str,
    replica: int,
    own_of: Callable[[Any], Any],
    seen: array_memory.ArrayMemory,
) -> ArrayLeaves:
    """Return a nest's arrays; a distributed value in it means this replica's component.

    ``replica`` is its id, ``own_of`` returns its component; ``seen`` is the memory in which arrays
    of other libraries may lie.
    """
    if type(value) is np.ndarray:
        return ArrayLeaves([value], None, spec(value), None)
    leaves, structure = regroup.flatten(value)
    own = [own_of(leaf) for leaf in leaves]
    held = [as_array(leaf, verb, replica, seen) for leaf in own]
    specs = tuple(spec(array) for array in held)
    theirs = own if any(interop.is_foreign(leaf) for leaf in own) else None
    if len(leaves) == 1 and leaves[0] is value:
        return ArrayLeaves(held, None, specs[0], theirs)
    return ArrayLeaves(held, structure, specs, theirs)


def as_array(
    value: Any, verb: str, replica: int, seen: array_memory.ArrayMemory = array_memory.HOST
) -> Any:
    """Return a leaf as an array; strings, objects and ragged lists raise NotABufferError."""
    if interop.is_foreign(value):
        return seen.view(verb, value, f"the {type(value).__name__} of replica {replica}")
    if type(value) is not np.ndarray:
        refuse_masked(value, f"{verb}: what replica {replica} passed")
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
            f"{verb}: expected an array or a number, replica {replica} passed {shown(value, 60)} "
            "of "
            f"type {type(value).__name__}"
        )
    return array


def gatherable(
    verb: str, arrays: list[Any], axis: int, replica: int
) -> tuple[list[Any], list[int], tuple[Any, ...]]:
    """Return arrays ready to be concatenated, the axis of each, and what must agree."""
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


# What strings of any width are called: they are gathered in the widest.
_STRINGS = {"U": "str", "S": "bytes"}


def alike(column: Sequence[Any], workers: Workers) -> Sequence[Any]:
    """Return arrays to be concatenated with one dtype: strings as wide as the widest of all.

    Every worker must call this.
    """
    if column[0].dtype.kind not in _STRINGS:
        return column
    dtype = np.result_type(*(array.dtype for array in column))
    widest = max(workers.exchange(dtype.itemsize))
    if dtype.itemsize < widest:
        dtype = np.dtype((dtype.type, widest // np.dtype((dtype.type, 1)).itemsize))
    return [array.astype(dtype, copy=False) for array in column]
