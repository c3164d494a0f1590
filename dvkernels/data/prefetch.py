"""Prefetching: a thread computes elements before they are requested."""

from __future__ import annotations

import collections
import contextlib
import functools
import queue
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from dvkernels import deadlines
from dvkernels.data.array_nest import nbytes_of
from dvkernels.data.checks import check_count
from dvkernels.data.cursor import Cursor, EpochPosition
from dvkernels.data.error_policy import SkippedElements, skipping
from dvkernels.data.exclusion import MutualExclusion
from dvkernels.data.node import Node, RowSelector
from dvkernels.data.transform import SamePositions
from dvkernels.errors import DatasetError
from dvkernels.profiler import memory_report
from dvkernels.threads import stoppable_thread
from dvkernels.threads.stoppable_thread import StoppableThread
from dvkernels.threads.thread import Latch
from dvkernels.user_errors import describe

__all__ = ["Prefetch", "Prefetcher", "prefetch_depth"]

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

    def elements(self, indices: Sequence[int], epoch: int) -> Iterator[Any]:
        return self.source.elements(indices, epoch)

    def select_rows(self, index: int, epoch: int, select: RowSelector) -> Any:
        return self.source.select_rows(index, epoch, select)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
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


class _PrefetchedElement(NamedTuple):
    """An element, or the error that was raised instead."""

    element: Any
    error: BaseException | None
    seconds: float  # to compute it
    epoch_position: EpochPosition  # behind it


class Prefetcher(Iterator[Any]):
    """Iterator over one epoch with up to ``depth`` elements ready; it resumes like a cursor.

    Elements that are only ready do not count as delivered. After an error the next call tries the
    same element again. The prefetch thread ends with the epoch, on an error, by :meth:`close`, and
    when this object is garbage collected. Several threads may share it; each element goes to one
    thread.
    """

    def __init__(
        self,
        node: Node,
        epoch: int,
        position: int,
        depth: int,
        skips: SkippedElements | None = None,
    ) -> None:
        self._node, self._depth, self._skips = node, depth, skips
        self._mutex = MutualExclusion()
        self._prefetch_thread: _PrefetchThread | None = None
        self._previous_thread: StoppableThread | None = None
        self.fetch_seconds = 0.0  # of all elements so far
        self.move_to(epoch, position)

    def move_to(self, epoch: int, position: int, memory: Sequence[Any] = ()) -> None:
        """Move to another position; prefetched elements are dropped."""
        self._drop_thread()
        self.epoch_position = EpochPosition(epoch, position, memory)
        self._at_end = False

    def __next__(self) -> Any:
        return self._mutex.run(self.take)

    def take(self) -> Any:
        """Return the next element; one thread at a time may call it."""
        if self._at_end:  # A new prefetch thread would replay a sequential source to find that.
            raise StopIteration
        if self._prefetch_thread is None:
            self.wait()
            self._prefetch_thread = _PrefetchThread(
                self._node, self.epoch_position, self._depth, self._skips
            )
        try:
            fetched = self._prefetch_thread.take()
        except _ForkedError:
            self._drop_thread()
            return self.take()
        except BaseException as error:
            self._at_end = isinstance(error, StopIteration)
            self._drop_thread()
            raise
        self.epoch_position = fetched.epoch_position
        self.fetch_seconds += fetched.seconds
        return fetched.element

    @property
    def num_ready(self) -> int:
        """The number of elements that are ready."""
        prefetch_thread = self._prefetch_thread
        return 0 if prefetch_thread is None else prefetch_thread.num_ready

    def stop(self) -> None:
        """Stop the prefetch thread, which also wakes a thread that waits for an element."""
        prefetch_thread = self._prefetch_thread
        if prefetch_thread is not None:
            prefetch_thread.thread.stop()

    def close(self) -> None:
        """Stop the prefetch thread; the next element starts another."""
        self._mutex.close(self._drop_thread, self.stop)
        self.wait()

    def _drop_thread(self) -> None:
        prefetch_thread, self._prefetch_thread = self._prefetch_thread, None
        if prefetch_thread is not None:
            self._previous_thread = prefetch_thread.thread
            prefetch_thread.thread.stop()

    def wait(self) -> None:
        """Wait for the thread stopped last, since user code may not support two at a time."""
        if self._previous_thread is not None and self._previous_thread.wait(_CLOSE_SECONDS):
            self._previous_thread = None


