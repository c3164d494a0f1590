"""A keyed permutation of [0, n), compiled: what a shuffle does to its positions.

NumPy would take a hundred operations over short arrays for it. The arithmetic, on unsigned 64-bit
integers alone, is described in ``dvkernels/data/shuffle.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dvkernels.kernels import jit

__all__ = ["permute"]


@jit.njit(nogil=True)
def _encrypt(word, base, keys):  # type: ignore[no-untyped-def]
    left = word // base
    right = word - left * base
    for key in keys:
        # Multiply, fold, multiply: each of the top 32 bits depends on all of right + key.
        mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
        mixed = (mixed * np.uint64(0xD6E8FEB86659FD93)) >> np.uint64(32)
        # These 32 bits, scaled to a digit below the base, which is at most 2**31.
        left += (mixed * base) >> np.uint64(32)
        if left >= base:
            left -= base
        left, right = right, left
    return left * base + right


@jit.njit(called_with="(int64[::1], uint64, uint64, uint64[::1], boolean, int64[::1])", nogil=True)
def _permute(positions, length, base, keys, swaps, out):  # type: ignore[no-untyped-def]
    for i in range(positions.size):
        word = np.uint64(positions[i])
        if swaps and word < np.uint64(2):
            word ^= np.uint64(1)
        word = _encrypt(word, base, keys)
        while word >= length:  # cycle walking: encrypt until it falls inside
            word = _encrypt(word, base, keys)
        out[i] = np.int64(word)


def permute(positions: Any, length: int, base: int, keys: Any, swaps: bool) -> Any:
    """Return where each of the int64 ``positions`` goes; ``keys`` is one uint64 a round.

    ``swaps`` exchanges positions 0 and 1 first.
    """
    out = np.empty(positions.shape, np.int64)
    _permute(positions, np.uint64(length), np.uint64(base), keys, swaps, out)
    return out
