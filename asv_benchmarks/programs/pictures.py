"""Filter over a stack of pictures: the length of the gradient, by Sobel's operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np

from programs.mapped import GOALS, Work, neighbours, share
from programs.program import Program

__all__ = ["PROGRAM"]


def sobel(picture: Any) -> Any:
    """Filter one picture."""
    columns = picture[:-2] + 2 * picture[1:-1] + picture[2:]
    rows = picture[:, :-2] + 2 * picture[:, 1:-1] + picture[:, 2:]
    x, y = columns[:, 2:] - columns[:, :-2], rows[2:] - rows[:-2]
    return np.sqrt(x * x + y * y)


@numba.njit(parallel=True)
def _in_parallel(pictures):  # type: ignore[no-untyped-def]
    n, height, width = pictures.shape
    filtered = np.empty((n, height - 2, width - 2), pictures.dtype)
    two = np.float32(2)
    for k in numba.prange(n):
        p = pictures[k]
        for i in range(1, height - 1):
            for j in range(1, width - 1):
                right = p[i - 1, j + 1] + two * p[i, j + 1] + p[i + 1, j + 1]
                left = p[i - 1, j - 1] + two * p[i, j - 1] + p[i + 1, j - 1]
                below = p[i + 1, j - 1] + two * p[i + 1, j] + p[i + 1, j + 1]
                above = p[i - 1, j - 1] + two * p[i - 1, j] + p[i - 1, j + 1]
                x, y = right - left, below - above
                filtered[k, i - 1, j - 1] = np.sqrt(x * x + y * y)
    return filtered


def make(pictures: int, pixels: int) -> Work:
    """Draw the pictures, each an item."""
    rng = np.random.default_rng(4)
    stack = rng.random((pictures, pixels, pixels), np.float32)
    return Work(sobel, list(stack), stack)


def prange(work: Work, count: int) -> Iterator[Callable[[], Any]]:
    """Loop over the pixels in compiled code."""
    yield lambda: _in_parallel(work.data)


PROGRAM = Program(
    "pictures",
    "Sobel's filter over {pictures} pictures of {pixels} x {pixels} float32",
    {"pictures": 64, "pixels": 512},
    make,
    neighbours(prange, _in_parallel),
    "picture",
    lambda sizes: sizes["pictures"],
    np.stack,
    1e-5,
    GOALS,
    share,
)
