"""A place in an epoch, which moves on only when an element has been delivered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dvkernels.data.node import Node

__all__ = ["Cursor"]


class Cursor(Iterator[Any]):
    """Goes through one epoch of a node; (epoch, position) is its whole state.

    When user code raises, the position stays, and the next call tries the same element again.
    """

    def __init__(self, node: Node, epoch: int = 0, position: int = 0) -> None:
        self._node = node
        self.move_to(epoch, position)

    def move_to(self, epoch: int, position: int) -> None:
        """Go to another place. Nothing is computed until the next element is asked for."""
        self.epoch = epoch
        self.position = position
        self._stream: Iterator[Any] | None = None  # Sequential nodes only, as are the next two.
        self._pending: list[Any] = []
        self._at_end = False

    def peek(self) -> Any:
        """Return the element at the position; ``StopIteration`` at the end."""
        node = self._node
        if node.random_access:
            if self.position >= node.length:  # type: ignore[operator]
                raise StopIteration
            return node.element(self.position, self.epoch)
        if not self._pending:
            self._pending.append(self._pull())
        return self._pending[0]

    def advance(self) -> None:
        """Move past the element that :meth:`peek` returned."""
        self._pending.clear()
        self.position += 1

    def __next__(self) -> Any:
        element = self.peek()
        self.advance()
        return element

    def _pull(self) -> Any:
        if self._at_end:
            raise StopIteration
        if self._stream is None:
            self._stream = self._node.iterate(self.epoch, self.position)
        try:
            return next(self._stream)
        except StopIteration:
            self._stream, self._at_end = None, True
            raise
        except BaseException:
            self._stream = None  # A generator that raised is over: the next call replays.
            raise
