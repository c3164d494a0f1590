"""Pytrees in error messages: descriptions of their structures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optree

__all__ = ["describe_structure", "is_structure"]

_MAX_LENGTH = 200


def is_structure(value: object) -> bool:
    """Return whether a value is a pytree structure (a ``PyTreeSpec`` of optree)."""
    return isinstance(value, optree.PyTreeSpec)


def describe_structure(structure: Any) -> str:
    """Describe a pytree structure for messages: ``a dict of 'image', 'label'``."""
    text = _describe(structure)
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."


def _describe(structure: Any) -> str:
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
