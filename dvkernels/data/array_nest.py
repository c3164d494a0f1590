"""Operations on pytrees of arrays: concatenate, slice and copy batches, name their leaves."""

from __future__ import annotations

import array
import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeGuard

import numpy as np

from dvkernels import pytree
from dvkernels.data.checks import unexpected
from dvkernels.devices import interop
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import DatasetError
from dvkernels.user_errors import brief

__all__: list[str] = []

Element: TypeAlias = Any
"""An element of a dataset: a pytree of arrays, numbers and other objects."""

_LONGEST_OUTLINE = 200

# Immutable, so they need no copy.
_IMMUTABLE_TYPES = frozenset({bool, int, float, complex, str, bytes, type(None)})


def is_flat_tuple(nest: Element) -> TypeGuard[tuple[HostArray, ...]]:
    """Return whether ``nest`` is a plain, non-empty tuple of arrays, thus its list of leaves."""
    return type(nest) is tuple and bool(nest) and all(type(leaf) is np.ndarray for leaf in nest)


def is_flat_dict(nest: Element) -> TypeGuard[dict[Any, HostArray]]:
    """Return whether ``nest`` is a plain, non-empty dict of arrays."""
    return (
        type(nest) is dict
        and bool(nest)
        and all(type(leaf) is np.ndarray for leaf in nest.values())
    )


def outline(
    nest: Element, root: str, describe: Callable[[np.dtype[Any], tuple[int, ...]], Any]
) -> str:
    """Return one line with each leaf's name and ``describe(dtype, shape)``.

    A long line is truncated and ends with a digest of the whole.
    """
    leaves = pytree.leaves(nest)
    parts = []
    for name, leaf in zip(pytree.leaf_names(nest, root), leaves, strict=True):
        array = as_array(leaf, "outline", name)
        parts.append(f"{name}: {describe(array.dtype, array.shape)}")
    text = ", ".join(parts)
    if len(text) <= _LONGEST_OUTLINE:
        return text
    return f"{text[:_LONGEST_OUTLINE]}... {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def as_array(leaf: Any, verb: str, where: str) -> HostArray:
    """Return a leaf as a NumPy array; error messages call it ``where``.

    Raises
    ------
    DatasetError
        The leaf is a masked array, which would lose its mask.
    """
    if isinstance(leaf, np.ma.MaskedArray):
        raise DatasetError(
            f"{verb}: expected an array without a mask as {where}; got a {type(leaf).__name__}, "
            "whose mask would be ignored; pass .filled(value) or .data, and the mask as an array "
            "of its own"
        )
    try:
        view: HostArray = np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError):
        if not interop.is_foreign(leaf):
            raise
        view = interop.view(verb, leaf, where)  # for tensors with a gradient, say
    return view


def owned_copy(element: Element) -> Element:
    """Return a copy of an element that shares no memory with it.

    Copied are arrays of any library, memoryviews, byte arrays and structured scalars, also within
    pytrees and dataclasses. Other objects are returned as they are.
    """
    kind = type(element)
    if kind in _IMMUTABLE_TYPES:
        return element
    if kind is np.ndarray:
        return element.copy("K")
    return pytree.map_leaves(_owned_leaf_copy, element)


def _owned_leaf_copy(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        if isinstance(leaf, np.ma.MaskedArray):
            as_array(leaf, "next", "a part of an element")
        return leaf.copy("K")
    if isinstance(leaf, np.generic):
        return leaf.copy() if isinstance(leaf, np.void) else leaf  # a void is a view of its array
    if type(leaf) in _IMMUTABLE_TYPES:
        return leaf
    if interop.is_foreign(leaf):
        return interop.copy(leaf)
    if isinstance(leaf, memoryview):
        return np.array(leaf).data
    if isinstance(leaf, bytearray | array.array):
        return copy.copy(leaf)
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        clone = copy.copy(leaf)
        for field in dataclasses.fields(leaf):
            if hasattr(leaf, field.name):
                object.__setattr__(clone, field.name, owned_copy(getattr(leaf, field.name)))
        return clone
    return leaf


def concatenate(batches: Sequence[Element]) -> Element:
    """Concatenate one or more batches of one structure along their leading axis."""
    if len(batches) == 1:
        return batches[0]
    return pytree.map_leaves(lambda *leaves: np.concatenate(leaves), *batches)


def leading_length(batch: Element) -> int:
    """Return the number of rows of a batch to distribute.

    Raises
    ------
    DatasetError
        The batch has no leaf, a leaf without a leading axis, or leaves of different lengths.
    """
    leaves = pytree.leaves(batch)
    first_axes: set[Any] = {(getattr(leaf, "shape", None) or (None,))[0] for leaf in leaves}
    if len(first_axes) == 1 and None not in first_axes:
        return int(first_axes.pop())
    if not leaves:
        raise DatasetError(
            f"distribute_dataset: expected batches with at least one array; got {brief(batch)}; "
            "let the dataset's elements hold something"
        )
    found = []
    for name, leaf in zip(pytree.leaf_names(batch, "batch"), leaves, strict=True):
        shape = getattr(leaf, "shape", None)
        if not shape:
            wanted = "batches, arrays with a leading axis to share among the replicas"
            remedy = "call .batch(global_batch_size) on the dataset"
            raise unexpected("distribute_dataset", wanted, leaf, remedy, f", as {name}")
        found.append(f"{shape[0]} for {name}")
    raise DatasetError(
        "distribute_dataset: expected one leading length, that of the global batch; got "
        f"{', '.join(found)}; call .batch(global_batch_size) on the dataset"
    )


def slice_rows(batch: Element, start: int, stop: int) -> Element:
    """Return the rows ``start`` to ``stop`` of every leaf, as views of arrays."""
    return pytree.map_leaves(lambda leaf: leaf[start:stop], batch)


def nbytes_of(nest: Element) -> int:
    """Return the number of bytes of the arrays in a pytree."""
    if type(nest) is np.ndarray:
        return nest.nbytes
    leaves: Iterable[Any]
    if is_flat_tuple(nest):
        leaves = nest
    else:
        leaves = nest.values() if is_flat_dict(nest) else pytree.leaves(nest)
    return sum([getattr(leaf, "nbytes", 0) for leaf in leaves])


def take(batch: Element, indices: np.ndarray[Any, np.dtype[np.int64]]) -> Element:
    """Return the rows ``indices``, of shape (n,), of every leaf."""
    return pytree.map_leaves(lambda leaf: leaf[indices], batch)
