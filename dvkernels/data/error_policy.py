"""Error policy ``on_error="skip"``: elements that raise are left out and recorded."""

from __future__ import annotations

import threading
from contextvars import ContextVar

from dvkernels import user_errors

__all__ = ["SkippedElements", "skipping"]

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
