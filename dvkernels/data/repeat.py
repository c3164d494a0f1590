"""Repetition of a dataset, each time as another epoch of its source."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from dvkernels.data.array_nest import Element, concatenate, take
from dvkernels.data.checks import LARGEST_INDEX, check_count
from dvkernels.data.node import Indices, Node, RowSelector
from dvkernels.data.transform import Transform

__all__: list[str] = []

# Epochs of the source per epoch of an endless repeat, so that no two repetitions share one.
_ENDLESS_STRIDE = 2**32


class Repeat(Transform):
    """Repeat: ``count`` passes over the source, endlessly many for None.

    Repetition r of epoch e is epoch ``e * count + r`` of the source, so that a shuffle upstream
    reshuffles for each repetition; it is epoch ``e * 2**32 + r`` if the repeat is endless.
    """

    has_resume_points = True
    initial_resume_value = (0, 0)  # The repetition, and the position in it.

    def __init__(self, source: Node, count: int | None) -> None:
        if count is not None:
            count = check_count(
                "repeat", "count", count, 0, "leave it out, or pass None, to repeat without end"
            )
        self.count = count
        self._stride = _ENDLESS_STRIDE if count is None else count
        length = source.length
        if length == 0 or count == 0:
            length = 0
        elif length is not None:
            length = math.inf if count is None or length == math.inf else length * count
        super().__init__(source, length)
        self._period = source.length

    def describe(self) -> str:
        return f"repeat({'' if self.count is None else self.count})"

    def element(self, index: int, epoch: int) -> Element:
        repetition, offset = self._split_index(index)
        return self.source.element(offset, epoch * self._stride + repetition)

    def select_rows(self, index: int, epoch: int, select: RowSelector) -> Element:
        repetition, offset = self._split_index(index)
        return self.source.select_rows(offset, epoch * self._stride + repetition, select)

    def batch(self, start: int, stop: int, epoch: int) -> Element:
        pieces = []
        while start < stop:
            repetition, offset = self._split_index(start)
            end = offset + stop - start
            if self._period is not None and end > self._period:
                end = int(self._period)
            pieces.append(self.source.batch(offset, end, epoch * self._stride + repetition))
            start += end - offset
        return concatenate(pieces)

    def gather(self, indices: Indices, epoch: int) -> Element:
        if self._period is None or self._period == math.inf:
            return self.source.gather(indices, epoch * self._stride)
        if self._period > LARGEST_INDEX:
            return super().gather(indices, epoch)
        repetitions, offsets = np.divmod(indices, np.int64(self._period))
        passes = np.unique(repetitions).tolist()
        if len(passes) == 1:
            return self.source.gather(offsets, epoch * self._stride + passes[0])
        rows = [np.flatnonzero(repetitions == repetition) for repetition in passes]
        pieces = [
            self.source.gather(offsets[where], epoch * self._stride + repetition)
            for where, repetition in zip(rows, passes, strict=True)
        ]
        return take(concatenate(pieces), np.argsort(np.concatenate(rows)))

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        points = self.resume_points
        position, (repetition, offset) = self.resume(epoch, start)
        while self.count is None or repetition < self.count:
            for element in self.source.iterate(epoch * self._stride + repetition, offset):
                position, offset = position + 1, offset + 1
                if points is not None:
                    points.add(epoch, position, [repetition, offset])
                if position > start:
                    yield element
            if offset == 0:  # An empty repetition, as all others are: endless, it would hang.
                return
            repetition, offset = repetition + 1, 0

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        assert self.resume_points is not None
        repetition, offset = self.resume_points.find(epoch, position)[1]
        return epoch * self._stride + repetition, offset

    def origin(self, index: int, epoch: int) -> int | None:
        repetition, offset = self._split_index(index)
        return self.source.origin(offset, epoch * self._stride + repetition)

    def _split_index(self, index: int) -> tuple[int, int]:
        """Return the repetition of an index, and the offset in it."""
        if self._period is None or self._period == math.inf:
            return 0, index
        return divmod(index, int(self._period))
