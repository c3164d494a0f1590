"""Base classes of the transforms that have one source."""

from __future__ import annotations

from typing import Any

from dvkernels.data.array_nest import Element
from dvkernels.data.error_policy import Outcome, skipping
from dvkernels.data.node import Indices, Length, Node, add_note

__all__: list[str] = []


class Transform(Node):
    """Base class of the transforms: a node with one source."""

    source: Node

    def __init__(self, source: Node, length: Length) -> None:
        self.source = source
        self.length = length
        self.random_access = source.random_access

    def _value_unless_skipped(self, outcome: Outcome, index: int, epoch: int) -> tuple[Any, ...]:
        """Return (value,) of an outcome, or () if its error is skipped; else raise the error."""
        error = outcome.error
        if error is None:
            return (outcome.value,)
        try:
            add_note(error, self.describe(), self.source, index, epoch)
        except RuntimeError as other:
            error = other
        skips = skipping.get()
        if skips is None:
            raise error
        skips.note(error, self.describe())
        return ()


class SamePositions(Transform):
    """Base class of the transforms whose element n is element n of the source."""

    def element(self, index: int, epoch: int) -> Element:
        return self.source.element(index, epoch)

    def gather(self, indices: Indices, epoch: int) -> Element:
        return self.source.gather(indices, epoch)

    def batch(self, start: int, stop: int, epoch: int) -> Element:
        return self.source.batch(start, stop, epoch)

    def origin(self, index: int, epoch: int) -> int | None:
        return self.source.origin(index, epoch)
