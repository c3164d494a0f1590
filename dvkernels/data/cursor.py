"""Cursor over one epoch of a node; it advances only when an element has been delivered."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dvkernels.data.array_nest import owned_copy
from dvkernels.data.error_policy import skipping
from dvkernels.data.exclusion import MutualExclusion
from dvkernels.data.node import Node

__all__ = ["Cursor", "EpochPosition"]


class EpochPosition(NamedTuple):
    """Resume position of an iterator: the next element, and the resume points of the nodes."""

    epoch: int
    position: int
    memory: Sequence[Any] = ()


class Cursor(Iterator[Any]):
    """Iterator over one epoch of a node; its state is (epoch, position).

    Where nodes have resume points (:meth:`Node.own_chain`), ``memory`` holds them and belongs to
    the state.

    When user code raises, the position stays, and the next call tries the same element again.
    Several threads may share a cursor through ``next`` and ``close``; each element goes to one
    thread.
    """

    def __init__(self, node: Node, epoch: int = 0, position: int = 0) -> None:
        self._shared_node = node
        self._mutex = MutualExclusion()
        # Keep the workers of the nodes alive; None before the first element is computed.
        self._workers: list[object] | None = None
        self._pid = 0  # of the process in which the workers run
        self._copy_element = _unchanged if node.owns_elements else owned_copy
        self.move_to(epoch, position)

    @property
    def epoch_position(self) -> EpochPosition:
        """The position from which the cursor can be resumed."""
        return EpochPosition(self.epoch, self.position, self.memory)

    def move_to(self, epoch: int, position: int, memory: Sequence[Any] = ()) -> None:
        """Move to another position. Nothing is computed until the next element is requested."""
        self.epoch = epoch
        self.position = position
        self.memory = memory
        self._own_node: Node | None = None
        self._stream: Iterator[Any] | None = None  # Sequential nodes only, as are the next two.
        self._pending: list[Any] = []
        self._at_end = False
        self._next_position = position  # behind the elements peeked at last

    @property
    def _current_node(self) -> Node:
        if not self._shared_node.needs_own_chain:
            return self._shared_node
        if self._own_node is None:
            self._own_node = self._shared_node.own_chain()
            if self.memory:
                self._own_node.restore(iter(self.memory))
        return self._own_node

    def peek(self) -> Any:
        """Return the element at the position; ``StopIteration`` at the end."""
        return self.peek_many(1)[0]

    def stop(self) -> None:
        """Wake a thread that waits for an element that may never come."""
        for link in () if self._own_node is None else self._own_node.links():
            link.stop()

    def close(self) -> None:
        """Release the streams and workers of the nodes. The next peek acquires them again."""
        self._mutex.close(self._release, self.stop)

    def _release(self) -> None:
        stream, self._stream, self._workers = self._stream, None, None
        end = getattr(stream, "close", None)
        if end is not None:
            end()

    def peek_many(self, count: int) -> list[Any]:
        """Return the next ``count`` elements, fewer at the end; ``StopIteration`` if none."""
        node = self._current_node
        if self._workers is None or (self._workers and self._pid != os.getpid()):
            self._hold_workers(node)
        try:
            return self._peek(node, count)
        except StopIteration:
            self._release()
            raise

    def _peek(self, node: Node, count: int) -> list[Any]:
        if node.random_access:
            assert node.length is not None
            if skipping.get() is not None:
                return self._peek_skipping(node, count)
            self._next_position = stop = int(min(self.position + count, node.length))
            if self.position >= stop:
                raise StopIteration
            indices, copy_element = range(self.position, stop), self._copy_element
            if copy_element is _unchanged:
                return [node.element(k, self.epoch) for k in indices]
            return [copy_element(node.element(k, self.epoch)) for k in indices]
        try:
            while len(self._pending) < count:
                self._pending.append(self._pull())
        except StopIteration:
            if not self._pending:
                raise
        found = self._pending[:count]
        self._next_position = self.position + len(found)
        return found

    def _peek_skipping(self, node: Node, count: int) -> list[Any]:
        found = itertools.islice(node.enumerate_from(self.epoch, self.position), count)
        pairs = [(position, self._copy_element(element)) for position, element in found]
        if not pairs:
            raise StopIteration
        # Failing elements behind a full run are left to the next call.
        self._next_position = pairs[-1][0] if len(pairs) == count else int(node.length or 0)
        return [element for _, element in pairs]

    def _hold_workers(self, node: Node) -> None:
        if self._workers:  # They stayed in the parent of this fork, and the stream needs them.
            self._stream, self._pending, self._at_end = None, [], False
        self._pid = os.getpid()
        self._workers = [link.hold_workers() for link in node.links() if link.has_workers]

    def advance(self) -> None:
        """Move past the elements peeked at last, and the skipped ones before them."""
        memory = self.memory
        if self._shared_node.needs_own_chain:
            memory = self._current_node.release(self.epoch, self._next_position)
        # One statement without a call: an interrupt cannot strike within it.
        self.memory, self._pending, self.position = memory, [], self._next_position

    def __next__(self) -> Any:
        return self._mutex.run(self.take)

    def take(self) -> Any:
        """Return the next element and move past it; one thread at a time may call it."""
        element = self.peek()
        self.advance()
        return element

    def _pull(self) -> Any:
        if self._at_end:
            raise StopIteration
        if self._stream is None:
            start = self.position + len(self._pending)
            self._stream = self._current_node.iterate(self.epoch, start)
        try:
            return self._copy_element(next(self._stream))
        except StopIteration:
            self._stream, self._at_end = None, True
            raise
        except BaseException:
            self._stream = None  # A generator that raised has ended: the next call replays.
            raise


def _unchanged(element: Any) -> Any:
    return element
