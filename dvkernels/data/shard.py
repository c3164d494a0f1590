"""Shard: every n-th element."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from dvkernels.data.checks import LARGEST_INDEX, check_count
from dvkernels.data.node import Indices, Node
from dvkernels.data.transform import Transform
from dvkernels.errors import DatasetError

__all__ = ["Shard"]


class Shard(Transform):
    """Shard: elements ``index``, ``index + num``, ``index + 2 * num`` and so on."""

    def __init__(self, source: Node, num: int, index: int) -> None:
        self._num = check_count("shard", "num", num, 1)
        self._index = check_count("shard", "index", index, 0)
        if self._index >= self._num:
            raise DatasetError(
                f"shard: expected index to be one of 0 to {self._num - 1} for num={self._num}; "
                f"got {self._index}"
            )
        length = source.length
        if isinstance(length, int):
            length = max(0, -(-(length - self._index) // self._num))
        super().__init__(source, length)

    def describe(self) -> str:
        return f"shard({self._num}, {self._index})"

    def element(self, index: int, epoch: int) -> Any:
        return self.source.element(index * self._num + self._index, epoch)

    def gather(self, indices: Indices, epoch: int) -> Any:
        if not self._fits_int64(indices, self._num, self._index):
            return super().gather(indices, epoch)
        return self.source.gather(indices * self._num + self._index, epoch)

    def batch(self, start: int, stop: int, epoch: int) -> Any:
        if stop > LARGEST_INDEX:
            return super().batch(start, stop, epoch)
        return self.gather(np.arange(start, stop, dtype=np.int64), epoch)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        elements = self.source.iterate(*self.upstream(epoch, start))
        return itertools.islice(elements, 0, None, self._num)

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        return epoch, position * self._num + self._index

    def origin(self, index: int, epoch: int) -> int | None:
        return self.source.origin(index * self._num + self._index, epoch)
