"""Zip of several datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from dvkernels.data.array_nest import Element, owned_copy
from dvkernels.data.error_policy import skipping
from dvkernels.data.node import Indices, Node

__all__: list[str] = []


class Zip(Node):
    """Tuples of the sources' elements at one index; as long as the shortest source."""

    source: Node  # The first source; its links come first in the pipeline.
    owns_elements = True  # It copies, since two sources may reuse the same memory.

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = tuple(nodes)
        self.source = self._nodes[0]
        self.random_access = all(node.random_access for node in nodes)
        known = [node.length for node in nodes if node.length is not None]
        # A source of unknown length may be the shortest, unless another one is empty.
        self.length = min(known) if len(known) == len(nodes) or 0 in known else None

    @property
    def sources(self) -> tuple[Node, ...]:
        return self._nodes

    def describe(self) -> str:
        return f"zip({', '.join(repr(node) for node in self._nodes[1:])})"

    def own_chain(self) -> Self:
        clone = super().own_chain()
        if clone is not self:
            clone._nodes = (clone.source, *(node.own_chain() for node in self._nodes[1:]))
        return clone

    def element(self, index: int, epoch: int) -> Element:
        return tuple(
            node.element(index, epoch)
            if node.owns_elements
            else owned_copy(node.element(index, epoch))
            for node in self._nodes
        )

    # Under on_error="skip" each source would skip its own failing elements, and the rows would no
    # longer match. So a whole tuple is skipped, or the error is raised.

    def gather(self, indices: Indices, epoch: int) -> Element:
        if skipping.get() is not None:
            return super().gather(indices, epoch)
        return tuple(node.gather(indices, epoch) for node in self._nodes)

    def batch(self, start: int, stop: int, epoch: int) -> Element:
        if skipping.get() is not None:
            return super().batch(start, stop, epoch)
        return tuple(node.batch(start, stop, epoch) for node in self._nodes)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        elements = zip(*(_owned_elements(node, epoch, start) for node in self._nodes), strict=False)
        while True:
            token = skipping.set(None)
            try:
                element = next(elements, None)
            finally:
                skipping.reset(token)
            if element is None:
                return
            yield element

    def origin(self, index: int, epoch: int) -> int | None:
        origins = {node.origin(index, epoch) for node in self._nodes}
        return origins.pop() if len(origins) == 1 else None


def _owned_elements(node: Node, epoch: int, start: int) -> Iterator[Element]:
    if node.random_access:
        elements: Iterator[Element] = (node.element(k, epoch) for k in node.positions(start))
    else:
        elements = node.iterate(epoch, start)
    return elements if node.owns_elements else map(owned_copy, elements)
