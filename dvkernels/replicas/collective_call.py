"""Collective call of one replica, compared with those of the other replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dvkernels.profiler.collective_hooks import call_text

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
        return call_text(self.verb, self.terms)
