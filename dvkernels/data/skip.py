"""Skip: all but the first elements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dvkernels.data.checks import check_count
from dvkernels.data.node import Indices, Node
from dvkernels.data.transform import Transform

__all__ = ["Skip"]


class Skip(Transform):
    """Skip: all but the first ``count`` elements."""

    def __init__(self, source: Node, count: int) -> None:
        self._count = check_count("skip", "n", count, 0, "use take() to keep only the first ones")
        length = source.length
        if isinstance(length, int):
            length = max(0, length - self._count)
        super().__init__(source, length)

    def describe(self) -> str:
        return f"skip({self._count})"

    def element(self, index: int, epoch: int) -> Any:
        return self.source.element(index + self._count, epoch)

    def gather(self, indices: Indices, epoch: int) -> Any:
        if not self._fits_int64(indices, 1, self._count):
            return super().gather(indices, epoch)
        return self.source.gather(indices + self._count, epoch)

    def batch(self, start: int, stop: int, epoch: int) -> Any:
        return self.source.batch(start + self._count, stop + self._count, epoch)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        return self.source.iterate(*self.upstream(epoch, start))

    def upstream(self, epoch: int, position: int) -> tuple[int, int]:
        return epoch, position + self._count

    def origin(self, index: int, epoch: int) -> int | None:
        return self.source.origin(index + self._count, epoch)
