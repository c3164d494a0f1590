"""Cursors over one epoch of a node: each owns the position of an iterator."""

from __future__ import annotations

import abc
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dvkernels.data.array_nest import Element, owned_copy
from dvkernels.data.error_policy import SkippedElements, skipping
from dvkernels.data.exclusion import MutualExclusion
from dvkernels.data.node import Node

__all__: list[str] = []


class EpochPosition(NamedTuple):
    """Resume position of an iterator: the next element, and the resume points of the nodes."""

    epoch: int
    position: int
    memory: Sequence[Any] = ()


class Cursor(Iterator[Element], abc.ABC):
    """Iterator over one epoch of a node, and the owner of its position.

    Elements that are taken count as delivered once they are confirmed, and are taken again
    otherwise. When user code raises, the position stays, and the next call tries the same element
    again. Several threads may share a cursor through ``next`` and ``close``; each element goes to
    one thread.
    """

    fetch_seconds: float | None = None  # to compute the elements, if a thread prefetches them

    def __init__(self, epoch_position: EpochPosition) -> None:
        self._mutex = MutualExclusion()
        self.move_to(epoch_position)

    @property
    @abc.abstractmethod
    def epoch_position(self) -> EpochPosition:
        """The position behind the elements confirmed last."""

    @property
    def num_ready(self) -> int:
        """The number of prefetched elements that are ready."""
        return 0

    @abc.abstractmethod
    def move_to(self, epoch_position: EpochPosition) -> None:
        """Move to another position. Nothing is computed until the next element is requested."""

    @abc.abstractmethod
    def take(self, count: int = 1) -> list[Element]:
        """Return the next ``count`` elements, fewer at the end; ``StopIteration`` if none.

        If more have been taken before, and not confirmed, it may return all of these. One thread
        at a time may call it.
        """

    @abc.abstractmethod
    def confirm(self) -> None:
        """Move past the elements taken last, and the skipped ones before them."""

    @abc.abstractmethod
    def release(self) -> None:
        """Release threads, workers and streams. The next :meth:`take` acquires them again."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Wake a thread that waits for an element that may never come."""

    def wait(self) -> None:
        """Wait until no thread computes elements any more, unless user code blocks it."""

    def close(self) -> None:
        """Release what the cursor holds, once no other thread uses it."""
        self._mutex.close(self.release, self.stop)
        self.wait()

    def __next__(self) -> Element:
        return self._mutex.run(self._next)

    def _next(self) -> Element:
        element = self.take()[0]
        self.confirm()  # last, so that an interrupt before it loses no element
        return element


class DirectCursor(Cursor):
    """Cursor that computes an element when it is taken.

    Parameters
    ----------
    node : Node
        The last node of the pipeline.
    epoch_position : EpochPosition
        Where to begin.
    skips : SkippedElements or None
        Records failing elements; None to raise their errors.
    """

    def __init__(
        self, node: Node, epoch_position: EpochPosition, skips: SkippedElements | None = None
    ) -> None:
        self._shared_node = node
        self._skips = skips
        # Keep the workers of the nodes alive; None before the first element is computed.
        self._workers: list[object] | None = None
        self._pid = 0  # of the process in which the workers run
        self._copy_element = _unchanged if node.owns_elements else owned_copy
        super().__init__(epoch_position)

    @property
    def epoch_position(self) -> EpochPosition:
        return EpochPosition(self._epoch, self._position, self._memory)

    def move_to(self, epoch_position: EpochPosition) -> None:
        self._epoch, self._position, self._memory = epoch_position
        # Of this iterator alone, where nodes have resume points; made for the first element.
        self._own_node: Node | None = None
        self._stream: Iterator[Element] | None = None  # Sequential nodes only, as the next two.
        self._pending: list[Element] = []
        self._at_end = False
        self._next_position = self._position  # behind the elements taken last

    def take(self, count: int = 1) -> list[Element]:
        if self._skips is not None and skipping.get() is not self._skips:
            return self._take_skipping(count)
        if self._workers is None or (self._workers and self._pid != os.getpid()):
            self._hold_workers()
        try:
            if not self._shared_node.random_access:
                return self._pull_elements(count)
            if skipping.get() is not None:
                return self._attempted_elements(count)
            return self._elements(count)
        except StopIteration:
            self.release()
            raise

    def confirm(self) -> None:
        memory = self._memory
        if self._own_node is not None:
            memory = self._own_node.release(self._epoch, self._next_position)
        # One statement without a call: an interrupt cannot strike within it.
        self._memory, self._pending, self._position = memory, [], self._next_position

    def release(self) -> None:
        stream, self._stream, self._workers = self._stream, None, None
        end = getattr(stream, "close", None)
        if end is not None:
            end()

    def stop(self) -> None:
        for link in () if self._own_node is None else self._own_node.links():
            link.stop()

    def _hold_workers(self) -> None:
        if self._workers:  # They stayed in the parent of this fork, and the stream needs them.
            self._stream, self._pending, self._at_end = None, [], False
        self._pid = os.getpid()
        held = (link.hold_workers() for link in self._shared_node.links())
        self._workers = [workers for workers in held if workers is not None]

    def _take_skipping(self, count: int) -> list[Element]:
        before = skipping.get()
        try:
            skipping.set(self._skips)
            return self.take(count)
        finally:
            skipping.set(before)

    def _elements(self, count: int) -> list[Element]:
        node, epoch, copy_element = self._shared_node, self._epoch, self._copy_element
        assert node.length is not None
        self._next_position = stop = int(min(self._position + count, node.length))
        if self._position >= stop:
            raise StopIteration
        indices = range(self._position, stop)
        if copy_element is _unchanged:
            return [node.element(k, epoch) for k in indices]
        return [copy_element(node.element(k, epoch)) for k in indices]

    def _attempted_elements(self, count: int) -> list[Element]:
        node = self._shared_node
        found = itertools.islice(node.enumerate_from(self._epoch, self._position), count)
        pairs = [(position, self._copy_element(element)) for position, element in found]
        if not pairs:
            raise StopIteration
        # Failing elements behind a full run are left to the next call.
        self._next_position = pairs[-1][0] if len(pairs) == count else int(node.length or 0)
        return [element for _, element in pairs]

    def _pull_elements(self, count: int) -> list[Element]:
        try:
            while len(self._pending) < count:
                self._pending.append(self._pull())
        except StopIteration:
            if not self._pending:
                raise
        self._next_position = self._position + len(self._pending)
        return self._pending[:]

    def _pull(self) -> Element:
        if self._at_end:
            raise StopIteration
        if self._stream is None:
            start = self._position + len(self._pending)
            self._stream = self._sequential_node().iterate(self._epoch, start)
        try:
            return self._copy_element(next(self._stream))
        except StopIteration:
            self._stream, self._at_end = None, True
            raise
        except BaseException:
            self._stream = None  # A generator that raised has ended: the next call replays.
            raise

    def _sequential_node(self) -> Node:
        if not self._shared_node.needs_own_chain:
            return self._shared_node
        if self._own_node is None:
            own_node = self._shared_node.own_chain()
            if self._memory:
                own_node.restore(iter(self._memory))
            self._own_node = own_node  # last, so that an interrupt leaves none that is not restored
        return self._own_node


def _unchanged(element: Element) -> Element:
    return element
