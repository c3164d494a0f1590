"""Prefetching: a thread computes elements before they are requested."""

from __future__ import annotations

import collections
import functools
import os
import queue
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dvkernels import deadlines
from dvkernels.data.array_nest import Element, nbytes_of
from dvkernels.data.checks import check_count
from dvkernels.data.cursor import Cursor, DirectCursor, EpochPosition
from dvkernels.data.error_policy import SkippedElements
from dvkernels.data.node import Node, RowSelector
from dvkernels.data.queue_threads import QueueThreads
from dvkernels.data.transform import SamePositions
from dvkernels.errors import DatasetError
from dvkernels.profiler.memory_report import Holding
from dvkernels.threads import stoppable_thread
from dvkernels.threads.thread import Latch
from dvkernels.user_errors import describe

__all__: list[str] = []

_POLL_SECONDS = 0.1
_CLOSE_SECONDS = 5.0


class Prefetch(SamePositions):
    """Prefetch: the same elements, of which iterators keep ``depth`` ready."""

    def __init__(self, source: Node, depth: int) -> None:
        self.depth = check_count("prefetch", "n", depth, 0)
        super().__init__(source, source.length)

    def describe(self) -> str:
        return f"prefetch({self.depth})"

    @property
    def pipeline(self) -> tuple[str, ...]:
        return self.source.pipeline  # prefetching changes no element and no position

    def elements(self, indices: Sequence[int], epoch: int) -> Iterator[Element]:
        return self.source.elements(indices, epoch)

    def select_rows(self, index: int, epoch: int, select: RowSelector) -> Element:
        return self.source.select_rows(index, epoch, select)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        return self.source.iterate(epoch, start)


def prefetch_depth(node: Node, wanted: int | None = None) -> int:
    """Return how many elements iterators prefetch: ``wanted``, or the depth set by the pipeline.

    It is 0 for a live source, whose prefetched elements would be lost when they are dropped.
    """
    if node.why_not_resumable is not None:
        return 0
    if wanted is not None:
        return wanted
    return max((link.depth for link in node.links() if isinstance(link, Prefetch)), default=0)


def open_cursor(
    node: Node,
    epoch_position: EpochPosition,
    wanted: int | None = None,
    count: int = 1,
    skips: SkippedElements | None = None,
) -> Cursor:
    """Return a cursor that keeps the prefetch depth times ``count`` elements ready, or none."""
    depth = prefetch_depth(node, wanted) * count
    if depth:
        return PrefetchingCursor(node, epoch_position, depth, skips)
    return DirectCursor(node, epoch_position, skips)


class _PrefetchedElement(NamedTuple):
    """An element, or the error that was raised instead."""

    element: Element
    error: BaseException | None
    seconds: float  # to compute it
    epoch_position: EpochPosition  # behind it


