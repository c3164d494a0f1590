"""Nests of arrays: stacking elements into a batch, joining batches, naming leaves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import optree

from dvkernels.errors import DatasetError
from dvkernels.user_errors import shown

__all__ = [
    "concatenate",
    "flatten",
    "is_flat_dict",
    "is_flat_tuple",
    "leading_length",
    "leaf_names",
    "nbytes_of",
    "slice_rows",
    "stack",
    "take",
]


def flatten(nest: Any) -> tuple[list[Any], optree.PyTreeSpec]:
    """Return the leaves and the structure of ``nest``; None is a leaf."""
    return optree.tree_flatten(nest, none_is_leaf=True)


def is_flat_tuple(nest: Any) -> bool:
    """Tell whether ``nest`` is a plain, non-empty tuple of arrays: its own list of leaves."""
    return type(nest) is tuple and bool(nest) and all(type(leaf) is np.ndarray for leaf in nest)


def is_flat_dict(nest: Any) -> bool:
    """Tell whether ``nest`` is a plain, non-empty dict of arrays."""
    return (
        type(nest) is dict
        and bool(nest)
        and all(type(leaf) is np.ndarray for leaf in nest.values())
    )


def leaf_names(nest: Any, root: str) -> list[str]:
    """Return the path of each leaf as Python code: ``nest['image'][0]``."""
    return [path.codify(root) for path in optree.tree_accessors(nest, none_is_leaf=True)]


def stack(elements: Sequence[Any]) -> Any:
    """Stack the elements (one or more) along a new leading axis, leaf by leaf.

    Raises
    ------
    DatasetError
        The structures, or the shapes of a leaf, differ, or a leaf is not an array or a number.
    """
    first, spec = flatten(elements[0])
    rows = [first]
    for place, element in enumerate(elements[1:], 1):
        leaves, other = flatten(element)
        if other != spec:
            raise DatasetError(
                "batch: expected the elements of a batch to have one structure; got "
                f"{spec!s:.200} for its element 0 and {other!s:.200} for its element {place}; "
                "make them alike with map()"
            )
        rows.append(leaves)
    columns: list[Any] = []
    for which, column in enumerate(zip(*rows, strict=True)):
        arrays = [leaf if type(leaf) is np.ndarray else np.asarray(leaf) for leaf in column]
        for place, (leaf, array) in enumerate(zip(column, arrays, strict=True)):
            alike = array.shape == arrays[0].shape
            if alike and (array.dtype != object or hasattr(leaf, "dtype")):
                continue
            name = leaf_names(elements[0], "element")[which]
            if alike:
                raise DatasetError(
                    f"batch: expected arrays or numbers to stack; got {shown(leaf)}, a "
                    f"{type(leaf).__name__}, as {name} of element {place} of the batch; "
                    "turn it into an array with map()"
                )
            raise DatasetError(
                f"batch: expected one shape to stack; got {arrays[0].shape} for {name} of element "
                f"0 of the batch and {array.shape} for that of element {place}; pad or crop with "
                "map(), or pass drop_remainder=True to an earlier batch()"
            )
        columns.append(np.stack(arrays))
    return spec.unflatten(columns)


def concatenate(batches: Sequence[Any]) -> Any:
    """Join batches (one or more) of one structure along their leading axis, leaf by leaf."""
    if len(batches) == 1:
        return batches[0]
    return optree.tree_map(
        lambda *leaves: np.concatenate(leaves), batches[0], *batches[1:], none_is_leaf=True
    )


def leading_length(batch: Any) -> int:
    """Return the number of rows of a batch to distribute.

    Raises
    ------
    DatasetError
        It holds nothing, something without a leading axis, or arrays of different lengths.
    """
    leaves, _ = flatten(batch)
    if not leaves:
        raise DatasetError(
            f"distribute_dataset: expected batches with at least one array; got {shown(batch)}; "
            "let the dataset's elements hold something"
        )
    found = []
    for name, leaf in zip(leaf_names(batch, "batch"), leaves, strict=True):
        shape = getattr(leaf, "shape", None)
        if not shape:
            raise DatasetError(
                "distribute_dataset: expected batches, arrays with a leading axis to share "
                f"among the replicas; got {shown(leaf)}, a {type(leaf).__name__}, as {name}; "
                "call .batch(global_batch_size) on the dataset"
            )
        found.append((name, int(shape[0])))
    if len({length for _, length in found}) > 1:
        lengths = ", ".join(f"{length} for {name}" for name, length in found)
        raise DatasetError(
            "distribute_dataset: expected one leading length, that of the global batch; got "
            f"{lengths}; call .batch(global_batch_size) on the dataset"
        )
    return found[0][1]


def slice_rows(batch: Any, start: int, stop: int) -> Any:
    """Return rows of every leaf, as views where the leaves are arrays."""
    return optree.tree_map(lambda leaf: leaf[start:stop], batch, none_is_leaf=True)


def nbytes_of(nest: Any) -> int:
    """Return the bytes of the arrays in a nest."""
    if type(nest) is np.ndarray:
        return nest.nbytes
    leaves: Iterable[Any]
    if is_flat_tuple(nest):
        leaves = nest
    else:
        leaves = nest.values() if is_flat_dict(nest) else optree.tree_leaves(nest)
    return sum([getattr(leaf, "nbytes", 0) for leaf in leaves])


def take(batch: Any, indices: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
    """Return the rows ``indices`` of every leaf."""
    return optree.tree_map(lambda leaf: leaf[indices], batch, none_is_leaf=True)
