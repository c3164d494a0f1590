"""What a function made of an element, or the error it raised: both go on to whoever asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dvkernels.data.array_nest import owned

__all__ = ["Outcome", "outcome_of", "owned_outcome_of"]


class Outcome(NamedTuple):
    """What the function made of an element: a value, or the error it raised."""

    value: Any
    error: Exception | None


def outcome_of(fn: Callable[[Any], Any], element: Any) -> Outcome:
    """Return what a function makes of an element."""
    try:
        return Outcome(fn(element), None)
    except Exception as error:
        return Outcome(None, error)


def owned_outcome_of(fn: Callable[[Any], Any], element: Any) -> Outcome:
    """Return what a function makes of an element, in memory that it does not use again."""
    return outcome_of(lambda given: owned(fn(given)), element)
