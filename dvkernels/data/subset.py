"""Subsets of a dataset: take, skip and shard."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from dvkernels.data.array_nest import Element
from dvkernels.data.checks import LARGEST_INDEX, check_count
from dvkernels.data.node import Indices, Length, Node
from dvkernels.data.transform import SamePositions, Transform
from dvkernels.errors import DatasetError

__all__: list[str] = []


class Take(SamePositions):
    """Take: the first ``count`` elements."""

    def __init__(self, source: Node, count: int) -> None:
        self._count = check_count("take", "n", count, 0, "leave take() out to have all elements")
        length: Length = None
        if self._count == 0:
            length = 0
        elif source.length is not None:
            length = int(min(source.length, self._count))
        super().__init__(source, length)

    def describe(self) -> str:
        return f"take({self._count})"

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        wanted = max(0, self._count - start)
        return itertools.islice(self.source.iterate(epoch, start), wanted)


class Strided(Transform):
    """Base class of the transforms that keep element ``first`` and every ``step``-th after it."""

    def __init__(self, source: Node, first: int, step: int) -> None:
        self._first, self._step = first, step
        length = source.length
        if isinstance(length, int):
            length = max(0, -(-(length - first) // step))
        super().__init__(source, length)

    def element(self, index: int, epoch: int) -> Element:
        return self.source.element(index * self._step + self._first, epoch)

    def gather(self, indices: Indices, epoch: int) -> Element:
        length = self.source.length
        # Positions in endless and very long sources need Python's integers.
        if length is None or length > LARGEST_INDEX:
            last = int(indices.max()) * self._step + self._first
            if last > LARGEST_INDEX:
                return super().gather(indices, epoch)
        return self.source.gather(indices * self._step + self._first, epoch)

    def batch(self, start: int, stop: int, epoch: int) -> Element:
        if self._step == 1:
            return self.source.batch(start + self._first, stop + self._first, epoch)
        if stop > LARGEST_INDEX:
            return super().batch(start, stop, epoch)
        return self.gather(np.arange(start, stop, dtype=np.int64), epoch)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        elements = self.source.iterate(*self.upstream(epoch, start))
        return elements if self._step == 1 else itertools.islice(elements, 0, None, self._step)

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        return epoch, position * self._step + self._first

    def origin(self, index: int, epoch: int) -> int | None:
        return self.source.origin(index * self._step + self._first, epoch)


class Skip(Strided):
    """Skip: all but the first ``count`` elements."""

    def __init__(self, source: Node, count: int) -> None:
        count = check_count("skip", "n", count, 0, "use take() to keep only the first ones")
        super().__init__(source, count, 1)

    def describe(self) -> str:
        return f"skip({self._first})"


class Shard(Strided):
    """Shard: elements ``index``, ``index + num``, ``index + 2 * num`` and so on."""

    def __init__(self, source: Node, num: int, index: int) -> None:
        num = check_count("shard", "num", num, 1)
        index = check_count("shard", "index", index, 0)
        if index >= num:
            raise DatasetError(
                f"shard: expected index to be one of 0 to {num - 1} for num={num}; got {index}"
            )
        super().__init__(source, index, num)

    @functools.cached_property
    def interleaving(self) -> tuple[int, int]:
        step, first = self.source.interleaving
        return step * self._step, first + step * self._first

    def describe(self) -> str:
        return f"shard({self._step}, {self._first})"
