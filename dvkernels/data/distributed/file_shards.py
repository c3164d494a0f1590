"""File shards: the batches of one worker, made of its own part of the files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dvkernels.data.node import Node
from dvkernels.data.stacking import BatchBuilder

__all__ = ["FileShards"]


class FileShards(Node):
    """Batches of ``size`` elements of the file shards ("lanes") that a worker reads, one by one.

    A lane is the file shard of one worker at the start of the epoch: every n-th file, and the
    transforms of its elements. A worker reads one lane, or several if the epoch is resumed on
    fewer workers. The positions in the lanes are the whole state.

    Parameters
    ----------
    lanes : sequence of Node
        Each yields elements, not batches.
    positions : sequence of int
        The number of elements of each lane that have been delivered before.
    size : int
        The number of elements in a batch of this worker.
    drops_remainder : bool
        Drop the last batch if it is shorter.
    """

    random_access = False
    length = None
    is_replayable = False
    has_resume_points = True
    owns_elements = True

    def __init__(
        self,
        lanes: Sequence[Node],
        positions: Sequence[int],
        size: int,
        drops_remainder: bool,
    ) -> None:
        self._lanes = tuple(lanes)
        self.initial_resume_value = tuple(positions)
        self._size = size
        self._drops_remainder = drops_remainder

    @property
    def sources(self) -> tuple[Node, ...]:
        return self._lanes

    def describe(self) -> str:
        return f"lanes({', '.join(map(repr, self._lanes))}).batch({self._size})"

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        assert self.resume_points is not None
        step, delivered = self.resume_points.resume(epoch, start)
        positions = list(delivered)
        batch = BatchBuilder(self._size)
        for index, lane in enumerate(self._lanes):
            for position, element in lane.enumerate_from(epoch, positions[index]):
                positions[index] = position
                batch.add(element)
                if batch.count == self._size:
                    step += 1
                    self.resume_points.add(epoch, step, tuple(positions))
                    if step > start:
                        yield batch.build()
                    batch = BatchBuilder(self._size)
        if batch.count and not self._drops_remainder:
            self.resume_points.add(epoch, step + 1, tuple(positions))
            if step + 1 > start:
                yield batch.build()
