"""Numbers that options take."""

from __future__ import annotations

import argparse

__all__: list[str] = []


def positive(text: str) -> int:
    """Return an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return number


def natural(text: str) -> int:
    """Return an integer of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text}")
    return number


def seconds(text: str) -> float:
    """Return a time of at least 0, in seconds."""
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"expected seconds of at least 0, got {text}")
    return number
