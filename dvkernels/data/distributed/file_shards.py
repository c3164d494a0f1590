"""Batches out of some of the files, while other workers read the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dvkernels.data.node import Node
from dvkernels.data.stacking import Stack

__all__ = ["FileShards"]


class FileShards(Node):
    """Runs of ``size`` elements of one lane after another, stacked.

    A lane is what one worker read when the epoch began: every n-th file, and what makes
    elements of them. A worker goes through one lane, or, when it has taken over from workers that
    are no more, through several. How far each has come is the whole state.

    Parameters
    ----------
    lanes : sequence of Node
        Each of them gives elements, not batches.
    positions : sequence of int
        How many elements of each have been delivered before.
    size : int
        The elements of a batch of this worker.
    drops_remainder : bool
        Leave out a last batch that is shorter.
    """

    random_access = False
    length = None
    is_replayable = False
    remembers = True
    owns_elements = True

    def __init__(
        self,
        lanes: Sequence[Node],
        positions: Sequence[int],
        size: int,
        drops_remainder: bool,
    ) -> None:
        self._lanes = tuple(lanes)
        self.first_mark = tuple(positions)
        self._size = size
        self._drops_remainder = drops_remainder

    @property
    def sources(self) -> tuple[Node, ...]:
        return self._lanes

    def describe(self) -> str:
        return f"lanes({', '.join(map(repr, self._lanes))}).batch({self._size})"

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        assert self.marks is not None
        step, delivered = self.marks.resume(epoch, start)
        positions = list(delivered)
        run = Stack(self._size)
        for which, lane in enumerate(self._lanes):
            for position, element in lane.places(epoch, positions[which]):
                positions[which] = position
                run.add(element)
                if run.count == self._size:
                    step += 1
                    self.marks.add(epoch, step, tuple(positions))
                    if step > start:
                        yield run.finished()
                    run = Stack(self._size)
        if run.count and not self._drops_remainder:
            self.marks.add(epoch, step + 1, tuple(positions))
            if step + 1 > start:
                yield run.finished()
