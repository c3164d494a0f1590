"""The rows of one worker, of every global batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from dvkernels.data.nest import leading_length, slice_rows
from dvkernels.data.node import Node
from dvkernels.data.share import Share

__all__ = ["Rows", "WorkerRows"]


class Rows(NamedTuple):
    """Some rows of a batch, and how many the whole batch has."""

    length: int
    rows: Any


class WorkerRows(Node):
    """Of every batch the rows of one worker; its elements are :class:`Rows`.

    The batches and their order are those of the source, so that a position means the same on
    every worker, and on any number of them. Of a batch of elements with random access no other
    rows are computed.
    """

    source: Node

    def __init__(self, source: Node, share: Share) -> None:
        self.source = source
        self.length = source.length
        self.random_access = source.random_access
        self._share = share

    def describe(self) -> str:
        return f"rows({self._share!r})"

    @property
    def pipeline(self) -> tuple[str, ...]:
        return self.source.pipeline

    def element(self, index: int, epoch: int) -> Rows:
        length, rows = self.source.part(index, epoch, self._share.rows)
        return Rows(length, rows)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Rows]:
        if self.random_access:
            yield from super().iterate(epoch, start)
            return
        for batch in self.source.iterate(epoch, start):
            length = leading_length(batch)
            yield Rows(length, slice_rows(batch, *self._share.rows(length)))
