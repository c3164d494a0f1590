"""Outcome of a function applied to an element: its result or its exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dvkernels.data.array_nest import owned_copy

__all__ = ["Outcome", "outcome_of", "owned_outcome_of"]


class Outcome(NamedTuple):
    """Result of a function, or the exception that it raised."""

    value: Any
    error: Exception | None


def outcome_of(fn: Callable[[Any], Any], element: Any) -> Outcome:
    """Return the outcome of ``fn(element)``."""
    try:
        return Outcome(fn(element), None)
    except Exception as error:
        return Outcome(None, error)


def owned_outcome_of(fn: Callable[[Any], Any], element: Any) -> Outcome:
    """Return the outcome of ``fn(element)``, its value copied: ``fn`` may reuse its memory."""
    return outcome_of(lambda argument: owned_copy(fn(argument)), element)