class PrefetchingCursor(Cursor):
    """Cursor with up to ``depth`` elements ready, which a thread computes.

    The thread ends with the epoch, on an error, by :meth:`close`, and when the cursor is garbage
    collected. Elements that are only ready do not count as delivered.
    """

    fetch_seconds: float

    def __init__(
        self,
        node: Node,
        epoch_position: EpochPosition,
        depth: int,
        skips: SkippedElements | None = None,
    ) -> None:
        self._node, self._depth, self._skips = node, depth, skips
        self._thread: _PrefetchThread | None = None
        self._previous: QueueThreads[None] | None = None
        self.fetch_seconds = 0.0
        super().__init__(epoch_position)

    @property
    def epoch_position(self) -> EpochPosition:
        return self._epoch_position

    def move_to(self, epoch_position: EpochPosition) -> None:
        self.release()
        self._epoch_position = epoch_position

    def take(self, count: int = 1) -> list[Element]:
        thread = self._thread
        if thread is None or (thread.pid != os.getpid() and not thread.at_end):
            self.release()  # In a fork, the thread stayed in the parent.
            self.wait()
            cursor = DirectCursor(self._node, self._epoch_position, self._skips)
            thread = self._thread = _PrefetchThread(cursor, self._depth)
        try:
            while len(thread.taken) < count and not thread.at_end:
                self.fetch_seconds += thread.take_one()
        except BaseException:
            self.release()  # The elements taken before are taken again.
            raise
        if not thread.taken:
            raise StopIteration
        return thread.taken[:]

    def confirm(self) -> None:
        thread = self._thread
        assert thread is not None
        # One statement without a call: an interrupt cannot strike within it.
        self._epoch_position, thread.taken = thread.behind, []

    @property
    def num_ready(self) -> int:
        return 0 if self._thread is None else len(self._thread.sizes)

    def stop(self) -> None:
        thread = self._thread
        if thread is not None:
            thread.threads.stop()

    def release(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._previous = thread.threads
            thread.threads.stop()

    def wait(self) -> None:
        # User code may not support two threads at a time.
        if self._previous is not None:
            self._previous.stop()  # again, in case that an interrupt struck before
            if self._previous.wait(_CLOSE_SECONDS):
                self._previous = None


class _PrefetchThread:
    """Prefetch thread and its queue of ready elements; it ends when this object is collected."""

    def __init__(self, cursor: Cursor, depth: int) -> None:
        # A SimpleQueue stays consistent when an interrupt strikes between two operations.
        self._ready: queue.SimpleQueue[_PrefetchedElement] = queue.SimpleQueue()
        self._free_slots: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(depth):
            self._free_slots.put(None)
        self.sizes: collections.deque[Holding] = collections.deque()  # of elements that are ready
        self.taken: list[Element] = []  # but not confirmed
        self.behind = cursor.epoch_position  # behind the elements taken
        self.at_end = False  # whether the epoch ends there
        self.pid = os.getpid()
        fetch = functools.partial(_fetch, cursor, self._ready, self.sizes)
        self.threads = QueueThreads(self._free_slots, fetch, 1, "dvkernels-data-ahead")
        try:
            self.threads.start()
        except RuntimeError as error:
            raise DatasetError(
                f"prefetch: expected to start a thread; got {describe(error)}; "
                "free threads or memory, or prefetch nothing: InputOptions(prefetch=0)"
            ) from error

    def take_one(self) -> float:
        """Take one more element, if there is one; return the time that was needed to compute it."""
        deadline = 0.0
        while True:
            try:
                fetched = self._ready.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                deadline = deadline or time.monotonic() + deadlines.timeout_seconds()
                self._check(deadline)
        if fetched.error is None:
            self.sizes.popleft()
            self._free_slots.put(None)
            self.taken.append(fetched.element)
            self.behind = fetched.epoch_position
        elif isinstance(fetched.error, StopIteration):
            self.at_end = True
        else:
            raise fetched.error
        return fetched.seconds

    def _check(self, deadline: float) -> None:
        """Raise if no further element can arrive."""
        if self.threads.is_stopping:
            if stoppable_thread.is_over:
                raise SystemExit  # ends a thread of the user's silently
            raise DatasetError(
                "next(iterator): expected an open iterator; this one was closed by another thread "
                "while it waited for an element"
            )
        if self.threads.has_ended and self._ready.empty():
            raise DatasetError("next(iterator): the prefetch thread has ended without an error")
        if time.monotonic() > deadline:
            raise DatasetError(
                f"prefetch: expected an element within {deadlines.timeout_seconds():g} s; the "
                "source or a function of the dataset has not returned; set "
                "DVKERNELS_TIMEOUT_SECONDS if it takes longer"
            )


def _fetch(
    cursor: Cursor,
    ready: queue.SimpleQueue[_PrefetchedElement],
    sizes: collections.deque[Holding],
    slots: Iterator[None],
    stop: Latch,
) -> None:
    """Fill each free slot with the next element, up to the end or an error."""
    try:
        for _ in slots:
            began = time.perf_counter()
            element, error = None, None
            try:
                element = cursor.take()[0]
                cursor.confirm()
                sizes.append(Holding("cpu:0", "prefetch", nbytes_of(element)))
            except BaseException as raised:
                error = raised
            seconds = time.perf_counter() - began
            ready.put(_PrefetchedElement(element, error, seconds, cursor.epoch_position))
            if error is not None:
                return
            del element  # keep no reference while the next one is computed
    finally:
        cursor.release()
