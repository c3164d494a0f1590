"""Keyed permutation of [0, n), compiled: a Feistel network with cycle walking.

It maps the positions of a shuffle; NumPy would take a hundred operations over short arrays. The
network is balanced over two digits to the base ceil(sqrt(n)), as ``dvkernels/data/shuffle.py``
explains: J. Black, P. Rogaway, CT-RSA 2002, LNCS 2271, 114-130, doi:10.1007/3-540-45760-7_9.
Arithmetic is on unsigned 64-bit integers only.
"""

from __future__ import annotations

import numpy as np

from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels import jit

__all__ = ["permute"]


@jit.njit(nogil=True)
def _encrypt(point, base, keys):  # type: ignore[no-untyped-def]
    left = point // base
    right = point - left * base
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
        point = np.uint64(positions[i])
        if swaps and point < np.uint64(2):
            point ^= np.uint64(1)
        point = _encrypt(point, base, keys)
        while point >= length:  # cycle walking: encrypt until it falls inside
            point = _encrypt(point, base, keys)
        out[i] = np.int64(point)


def permute(
    positions: HostArray, length: int, base: int, keys: HostArray, swaps: bool
) -> HostArray:
    """Return the image of each position.

    Parameters
    ----------
    positions : ndarray of int64, shape (m,)
        Each in [0, length).
    length, base : int
        Size of the domain, and ceil(sqrt(length)).
    keys : ndarray of uint64, shape (num_rounds,)
        Round keys.
    swaps : bool
        Whether positions 0 and 1 are exchanged first.
    """
    out = np.empty(positions.shape, np.int64)
    _permute(positions, np.uint64(length), np.uint64(base), keys, swaps, out)
    return out
