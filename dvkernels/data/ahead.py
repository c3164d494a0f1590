"""Elements that a thread computes before they are asked for."""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dvkernels.data.cursor import Cursor, Place
from dvkernels.data.nest import nbytes_of
from dvkernels.data.node import Node
from dvkernels.data.skips import Skips, skipping
from dvkernels.devices import threads
from dvkernels.profiler import accounts

__all__ = ["Ahead"]

_LOOK_UP_SECONDS = 0.1
_JOIN_SECONDS = 5.0


class _Fetched(NamedTuple):
    """An element, or the error that came instead of it."""

    element: Any
    error: BaseException | None
    seconds: float  # that it took
    place: Place  # after it


class Ahead(Iterator[Any]):
    """Goes through one epoch with up to ``depth`` elements ready; like a cursor, it can resume.

    Nothing that is held counts as delivered. After an error the next call tries the same element
    again. The thread ends with the epoch, on an error, by :meth:`close`, and when this is dropped.
    """

    def __init__(
        self, node: Node, epoch: int, position: int, depth: int, skips: Skips | None = None
    ) -> None:
        self._node, self._depth, self._skips = node, depth, skips
        self._fetcher: _Fetcher | None = None
        self.fetch_seconds = 0.0  # of all elements so far
        self.move_to(epoch, position)

    def move_to(self, epoch: int, position: int, memory: Sequence[Any] = ()) -> None:
        """Go to another place; what was held ready is forgotten."""
        self.close()
        self.place = Place(epoch, position, memory)
        self._at_end = False

    def __next__(self) -> Any:
        if self._at_end:  # another thread would replay all of a sequential source to learn it
            raise StopIteration
        if self._fetcher is None:
            self._fetcher = _Fetcher(self._node, self.place, self._depth, self._skips)
        try:
            fetched = self._fetcher.take()
        except BaseException as error:
            self._at_end = isinstance(error, StopIteration)
            self.close()
            raise
        self.place = fetched.place
        self.fetch_seconds += fetched.seconds
        return fetched.element

    @property
    def num_held(self) -> int:
        """How many elements are ready."""
        return 0 if self._fetcher is None else self._fetcher.num_held

    def close(self) -> None:
        """End the thread; the next element starts another."""
        fetcher, self._fetcher = self._fetcher, None
        if fetcher is not None:
            fetcher.close()


class _Fetcher:
    """A thread, and the elements that it has computed."""

    def __init__(self, node: Node, place: Place, depth: int, skips: Skips | None) -> None:
        # Simple queues, since an interrupt between two of their operations does no harm.
        self._held: queue.SimpleQueue[_Fetched] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(depth):
            self._free.put(None)
        self._sizes: collections.deque[int] = collections.deque()
        self._stop = threading.Event()
        cursor = Cursor(node)
        cursor.move_to(*place)
        self._thread = threading.Thread(
            target=_fetch,
            args=(cursor, self._held, self._free, self._sizes, self._stop, skips),
            name="dvkernels-data-ahead",
            daemon=True,
        )
        weakref.finalize(self, self._stop.set)
        threads.start([self._thread])
        _living.add(self)

    def take(self) -> _Fetched:
        """Return the next element; ``StopIteration`` at the end."""
        fetched = None
        while fetched is None:
            try:
                fetched = self._held.get(timeout=_LOOK_UP_SECONDS)
            except queue.Empty:
                if not self._thread.is_alive() and self._held.empty():
                    raise RuntimeError("the prefetching thread has ended without a word") from None
        if fetched.error is not None:
            raise fetched.error
        self._sizes.popleft()
        self._free.put(None)
        return fetched

    @property
    def num_held(self) -> int:
        """How many elements are ready."""
        return len(self._sizes)

    def nbytes_held(self) -> int:
        """Return the bytes of the arrays that are ready."""
        return sum(self._sizes.copy())

    def close(self) -> None:
        """End the thread; wait for it, unless user code keeps it."""
        self._stop.set()
        self._free.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)


def _fetch(
    cursor: Cursor,
    held: queue.SimpleQueue[_Fetched],
    free: queue.SimpleQueue[None],
    sizes: collections.deque[int],
    stop: threading.Event,
    skips: Skips | None,
) -> None:
    skipping.set(skips)  # a thread has a context of its own
    try:
        while _is_free(free, stop):
            began = time.perf_counter()
            element, error = None, None
            try:
                element = next(cursor)
            except BaseException as raised:
                error = raised
            sizes.append(nbytes_of(element))
            seconds = time.perf_counter() - began
            held.put(_Fetched(element, error, seconds, cursor.place))
            if error is not None:
                return
            del element  # hold nothing while the next is computed
    finally:
        cursor.close()


def _is_free(free: queue.SimpleQueue[None], stop: threading.Event) -> bool:
    """Wait for room for one more element; False: it is time to end."""
    while not stop.is_set():
        with contextlib.suppress(queue.Empty):
            free.get(timeout=_LOOK_UP_SECONDS)
            return not stop.is_set()
    return False


_living: weakref.WeakSet[_Fetcher] = weakref.WeakSet()


def _account() -> Iterator[tuple[str, str, int]]:
    for fetcher in list(_living):
        yield "cpu:0", "prefetch", fetcher.nbytes_held()


accounts.open_account(_account)
