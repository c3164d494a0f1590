"""Elements that a thread computes before they are asked for."""

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
from dvkernels.data.cursor import Cursor, EpochPosition
from dvkernels.data.error_policy import SkippedElements, skipping
from dvkernels.data.exclusion import MutualExclusion
from dvkernels.data.node import Node
from dvkernels.errors import DatasetError
from dvkernels.profiler import memory_report
from dvkernels.threads import stoppable_thread
from dvkernels.threads.stoppable_thread import StoppableThread
from dvkernels.threads.thread import Latch
from dvkernels.user_errors import in_words

__all__ = ["Prefetcher"]

_LOOK_UP_SECONDS = 0.1
_CLOSE_SECONDS = 5.0


class _PrefetchedElement(NamedTuple):
    """An element, or the error that came instead of it."""

    element: Any
    error: BaseException | None
    seconds: float  # that it took
    place: EpochPosition  # after it


class Prefetcher(Iterator[Any]):
    """Goes through one epoch with up to ``depth`` elements ready; like a cursor, it can resume.

    Nothing that is held counts as delivered. After an error the next call tries the same element
    again. The thread ends with the epoch, on an error, by :meth:`close`, and when this is dropped.
    Several threads may share it; each element goes to one of them.
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
        self._turn = MutualExclusion()
        self._fetcher: _PrefetchThread | None = None
        self._former: StoppableThread | None = None
        self.fetch_seconds = 0.0  # of all elements so far
        self.move_to(epoch, position)

    def move_to(self, epoch: int, position: int, memory: Sequence[Any] = ()) -> None:
        """Go to another place; what was held ready is forgotten."""
        self._let_go()
        self.place = EpochPosition(epoch, position, memory)
        self._at_end = False

    def __next__(self) -> Any:
        return self._turn.take(self.take)

    def take(self) -> Any:
        """Return the next element; for one thread at a time."""
        if self._at_end:  # another thread would replay all of a sequential source to learn it
            raise StopIteration
        if self._fetcher is None:
            self.wait()
            self._fetcher = _PrefetchThread(self._node, self.place, self._depth, self._skips)
        try:
            fetched = self._fetcher.take()
        except _LeftBehindError:
            self._let_go()
            return self.take()
        except BaseException as error:
            self._at_end = isinstance(error, StopIteration)
            self._let_go()
            raise
        self.place = fetched.place
        self.fetch_seconds += fetched.seconds
        return fetched.element

    @property
    def num_held(self) -> int:
        """How many elements are ready."""
        fetcher = self._fetcher
        return 0 if fetcher is None else fetcher.num_held

    def stop(self) -> None:
        """End the thread, and with it the wait of who takes an element now."""
        fetcher = self._fetcher
        if fetcher is not None:
            fetcher.thread.stop()

    def close(self) -> None:
        """End the thread; the next element starts another."""
        self._turn.end(self._let_go, self.stop)
        self.wait()

    def _let_go(self) -> None:
        fetcher, self._fetcher = self._fetcher, None
        if fetcher is not None:
            self._former = fetcher.thread
            fetcher.thread.stop()

    def wait(self) -> None:
        """Wait for a thread that was let go of, since user code may not bear two of them."""
        if self._former is not None and self._former.wait(_CLOSE_SECONDS):
            self._former = None


class _LeftBehindError(Exception):
    """The thread is in the process that this one was forked from."""


class _PrefetchThread:
    """A thread, and the elements that it has computed. The thread ends when this is dropped."""

    def __init__(
        self, node: Node, place: EpochPosition, depth: int, skips: SkippedElements | None
    ) -> None:
        # Simple queues, since an interrupt between two of their operations does no harm.
        self._held: queue.SimpleQueue[_PrefetchedElement] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(depth):
            self._free.put(None)
        self._sizes: collections.deque[int] = collections.deque()
        cursor = Cursor(node)
        cursor.move_to(*place)
        own = weakref.ref(self)
        self.thread = StoppableThread(
            functools.partial(
                _fetch, cursor, self._held, self._free, self._sizes, skips, lambda: own() is None
            ),
            "dvkernels-data-ahead",
            functools.partial(self._free.put, None),
        )
        try:
            self.thread.start()
        except RuntimeError as error:
            raise DatasetError(
                f"prefetch: expected to start a thread; got {in_words(error)}; "
                "free threads or memory, or hold nothing ready: InputOptions(prefetch=0)"
            ) from error
        _living.add(self)

    def take(self) -> _PrefetchedElement:
        """Return the next element; ``StopIteration`` at the end."""
        late = 0.0
        while True:
            try:
                fetched = self._held.get(timeout=_LOOK_UP_SECONDS)
                break
            except queue.Empty:
                late = late or time.monotonic() + deadlines.timeout_seconds()
                self._check(late)
        if fetched.error is not None:
            raise fetched.error
        self._sizes.popleft()
        self._free.put(None)
        return fetched

    def _check(self, late: float) -> None:
        """Raise unless the next element may still come."""
        if not self.thread.is_here:
            raise _LeftBehindError
        if self.thread.is_stopping:
            if stoppable_thread.is_over:
                raise SystemExit  # which ends a thread of the user's without a word
            raise DatasetError(
                "next(iterator): expected an open iterator; this one was closed by another thread "
                "while it waited for an element"
            )
        if self.thread.has_ended.is_open and self._held.empty():
            raise DatasetError("next(iterator): the prefetching thread has ended without a word")
        if time.monotonic() > late:
            raise DatasetError(
                f"prefetch: expected an element within {deadlines.timeout_seconds():g} s; the "
                "source or a function of the dataset has not returned; set "
                "DVKERNELS_TIMEOUT_SECONDS if it takes longer"
            )

    @property
    def num_held(self) -> int:
        """How many elements are ready."""
        return len(self._sizes)

    def nbytes_held(self) -> int:
        """Return the bytes of the arrays that are ready."""
        return sum(self._sizes.copy())


def _fetch(
    cursor: Cursor,
    held: queue.SimpleQueue[_PrefetchedElement],
    free: queue.SimpleQueue[None],
    sizes: collections.deque[int],
    skips: SkippedElements | None,
    is_dropped: Callable[[], bool],
    stop: Latch,
) -> None:
    skipping.set(skips)  # a thread has a context of its own
    try:
        while _is_free(free, stop, is_dropped):
            began = time.perf_counter()
            element, error = None, None
            try:
                element = cursor.take()
            except BaseException as raised:
                error = raised
            sizes.append(nbytes_of(element))
            seconds = time.perf_counter() - began
            held.put(_PrefetchedElement(element, error, seconds, cursor.place))
            if error is not None:
                return
            del element  # hold nothing while the next is computed
    finally:
        cursor.close()


def _is_free(free: queue.SimpleQueue[None], stop: Latch, is_dropped: Callable[[], bool]) -> bool:
    """Wait for room for one more element; False: it is time to end."""
    is_free = False
    while not (is_free or stop.is_open or is_dropped()):
        with contextlib.suppress(queue.Empty):
            free.get(timeout=_LOOK_UP_SECONDS)
            is_free = True
    return is_free and not stop.is_open


_living: weakref.WeakSet[_PrefetchThread] = weakref.WeakSet()


def _account() -> Iterator[tuple[str, str, int]]:
    for fetcher in list(_living):
        yield "cpu:0", "prefetch", fetcher.nbytes_held()


memory_report.register_account(_account)
