"""How long anything waits for anybody: one number for all waits, set by the environment."""

from __future__ import annotations

import os
import threading

__all__ = ["PATIENCE_SECONDS", "timeout_seconds"]

PATIENCE_SECONDS = 600.0


def timeout_seconds() -> float:
    """Return how long a wait may last: ``DVKERNELS_TIMEOUT_SECONDS``, else 600."""
    text = os.environ.get("DVKERNELS_TIMEOUT_SECONDS")
    if text is None:
        return PATIENCE_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise ValueError(f"DVKERNELS_TIMEOUT_SECONDS must be a positive number, got {text!r}")
    return seconds
