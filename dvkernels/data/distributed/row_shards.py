"""Row shards: one worker's rows of every global batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dvkernels.communicators.worker_share import WorkerShare
from dvkernels.data.array_nest import leading_length, slice_rows
from dvkernels.data.node import Node

__all__ = ["RowShard"]


class RowShard(Node):
    """Node that keeps one worker's rows of every batch.

    The batches and their order are those of the source, so a position means the same on every
    worker and on any number of workers. Where the batched elements have random access, the rows
    of other workers are not computed.
    """

    source: Node

    def __init__(self, source: Node, share: WorkerShare) -> None:
        self.source = source
        self.length = source.length
        self.random_access = source.random_access
        self._share = share

    def describe(self) -> str:
        return f"rows({self._share!r})"

    @property
    def pipeline(self) -> tuple[str, ...]:
        return self.source.pipeline

    def element(self, index: int, epoch: int) -> Any:
        return self.source.select_rows(index, epoch, self._share.rows)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        if self.random_access:
            yield from super().iterate(epoch, start)
            return
        for batch in self.source.iterate(epoch, start):
            yield slice_rows(batch, *self._share.rows(leading_length(batch)))
