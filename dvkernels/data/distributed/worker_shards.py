"""Shards: the batches of one worker, by its rows of every global batch or by files of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dvkernels.communicators.worker_share import WorkerShare
from dvkernels.data.array_nest import Element, leading_length, slice_rows
from dvkernels.data.node import Node
from dvkernels.data.stacking import batches
from dvkernels.data.transform import Transform

__all__: list[str] = []


class RowShard(Transform):
    """Node that keeps one worker's rows of every batch.

    The batches and their order are those of the source, so a position means the same on every
    worker and on any number of workers. Where the batched elements have random access, the rows
    of other workers are not computed.
    """

    def __init__(self, source: Node, share: WorkerShare) -> None:
        super().__init__(source, source.length)
        self._share = share

    def describe(self) -> str:
        return f"rows({self._share!r})"

    @property
    def pipeline(self) -> tuple[str, ...]:
        return self.source.pipeline

    def element(self, index: int, epoch: int) -> Element:
        return self.source.select_rows(index, epoch, self._share.rows)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        for batch in self.source.iterate(epoch, start):
            yield slice_rows(batch, *self._share.rows(leading_length(batch)))


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

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        assert self.resume_points is not None
        step, delivered = self.resume_points.resume(epoch, start)
        positions = list(delivered)
        elements = self._elements(epoch, positions)
        for batch in batches(elements, self._size, self._drops_remainder):
            step += 1
            self.resume_points.add(epoch, step, tuple(positions))
            if step > start:
                yield batch

    def _elements(self, epoch: int, positions: list[int]) -> Iterator[Element]:
        """Yield the elements of the lanes from ``positions`` on, and keep these up to date."""
        for index, lane in enumerate(self._lanes):
            for position, element in lane.enumerate_from(epoch, positions[index]):
                positions[index] = position
                yield element
