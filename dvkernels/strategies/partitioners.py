"""Partitioners: how many shards of rows a variable of a parameter-server strategy has.

A partitioner is called with the shape and the dtype of a variable, and returns the number of shards
along each axis, of which only the first may be more than 1: ``[4, 1]``. Any function that does so
will do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np

from dvkernels.errors import ClusterError
from dvkernels.user_errors import brief
from dvkernels.values.scalar_checks import is_integer

__all__ = ["FixedShards", "MaxSize", "MinSize"]

Partitioner = Callable[[Sequence[int], Any], Sequence[int]]


@final
class FixedShards:
    """As many shards as are asked for, or one a row where a variable has fewer rows.

    Parameters
    ----------
    num_shards : int
        At least 1.

    Raises
    ------
    ClusterError
        The number is not positive. So do the other partitioners.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.partitioners.FixedShards(4)([10, 3], "float32")
    [4, 1]
    """

    def __init__(self, num_shards: int) -> None:
        self._num_shards = _positive(num_shards, "num_shards")

    def __call__(self, shape: Sequence[int], dtype: Any) -> list[int]:
        """Return the number of shards along each axis."""
        return _along_rows(shape, self._num_shards)


@final
class MinSize:
    """As many shards as possible, of at least so many bytes each.

    Parameters
    ----------
    nbytes : int
        The least size of a shard [bytes].
    max_shards : int
        The most shards: the number of servers, say.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.partitioners.MinSize(4, max_shards=2)([6, 1], "float32")
    [2, 1]
    """

    def __init__(self, nbytes: int = 256 << 10, max_shards: int = 1) -> None:
        self._nbytes = _positive(nbytes, "nbytes")
        self._max_shards = _positive(max_shards, "max_shards")

    def __call__(self, shape: Sequence[int], dtype: Any) -> list[int]:
        """Return the number of shards along each axis."""
        fitting = _nbytes(shape, dtype) // self._nbytes
        return _along_rows(shape, min(self._max_shards, fitting))


@final
class MaxSize:
    """As few shards as possible, of at most so many bytes each, but of one row at least.

    Parameters
    ----------
    nbytes : int
        The most bytes of a shard.
    max_shards : int, optional
        The most shards, which may then be larger.

    Examples
    --------
    >>> import dvkernels as dv
    >>> dv.partitioners.MaxSize(8)([6, 1], "float32")
    [3, 1]
    """

    def __init__(self, nbytes: int, max_shards: int | None = None) -> None:
        self._nbytes = _positive(nbytes, "nbytes")
        self._max_shards = None if max_shards is None else _positive(max_shards, "max_shards")

    def __call__(self, shape: Sequence[int], dtype: Any) -> list[int]:
        """Return the number of shards along each axis."""
        num_rows = shape[0] if len(shape) else 1
        rows_of_shard = max(1, self._nbytes * num_rows // max(1, _nbytes(shape, dtype)))
        needed = math.ceil(num_rows / rows_of_shard)
        most = needed if self._max_shards is None else self._max_shards
        return _along_rows(shape, min(most, needed))


def deal(
    partitioner: Partitioner | None, shape: tuple[int, ...], dtype: Any, name: str
) -> list[range]:
    """Return the rows of each shard: contiguous blocks, of which the first ones are a row larger.

    A variable without rows, or without a partitioner, is a single shard.
    """
    num_rows = shape[0] if shape else 1
    if partitioner is None or not shape:
        return [range(num_rows)]
    given: Any = partitioner(list(shape), dtype)
    is_list = isinstance(given, (list, tuple)) and len(given) == len(shape)
    if not is_list or not all(is_integer(count) and count > 0 for count in given):
        raise ClusterError(
            f"variable {name!r}: variable_partitioner must return a list of the number of shards "
            f"along each of {len(shape)} axes, such as {[2, *[1] * (len(shape) - 1)]}; got "
            f"{brief(given)}"
        )
    if any(count != 1 for count in given[1:]) or given[0] > max(1, num_rows):
        raise ClusterError(
            f"variable {name!r} of shape {shape}: variable_partitioner must divide its rows only, "
            f"into at most {max(1, num_rows)} shards; got {brief(given)}"
        )
    each, larger = divmod(num_rows, int(given[0]))
    ends = [k * each + min(k, larger) for k in range(int(given[0]) + 1)]
    return [range(first, end) for first, end in itertools.pairwise(ends)]


def _along_rows(shape: Sequence[int], count: int) -> list[int]:
    return [max(1, min(count, shape[0])), *[1] * (len(shape) - 1)] if len(shape) else []


def _nbytes(shape: Sequence[int], dtype: Any) -> int:
    size: int = math.prod(shape) * np.dtype(dtype).itemsize
    return size


def _positive(value: Any, name: str) -> int:
    if not is_integer(value) or value <= 0:
        raise ClusterError(f"{name} must be a positive integer; got {brief(value)}")
    return int(value)
