"""Timeout of all waits, set by an environment variable, and of one strategy, by an argument."""

from __future__ import annotations

import math
import os
import threading

__all__ = ["DEFAULT_TIMEOUT_SECONDS", "VARIABLE", "checked", "of_strategy", "timeout_seconds"]

DEFAULT_TIMEOUT_SECONDS = 600.0
VARIABLE = "DVKERNELS_TIMEOUT_SECONDS"


def timeout_seconds() -> float:
    """Return the timeout of a wait [s]: ``DVKERNELS_TIMEOUT_SECONDS``, or 600 if not set."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return DEFAULT_TIMEOUT_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not _is_timeout(seconds):
        raise ValueError(f"DVKERNELS_TIMEOUT_SECONDS must be a positive number, got {text!r}")
    return seconds


def of_strategy(seconds: float) -> float:
    """Return the timeout of a strategy [s]; the default gives way to the environment variable."""
    return timeout_seconds() if seconds == DEFAULT_TIMEOUT_SECONDS else seconds


def checked(timeout_seconds: object) -> float:
    """Return the argument ``timeout_seconds`` of a strategy; raise ``ValueError`` if it is bad."""
    try:
        seconds = float(timeout_seconds)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = math.nan
    if not _is_timeout(seconds):
        raise ValueError(
            f"timeout_seconds is a positive number of at most {threading.TIMEOUT_MAX:g}, got "
            f"{timeout_seconds!r}"
        )
    return seconds


def _is_timeout(seconds: float) -> bool:
    return 0 < seconds <= threading.TIMEOUT_MAX
