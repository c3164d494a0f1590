"""Batch: runs of elements stacked along a new leading axis."""

from __future__ import annotations

from collections.abc import Iterator

from dvkernels.data.array_nest import Element, slice_rows
from dvkernels.data.checks import check_count, check_flag
from dvkernels.data.error_policy import skipping
from dvkernels.data.node import Node, RowSelector
from dvkernels.data.stacking import batches
from dvkernels.data.transform import Transform

__all__: list[str] = []


class Batch(Transform):
    """Batch: runs of ``size`` elements, stacked along a new leading axis."""

    def __init__(self, source: Node, size: int, drop_remainder: bool) -> None:
        self.size = check_count("batch", "size", size, 1)
        check_flag("batch", "drop_remainder", drop_remainder)
        self.drops_remainder = drop_remainder
        length = source.length
        if isinstance(length, int):
            length = length // self.size if drop_remainder else -(-length // self.size)
        super().__init__(source, length)

    owns_elements = True  # Stacking copies.

    def describe(self) -> str:
        return f"batch({self.size}{', drop_remainder=True' if self.drops_remainder else ''})"

    def element(self, index: int, epoch: int) -> Element:
        return self.source.batch(*self._run(index), epoch)

    def select_rows(self, index: int, epoch: int, select: RowSelector) -> Element:
        if skipping.get() is not None:  # the length of the batch is known only once it is computed
            return super().select_rows(index, epoch, select)
        start, stop = self._run(index)
        first, last = select(stop - start)
        if first == last:
            return slice_rows(self.source.batch(start, start + 1, epoch), 0, 0)
        return self.source.batch(start + first, start + last, epoch)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        elements = self.source.iterate(*self.upstream(epoch, start))
        return batches(elements, self.size, self.drops_remainder)

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        return epoch, position * self.size

    def _run(self, index: int) -> tuple[int, int]:
        start = index * self.size
        stop = start + self.size
        length = self.source.length
        if length is not None and stop > length:
            stop = int(length)
        return start, stop
