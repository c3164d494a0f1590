"""A place in an epoch, which moves on only when an element has been delivered."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dvkernels.data.array_nest import owned
from dvkernels.data.error_policy import skipping
from dvkernels.data.exclusion import MutualExclusion
from dvkernels.data.node import Node

__all__ = ["Cursor", "EpochPosition"]


class EpochPosition(NamedTuple):
    """Where a cursor is: what comes next, and what the nodes must remember to make it."""

    epoch: int
    position: int
    memory: Sequence[Any] = ()


class Cursor(Iterator[Any]):
    """Goes through one epoch of a node; (epoch, position) is its whole state.

    Where nodes have to remember (:meth:`Node.own_chain`), ``memory`` is the rest of it.

    When user code raises, the position stays, and the next call tries the same element again.
    Several threads may share a cursor by ``next`` and ``close``; each element goes to one of them.
    """

    def __init__(self, node: Node, epoch: int = 0, position: int = 0) -> None:
        self._shared = node
        self._turn = MutualExclusion()
        # What nodes need while it goes, their workers say; None: nobody has looked yet.
        self._held: list[object] | None = None
        self._pid = 0  # of the process that holds it
        self._keep = _as_it_is if node.owns_elements else owned
        self.move_to(epoch, position)

    @property
    def place(self) -> EpochPosition:
        """Where the cursor is."""
        return EpochPosition(self.epoch, self.position, self.memory)

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

    def stop(self) -> None:
        """End the wait of another thread for an element that may never come."""
        for link in () if self._own is None else self._own.links():
            link.stop()

    def close(self) -> None:
        """Let go of what the nodes hold: streams, workers. Looking again takes them anew."""
        self._turn.end(self._let_go, self.stop)

    def _let_go(self) -> None:
        stream, self._stream, self._held = self._stream, None, None
        end = getattr(stream, "close", None)
        if end is not None:
            end()

    def peek_many(self, count: int) -> list[Any]:
        """Return the next ``count`` elements, fewer at the end; ``StopIteration`` if none."""
        node = self._node
        if self._held is None or (self._held and self._pid != os.getpid()):
            self._hold(node)
        try:
            return self._look(node, count)
        except StopIteration:
            self._let_go()
            raise

    def _look(self, node: Node, count: int) -> list[Any]:
        if node.random_access:
            assert node.length is not None
            if skipping.get() is not None:
                return self._look_past_errors(node, count)
            self._beyond = stop = int(min(self.position + count, node.length))
            if self.position >= stop:
                raise StopIteration
            places, keep = range(self.position, stop), self._keep
            if keep is _as_it_is:
                return [node.element(k, self.epoch) for k in places]
            return [keep(node.element(k, self.epoch)) for k in places]
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

    def _hold(self, node: Node) -> None:
        if self._held:  # in the parent of this fork; so has what it made for this stream
            self._stream, self._pending, self._at_end = None, [], False
        self._pid = os.getpid()
        self._held = [link.hold() for link in node.links() if link.is_held]

    def advance(self) -> None:
        """Move past the elements that were looked at last, and those left out before them."""
        memory = self.memory
        if self._shared.needs_own_chain:
            memory = self._node.release(self.epoch, self._beyond)
        # In one go: an interrupt comes between calls, never within these.
        self.memory, self._pending, self.position = memory, [], self._beyond

    def __next__(self) -> Any:
        return self._turn.take(self.take)

    def take(self) -> Any:
        """Return the next element and move past it; for one thread at a time."""
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
