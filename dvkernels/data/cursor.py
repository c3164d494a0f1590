"""A place in an epoch, which moves on only when an element has been delivered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dvkernels.data.node import Node

__all__ = ["Cursor", "Place"]


class Place(NamedTuple):
    """Where a cursor is: what comes next, and what the nodes must remember to make it."""

    epoch: int
    position: int
    memory: Sequence[Any] = ()


class Cursor(Iterator[Any]):
    """Goes through one epoch of a node; (epoch, position) is its whole state.

    Where nodes have to remember (:meth:`Node.own_chain`), ``memory`` is the rest of it.

    When user code raises, the position stays, and the next call tries the same element again.
    """

    def __init__(self, node: Node, epoch: int = 0, position: int = 0) -> None:
        self._shared = node
        self.move_to(epoch, position)

    @property
    def place(self) -> Place:
        """Where the cursor is."""
        return Place(self.epoch, self.position, self.memory)

    def move_to(self, epoch: int, position: int, memory: Sequence[Any] = ()) -> None:
        """Go to another place. Nothing is computed until the next element is asked for."""
        self.epoch = epoch
        self.position = position
        self.memory = memory
        self._node = self._shared
        if self._shared.needs_own_chain:
            self._node = self._shared.own_chain()
            if memory:
                self._node.restore(iter(memory))
        self._stream: Iterator[Any] | None = None  # Sequential nodes only, as are the next two.
        self._pending: list[Any] = []
        self._at_end = False

    def peek(self) -> Any:
        """Return the element at the position; ``StopIteration`` at the end."""
        return self.peek_many(1)[0]

    def peek_many(self, count: int) -> list[Any]:
        """Return the next ``count`` elements, fewer at the end; ``StopIteration`` if none."""
        node = self._node
        if node.random_access:
            assert node.length is not None
            stop = int(min(self.position + count, node.length))
            if self.position >= stop:
                raise StopIteration
            return [node.element(k, self.epoch) for k in range(self.position, stop)]
        try:
            while len(self._pending) < count:
                self._pending.append(self._pull())
        except StopIteration:
            if not self._pending:
                raise
        return self._pending[:count]

    def advance(self, count: int = 1) -> None:
        """Move past elements that have been looked at."""
        if self._shared.needs_own_chain:
            self.memory = self._node.release(self.epoch, self.position + count)
        del self._pending[:count]
        self.position += count

    def __next__(self) -> Any:
        element = self.peek()
        self.advance()
        return element

    def _pull(self) -> Any:
        if self._at_end:
            raise StopIteration
        if self._stream is None:
            start = self.position + len(self._pending)
            self._stream = self._node.iterate(self.epoch, start)
        try:
            return next(self._stream)
        except StopIteration:
            self._stream, self._at_end = None, True
            raise
        except BaseException:
            self._stream = None  # A generator that raised is over: the next call replays.
            raise
