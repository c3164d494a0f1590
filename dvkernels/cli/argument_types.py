"""Argument types of command-line options, the option ``--json``, and counted nouns."""

from __future__ import annotations

import argparse
import math

__all__: list[str] = []


def integer(text: str) -> int:
    """Parse an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """Parse an integer of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    number = integer(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"expected a number of at least {least}, got {text}")
    return number


def positive_number(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return number


def exit_status(text: str) -> int:
    """Parse the exit status of a process."""
    number = integer(text)
    if not 0 <= number <= 255:
        raise argparse.ArgumentTypeError(f"expected an exit status from 0 to 255, got {text}")
    return number


def seconds(text: str) -> float:
    """Parse a time of at least 0, in seconds."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}") from None
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"expected seconds of at least 0, got {text}")
    return number


def add_json(parser: argparse.ArgumentParser, content: str) -> None:
    """Declare the option that makes standard output one JSON object."""
    parser.add_argument(
        "--json",
        action="store_true",
        help=f"print {content} as one JSON object (default: lines of text)",
    )


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural unless the number is 1.

    Examples
    --------
    >>> counted(1, "replica"), counted(2, "replica")
    ('1 replica', '2 replicas')
    """
    return f"{number} {noun}{'s' * (number != 1)}"
