"""A place in an epoch, which moves on only when an element has been delivered."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dvkernels.data.nest import owned
from dvkernels.data.node import Node
from dvkernels.data.skips import skipping

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
        self._keep = _as_it_is if node.owns_elements else owned
        self._is_open = False
        self._lease: weakref.finalize[Any, Any] | None = None
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
        self._own: Node | None = None
        self._stream: Iterator[Any] | None = None  # Sequential nodes only, as are the next two.
        self._pending: list[Any] = []
        self._at_end = False
        self._beyond = position  # of what was looked at last

    @property
    def _node(self) -> Node:
        if not self._shared.needs_own_chain:
            return self._shared
        if self._own is None:
            self._own = self._shared.own_chain()
            if self.memory:
                self._own.restore(iter(self.memory))
        return self._own

    def peek(self) -> Any:
        """Return the element at the position; ``StopIteration`` at the end."""
        return self.peek_many(1)[0]

    def close(self) -> None:
        """Let go of what the nodes hold: streams, workers. Looking again takes them anew."""
        if self._stream is not None:
            end = getattr(self._stream, "close", None)
            self._stream = None
            if end is not None:
                end()
        self._is_open = False
        if self._lease is not None:
            self._lease()
            self._lease = None

    def peek_many(self, count: int) -> list[Any]:
        """Return the next ``count`` elements, fewer at the end; ``StopIteration`` if none."""
        node = self._node
        if not self._is_open:
            self._open()
        try:
            return self._look(node, count)
        except StopIteration:
            self.close()
            raise

    def _look(self, node: Node, count: int) -> list[Any]:
        if node.random_access:
            assert node.length is not None
            if skipping.get() is not None:
                return self._look_past_errors(node, count)
            self._beyond = stop = int(min(self.position + count, node.length))
            if self.position >= stop:
                raise StopIteration
            keep = self._keep
            return [keep(node.element(k, self.epoch)) for k in range(self.position, stop)]
        try:
            while len(self._pending) < count:
                self._pending.append(self._pull())
        except StopIteration:
            if not self._pending:
                raise
        found = self._pending[:count]
        self._beyond = self.position + len(found)
        return found

    def _look_past_errors(self, node: Node, count: int) -> list[Any]:
        places = itertools.islice(node.places(self.epoch, self.position), count)
        pairs = [(place, self._keep(element)) for place, element in places]
        if not pairs:
            raise StopIteration
        # What failed behind the last of a full run is the next call's.
        self._beyond = pairs[-1][0] if len(pairs) == count else int(node.length or 0)
        return [element for _, element in pairs]

    def _open(self) -> None:
        held = [link for link in self._node.links() if link.is_held]
        for link in held:
            link.hold()
        if held:
            self._lease = weakref.finalize(self, _let_go, held)
        self._is_open = True

    def advance(self) -> None:
        """Move past the elements that were looked at last, and those left out before them."""
        memory = self.memory
        if self._shared.needs_own_chain:
            memory = self._node.release(self.epoch, self._beyond)
        # In one go: an interrupt comes between calls, never within these.
        self.memory, self._pending, self.position = memory, [], self._beyond

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
            return self._keep(next(self._stream))
        except StopIteration:
            self._stream, self._at_end = None, True
            raise
        except BaseException:
            self._stream = None  # A generator that raised is over: the next call replays.
            raise


def _as_it_is(element: Any) -> Any:
    return element


def _let_go(held: list[Node]) -> None:
    for link in held:
        link.let_go()
