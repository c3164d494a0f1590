"""Line below a notebook's cell that says how many workers have ended, while a function runs."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["NotebookLine"]

_FIRST_SECONDS = 1.0  # short calls show nothing
_REFRESH_SECONDS = 0.5


class NotebookLine:
    """Line of text that replaces itself; outside of notebooks it shows nothing."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._due = self._started + _FIRST_SECONDS
        self._handle: Any = None

    def show(self, num_ended: int, num_workers: int) -> None:
        """Show the present state, unless it was shown a moment ago."""
        now = time.monotonic()
        if now < self._due or not _is_in_notebook():
            return
        self._due = now + _REFRESH_SECONDS
        seconds = int(now - self._started)
        self._write(f"{num_ended} of {num_workers} workers have ended, {seconds} s")

    def clear(self) -> None:
        """Remove the text."""
        if self._handle is not None:
            self._write("")

    def _write(self, text: str) -> None:
        from IPython import display as untyped

        display: Any = untyped.display
        content = {"text/plain": text}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def _is_in_notebook() -> bool:
    """Return whether this code runs in a kernel of Jupyter."""
    interactive = sys.modules.get("IPython")
    shell = interactive.get_ipython() if interactive is not None else None
    return getattr(shell, "kernel", None) is not None
