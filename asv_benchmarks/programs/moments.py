"""Mean and variance of an array in a file, block by block."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np

from programs.mapped import GOALS, Work, neighbours, share
from programs.program import Program

__all__ = ["PROGRAM"]


def make(blocks: int, length: int) -> Work:
    """Write a file of float32 that nobody else sees; an item is the start of a block."""
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, np.float32, "w+", shape=(blocks * length,))
    rng = np.random.default_rng(5)
    for start in range(0, mapped.size, length):
        mapped[start : start + length] = rng.standard_normal(length, np.float32)

    def moments(start: int) -> tuple[float, float]:
        block = np.asarray(mapped[start : start + length], np.float64)
        return block.mean(), block.var()

    return Work(moments, range(0, mapped.size, length), mapped.reshape(blocks, length))


def mean_and_variance(found: Any) -> Any:
    """Combine the moments of blocks of one length."""
    means, variances = np.array(found).T
    return np.array([means.mean(), variances.mean() + means.var()])


@numba.njit(parallel=True, fastmath=True)  # else the sums are not vectorized
def _in_parallel(blocks):  # type: ignore[no-untyped-def]
    found = np.empty((len(blocks), 2))
    for k in numba.prange(len(blocks)):
        mean = 0.0
        for x in blocks[k]:
            mean += x
        mean /= blocks[k].size
        variance = 0.0
        for x in blocks[k]:
            variance += (x - mean) ** 2
        found[k] = mean, variance / blocks[k].size
    return found


def prange(work: Work, count: int) -> Iterator[Callable[[], Any]]:
    """Loop over the numbers in compiled code."""
    yield lambda: _in_parallel(np.asarray(work.data))


PROGRAM = Program(
    "moments",
    "mean and variance of a memory-mapped file, {blocks} blocks of {length} float32",
    {"blocks": 64, "length": 1 << 18},
    make,
    neighbours(prange, _in_parallel),
    "block",
    lambda sizes: sizes["blocks"],
    mean_and_variance,
    1e-9,
    GOALS,
    share,
)
