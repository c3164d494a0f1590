"""Random inputs, and what must come of them by NumPy, a chunk at a time.

A chunk is a function of (seed, replica, number of the chunk), so every process makes what it needs
of any replica's input, and a check needs no second copy of anything. Only NumPy is imported: the
workers of the peers use this file in environments that have nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__: list[str] = []

CHUNK = 1 << 18  # elements

# Floats are small, so that sums in place, again and again, stay finite for long, and yet far from
# the subnormal numbers, which are slow.
#             units in the last place, scale of the inputs, largest power of two
_FLOATS = {
    "float16": (2.0**-10, 2.0**0, 15),
    "bfloat16": (2.0**-7, 2.0**-60, 127),
    "float32": (2.0**-23, 2.0**-60, 127),
    "float64": (2.0**-52, 2.0**-500, 1023),
    "complex64": (2.0**-23, 2.0**-60, 126),
    "complex128": (2.0**-52, 2.0**-500, 1022),
}


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``stop`` of a source belong at ``at`` of one result."""

    result: int
    at: int
    source: int | None  # a replica's input; None is the reduction of all
    start: int
    stop: int


def chunk(
    dtype: np.dtype[Any], op: str, key: Sequence[int], length: int, calm: bool = False
) -> np.ndarray[Any, Any]:
    """Return random elements for ``key``: (seed, replica, number of the chunk).

    Factors of products lie around 1; where they are ``calm`` they are 1 and -1, whose products
    never grow.
    """
    rng = np.random.default_rng(list(key))
    if dtype.kind == "b":
        return rng.integers(0, 2, length).astype(dtype)
    if dtype.kind in "iu":
        if calm and op == "prod":
            return np.ones(length, dtype)
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, length, dtype, endpoint=True)
    if op == "prod":
        signs = rng.integers(0, 2, length) * 2.0 - 1
        return (signs if calm else signs * rng.uniform(0.5, 2, length)).astype(dtype)
    scale = _FLOATS[dtype.name][1]
    if dtype.kind == "c":
        return (rng.uniform(-scale, scale, (length, 2)) @ [1, 1j]).astype(dtype)
    if dtype == np.float32:  # four times as fast as by way of float64
        values = rng.random(length, np.float32)
        values -= np.float32(0.5)
        values *= np.float32(2 * scale)
        return values
    return rng.uniform(-scale, scale, length).astype(dtype)


def fill(
    buffer: np.ndarray[Any, Any], op: str, seed: int, replica: int, calm: bool = False
) -> None:
    """Make ``buffer`` the input of a replica."""
    for number, start in enumerate(range(0, len(buffer), CHUNK)):
        part = buffer[start : start + CHUNK]
        part[:] = chunk(buffer.dtype, op, (seed, replica, number), len(part), calm)


def calls_in_place(dtype: np.dtype[Any], op: str, num_replicas: int) -> int | None:
    """Return how many sums in place in a row stay finite, and not all zero; None: any number."""
    if op != "sum" or num_replicas == 1:
        return None
    if dtype.name in _FLOATS:
        _, scale, exponent = _FLOATS[dtype.name]
        bits = exponent - np.log2(scale)
    else:
        bits = 8.0 * dtype.itemsize
    return max(1, int(bits / np.log2(num_replicas)) - 1)


def num_wrong(
    results: Sequence[np.ndarray[Any, Any]],
    pieces: Iterable[Piece],
    op: str,
    seed: int,
    num_replicas: int,
    length: int,
) -> int:
    """Count the elements of the results that are not what NumPy computes from the inputs."""
    pieces = list(pieces)
    dtype = results[0].dtype
    wrong = 0
    for number, low in enumerate(range(0, length, CHUNK)):
        high = min(low + CHUNK, length)
        parts = [chunk(dtype, op, (seed, r, number), high - low) for r in range(num_replicas)]
        reduces = any(piece.source is None for piece in pieces)
        total, tolerance = _reduction(op, parts) if reduces else (parts[0], None)
        for piece in pieces:
            start, stop = max(low, piece.start), min(high, piece.stop)
            if start >= stop:
                continue
            inside = slice(start - low, stop - low)
            at = piece.at + start - piece.start
            found = results[piece.result][at : at + stop - start]
            if piece.source is not None:
                wrong += int(np.count_nonzero(found != parts[piece.source][inside]))
            elif tolerance is None:
                wrong += int(np.count_nonzero(found != total[inside]))
            else:
                difference = np.abs(found.astype(total.dtype) - total[inside])
                wrong += int(np.count_nonzero(~(difference <= tolerance[inside])))
    return wrong


def _reduction(op: str, parts: Sequence[np.ndarray[Any, Any]]) -> tuple[Any, Any]:
    """Return what NumPy makes of the parts, and how far from it is right; None: no bit.

    With one or two replicas there is one rounding, so one right answer. Beyond that the order of
    the operations may differ, and the bound is (operations) x (unit in the last place) x (the
    same of the absolute values).
    """
    dtype = parts[0].dtype
    if op in ("min", "max"):
        return getattr(np, f"{op}imum").reduce(parts), None
    combine = np.multiply if op == "prod" else np.add
    if dtype.kind in "iub":
        return combine.reduce(parts, dtype=dtype), None
    wide = np.dtype(np.complex128 if dtype.kind == "c" else np.float64)
    total = parts[0].astype(wide)
    magnitude = np.abs(total)
    for part in parts[1:]:
        combine(total, part.astype(wide), out=total)
        combine(magnitude, np.abs(part.astype(wide)), out=magnitude)
    if op == "mean":
        total /= len(parts)
        magnitude /= len(parts)
    if len(parts) <= 2 and not (dtype.kind == "c" and op == "prod"):
        return total.astype(dtype), None
    return total, (len(parts) + 1) * _FLOATS[dtype.name][0] * magnitude
