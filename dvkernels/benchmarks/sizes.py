"""Sizes in bytes: as text, and as steps from a smallest to a largest."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dvkernels.benchmarks.failures import BenchmarkError

__all__: list[str] = []

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse(text: str) -> int:
    """Return the bytes that ``text`` says.

    >>> parse("4"), parse("64K"), parse("1g")
    (4, 65536, 1073741824)
    """
    found = re.fullmatch(r"(\d+)([KMG]?)", text.strip().upper())
    if found is None or int(found[1]) == 0:
        raise BenchmarkError(f"expected a size such as 4, 64K, 16M or 1G, got {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def steps(text: str, factor: int) -> Iterator[int]:
    """Yield the sizes of ``"min:max"``, each ``factor`` times the one before, or the one size.

    >>> list(steps("4:100", 4))
    [4, 16, 64]
    """
    smallest, _, largest = text.partition(":")
    low = parse(smallest)
    high = parse(largest) if ":" in text else low
    if high < low:
        raise BenchmarkError(f"expected sizes from the smaller to the larger, got {text!r}")
    if factor < 2:
        raise BenchmarkError(f"expected a factor of at least 2, got {factor}")
    while low <= high:
        yield low
        low *= factor


def spell(nbytes: float) -> str:
    """Return a size in the largest unit that leaves a number of at least 1.

    >>> spell(65536), spell(100), spell(3 << 29)
    ('64K', '100', '1.5G')
    """
    unit = max((name for name in _UNITS if _UNITS[name] <= max(nbytes, 1)), key=_UNITS.__getitem__)
    return f"{nbytes / _UNITS[unit]:.4g}{unit}"
