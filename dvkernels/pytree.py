"""Pytrees: nested containers, flattened, rebuilt and mapped, and their structures in messages.

A pytree is a nested structure that optree can flatten: lists, tuples, dicts, namedtuples and
registered dataclasses. None is a leaf, so that it keeps its position. No other module imports
optree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import optree

__all__ = [
    "Structure",
    "describe_structure",
    "flatten",
    "flatten_one_level",
    "is_leaf",
    "leaf_names",
    "leaves",
    "map_leaves",
    "unflatten",
]

Structure: TypeAlias = optree.PyTreeSpec
"""The containers of a pytree without its leaves; structures compare by ``==``."""

# Bound, not wrapped: a call enters no frame but optree's.

flatten: Callable[[Any], tuple[list[Any], Structure]]
flatten = functools.partial(optree.tree_flatten, none_is_leaf=True)
"""Return the leaves of a pytree and its structure."""

unflatten: Callable[[Structure, Iterable[Any]], Any] = optree.tree_unflatten
"""Return the pytree of a structure with these leaves."""

leaves: Callable[[Any], list[Any]] = functools.partial(optree.tree_leaves, none_is_leaf=True)
"""Return the leaves of a pytree."""

map_leaves: Callable[..., Any] = functools.partial(optree.tree_map, none_is_leaf=True)
"""Return the pytree of ``fn(leaf, ...)`` for each leaf of one or more pytrees."""

is_leaf: Callable[[Any], bool] = functools.partial(optree.tree_is_leaf, none_is_leaf=True)
"""Return whether a value is no container."""

flatten_one_level = functools.partial(optree.tree_flatten_one_level, none_is_leaf=True)
"""Return a container's children, its metadata, their keys, and ``rebuild(metadata, children)``."""


def leaf_names(tree: Any, root: str) -> list[str]:
    """Return the path of each leaf as Python code: ``nest['image'][0]``."""
    return [path.codify(root) for path in optree.tree_accessors(tree, none_is_leaf=True)]


_MAX_LENGTH = 200


def describe_structure(structure: Structure) -> str:
    """Describe a pytree structure for messages: ``a dict of 'image', 'label'``."""
    text = _describe(structure)
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."


def _describe(structure: Structure) -> str:
    if structure.type is None:
        return "one value"
    children = structure.children()
    name = structure.type.__name__
    article = "an" if name[0] in "aeiouAEIOU" else "a"
    if not children:
        return f"an empty {name}"
    names = getattr(structure.type, "_fields", None)  # a namedtuple
    if names is None and not issubclass(structure.type, Mapping):
        if all(child.type is None for child in children):
            return f"{article} {name} of {len(children)}"
        return f"{article} {name} of ({', '.join(map(_describe, children))})"
    named = zip(names or map(repr, structure.entries()), children, strict=True)
    items = (key if child.type is None else f"{key}: {_describe(child)}" for key, child in named)
    return f"{article} {name} of {', '.join(items)}"
