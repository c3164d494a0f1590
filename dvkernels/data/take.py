"""Take: the first elements."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from dvkernels.data.checks import check_count
from dvkernels.data.node import Length, Node
from dvkernels.data.transform import SamePositions

__all__ = ["Take"]


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

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        wanted = max(0, self._count - start)
        return itertools.islice(self.source.iterate(epoch, start), wanted)
