"""Elements that failed and were left out, because the user said so."""

from __future__ import annotations

import threading
from contextvars import ContextVar

from dvkernels import user_errors

__all__ = ["SkippedElements", "skipping"]

_LISTED = 100


class SkippedElements:
    """Counts the elements that were left out, and lists the first of them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.count = 0
        self.listed: list[str] = []

    def note(self, error: Exception, where: str) -> None:
        """Remember that an element was left out."""
        said = user_errors.latest_note(error) or where
        text = f"{user_errors.in_words(error)}; {said}"
        try:
            self._lock.acquire()
            self.count += 1
            if len(self.listed) < _LISTED:
                self.listed.append(text)
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self._lock.release()
            except RuntimeError:  # not ours: the wait was interrupted
                pass


# Where failing elements are noted instead of raised; None: they are raised.
skipping: ContextVar[SkippedElements | None] = ContextVar("dvkernels_skipping", default=None)
