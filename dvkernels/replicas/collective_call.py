"""Collective call of one replica, compared with those of the other replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dvkernels import pytree, user_errors

__all__: list[str] = []


class Same(int):
    """The ``id`` of an object that must be the same in all replicas; not printed."""

    __slots__ = ()

    def __str__(self) -> str:
        return ""


class CollectiveCall(NamedTuple):
    """Call of a collective by one replica."""

    verb: str  # the name the user called: all_reduce, barrier, Variable.assign
    terms: tuple[Any, ...]  # what all replicas must agree on: op, structure, shapes, dtypes
    payload: Any  # this replica's contribution
    act: Callable[[list[Any]], Sequence[Any]]  # all payloads -> one result per replica

    def __str__(self) -> str:
        terms = (
            pytree.describe_structure(term)
            if isinstance(term, pytree.Structure)
            else user_errors.text_of(term)
            for term in self.terms
            if term is not None
        )
        return f"{self.verb}({', '.join(term for term in terms if term)})"
