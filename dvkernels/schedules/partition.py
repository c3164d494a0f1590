"""Partition of a length into parts whose lengths differ by at most one, larger parts first."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

__all__ = ["bounds", "parts", "start", "starts", "widths"]


def bounds(length: int, num_parts: int, part: int) -> tuple[int, int]:
    """Return the start and the stop of part ``part`` of ``num_parts``.

    >>> [bounds(10, 4, part) for part in range(4)]
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    """
    _check(length, num_parts)
    if not 0 <= part < num_parts:
        raise ValueError(f"part must be in 0..{num_parts - 1}; got {part}")
    small, num_larger = widths(length, num_parts)
    return start(small, num_larger, part), start(small, num_larger, part + 1)


def widths(length: int, num_parts: int) -> tuple[int, int]:
    """Return the length of the smaller parts, and the number of parts that are longer by one.

    >>> widths(10, 4)
    (2, 2)
    """
    return divmod(length, num_parts)


def start(small: int, num_larger: int, part: int) -> int:
    """Return the start of a part: bare arithmetic, which kernels compile for themselves.

    >>> [start(2, 2, part) for part in range(5)]
    [0, 3, 6, 8, 10]
    """
    # `part` parts precede it, each of length `small`, the larger ones of one element more.
    return part * small + min(part, num_larger)


def parts(length: int, num_parts: int) -> list[tuple[int, int]]:
    """Return the start and the stop of each part.

    >>> parts(5, 2)
    [(0, 3), (3, 5)]
    """
    return [bounds(length, num_parts, part) for part in range(num_parts)]


def starts(counts: Iterable[int]) -> list[int]:
    """Return the start of each of several consecutive runs, and the stop of the last one.

    >>> starts([2, 1, 3])
    [0, 2, 3, 6]
    """
    return [0, *accumulate(counts)]


def _check(length: int, num_parts: int) -> None:
    if num_parts < 1 or length < 0:
        raise ValueError(f"expected length >= 0 and num_parts >= 1; got {length} and {num_parts}")
