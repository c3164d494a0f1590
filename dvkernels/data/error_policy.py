"""Errors of user functions: outcomes, and the policy ``on_error="skip"``, which records them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

from dvkernels import user_errors
from dvkernels.data.array_nest import Element, owned_copy

__all__: list[str] = []

_MAX_LISTED = 100


class SkippedElements:
    """Count of the elements that were left out, and a list of the first hundred."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.count = 0
        self.listed: list[str] = []

    def note(self, error: Exception, where: str) -> None:
        """Record that an element was left out."""
        location = user_errors.latest_note(error) or where
        text = f"{user_errors.describe(error)}; {location}"
        try:
            self._lock.acquire()
            self.count += 1
            if len(self.listed) < _MAX_LISTED:
                self.listed.append(text)
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self._lock.release()
            except RuntimeError:  # not acquired: the wait was interrupted
                pass


# Records failing elements instead of raising their errors; None: they are raised.
skipping: ContextVar[SkippedElements | None] = ContextVar("dvkernels_skipping", default=None)


class Outcome(NamedTuple):
    """Result of a function, or the exception that it raised."""

    value: Any
    error: Exception | None


def outcome_of(fn: Callable[[Element], Any], element: Element) -> Outcome:
    """Return the outcome of ``fn(element)``."""
    try:
        return Outcome(fn(element), None)
    except Exception as error:
        return Outcome(None, error)


def owned_outcome_of(fn: Callable[[Element], Any], element: Element) -> Outcome:
    """Return the outcome of ``fn(element)``, its value copied: ``fn`` may reuse its memory."""
    return outcome_of(lambda argument: owned_copy(fn(argument)), element)