class _ForkedError(Exception):
    """The prefetch thread runs in the process that this one was forked from."""


class _PrefetchThread:
    """Prefetch thread and its queue of ready elements; it ends when this object is collected."""

    def __init__(
        self, node: Node, epoch_position: EpochPosition, depth: int, skips: SkippedElements | None
    ) -> None:
        # A SimpleQueue stays consistent when an interrupt strikes between two operations.
        self._ready: queue.SimpleQueue[_PrefetchedElement] = queue.SimpleQueue()
        self._free_slots: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(depth):
            self._free_slots.put(None)
        self._sizes: collections.deque[int] = collections.deque()
        cursor = Cursor(node)
        cursor.move_to(*epoch_position)
        own = weakref.ref(self)
        self.thread = StoppableThread(
            functools.partial(
                _fetch,
                cursor,
                self._ready,
                self._free_slots,
                self._sizes,
                skips,
                lambda: own() is None,
            ),
            "dvkernels-data-ahead",
            functools.partial(self._free_slots.put, None),
        )
        try:
            self.thread.start()
        except RuntimeError as error:
            raise DatasetError(
                f"prefetch: expected to start a thread; got {describe(error)}; "
                "free threads or memory, or prefetch nothing: InputOptions(prefetch=0)"
            ) from error
        _live_threads.add(self)

    def take(self) -> _PrefetchedElement:
        """Return the next element; ``StopIteration`` at the end."""
        deadline = 0.0
        while True:
            try:
                fetched = self._ready.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                deadline = deadline or time.monotonic() + deadlines.timeout_seconds()
                self._check(deadline)
        if fetched.error is not None:
            raise fetched.error
        self._sizes.popleft()
        self._free_slots.put(None)
        return fetched

    def _check(self, deadline: float) -> None:
        """Raise if no further element can arrive."""
        if not self.thread.is_here:
            raise _ForkedError
        if self.thread.is_stopping:
            if stoppable_thread.is_over:
                raise SystemExit  # ends a thread of the user's silently
            raise DatasetError(
                "next(iterator): expected an open iterator; this one was closed by another thread "
                "while it waited for an element"
            )
        if self.thread.has_ended.is_open and self._ready.empty():
            raise DatasetError("next(iterator): the prefetch thread has ended without an error")
        if time.monotonic() > deadline:
            raise DatasetError(
                f"prefetch: expected an element within {deadlines.timeout_seconds():g} s; the "
                "source or a function of the dataset has not returned; set "
                "DVKERNELS_TIMEOUT_SECONDS if it takes longer"
            )

    @property
    def num_ready(self) -> int:
        """The number of elements that are ready."""
        return len(self._sizes)

    def nbytes_ready(self) -> int:
        """Return the bytes of the arrays that are ready."""
        return sum(self._sizes.copy())


def _fetch(
    cursor: Cursor,
    ready: queue.SimpleQueue[_PrefetchedElement],
    free_slots: queue.SimpleQueue[None],
    sizes: collections.deque[int],
    skips: SkippedElements | None,
    is_dropped: Callable[[], bool],
    stop: Latch,
) -> None:
    skipping.set(skips)  # Each thread has its own context.
    try:
        while _wait_for_slot(free_slots, stop, is_dropped):
            began = time.perf_counter()
            element, error = None, None
            try:
                element = cursor.take()
            except BaseException as raised:
                error = raised
            sizes.append(nbytes_of(element))
            seconds = time.perf_counter() - began
            ready.put(_PrefetchedElement(element, error, seconds, cursor.epoch_position))
            if error is not None:
                return
            del element  # keep no reference while the next one is computed
    finally:
        cursor.close()


def _wait_for_slot(
    free_slots: queue.SimpleQueue[None], stop: Latch, is_dropped: Callable[[], bool]
) -> bool:
    """Wait for a free slot; False if the thread is to end."""
    has_slot = False
    while not (has_slot or stop.is_open or is_dropped()):
        with contextlib.suppress(queue.Empty):
            free_slots.get(timeout=_POLL_SECONDS)
            has_slot = True
    return has_slot and not stop.is_open


_live_threads: weakref.WeakSet[_PrefetchThread] = weakref.WeakSet()


def _memory_entries() -> Iterator[tuple[str, str, int]]:
    for prefetch_thread in list(_live_threads):
        yield "cpu:0", "prefetch", prefetch_thread.nbytes_ready()


memory_report.register_account(_memory_entries)
