"""Progress bar below a notebook's cell: how many workers have ended, while a function runs."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["NotebookLine"]

_FIRST_SECONDS = 1.0  # short calls show nothing
_REFRESH_SECONDS = 0.5


class NotebookLine:
    """Bar with a line of text, which replace themselves; outside of notebooks it shows nothing."""

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
        text = f"{num_ended} of {num_workers} workers have ended, {seconds} s"
        bar = f'<progress value="{num_ended}" max="{num_workers}"></progress>'
        self._write(text, f"<label>{text} {bar}</label>")

    def clear(self) -> None:
        """Remove the bar."""
        if self._handle is not None:
            self._write("", "")

    def _write(self, text: str, html: str) -> None:
        from IPython import display as untyped

        display: Any = untyped.display
        content = {"text/plain": text, "text/html": html}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def _is_in_notebook() -> bool:
    """Return whether this code runs in a kernel of Jupyter."""
    interactive = sys.modules.get("IPython")
    shell = interactive.get_ipython() if interactive is not None else None
    return getattr(shell, "kernel", None) is not None
