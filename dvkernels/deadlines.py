"""Timeout of all waits, set by an environment variable."""

from __future__ import annotations

import os
import threading

__all__ = ["DEFAULT_TIMEOUT_SECONDS", "VARIABLE", "timeout_seconds"]

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
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise ValueError(f"DVKERNELS_TIMEOUT_SECONDS must be a positive number, got {text!r}")
    return seconds
