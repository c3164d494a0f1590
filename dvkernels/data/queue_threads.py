"""Threads that serve a queue until their owner has gone."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from dvkernels.data.exclusion import MutualExclusion
from dvkernels.threads.stoppable_thread import StoppableThread
from dvkernels.threads.thread import Latch

__all__: list[str] = []

T = TypeVar("T")

_IDLE_CHECK_SECONDS = 1.0  # how often an idle thread checks whether its owner still exists


class QueueThreads(Generic[T]):
    """Threads that serve one queue; they end when this object is garbage collected.

    Each calls ``serve(requests, stop)`` with an iterator over its requests, of which None may only
    wake it. ``serve`` must not refer to what refers to this object.
    """

    def __init__(
        self,
        requests: queue.SimpleQueue[T],
        serve: Callable[[Iterator[T], Latch], None],
        count: int,
        name: str,
    ) -> None:
        self._work = functools.partial(_serve, requests, serve, weakref.ref(self))
        self._wake = functools.partial(requests.put, None)  # type: ignore[arg-type]
        self._count = count
        self._name = name
        self._pid = os.getpid()
        self._mutex = MutualExclusion()
        self._threads: list[StoppableThread] = []

    def start(self) -> None:
        """Start the missing threads; ``RuntimeError`` if not a single one runs."""
        if len(self._threads) < self._count:
            self._mutex.run(self._start_missing)

    def _start_missing(self) -> None:
        while len(self._threads) < self._count:
            thread = StoppableThread(self._work, self._name, self._wake)
            try:
                thread.start()
            except RuntimeError:
                if not self._threads:
                    raise
                return  # fewer threads will do
            self._threads.append(thread)

    @property
    def is_here(self) -> bool:
        """Whether this process made the threads, and is not a fork of that process."""
        return self._pid == os.getpid()

    @property
    def is_stopping(self) -> bool:
        """Whether the threads have been stopped."""
        return any(thread.is_stopping for thread in self._threads)

    @property
    def has_ended(self) -> bool:
        """Whether no thread runs any more."""
        return all(thread.has_ended.is_open for thread in self._threads)

    def stop(self) -> None:
        """Signal the threads to stop, without waiting for them."""
        for thread in self._threads:
            thread.stop()

    def wait(self, seconds: float) -> bool:
        """Wait until the threads have ended; return whether each did within so many seconds."""
        return all(thread.wait(seconds) for thread in self._threads)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # an interrupt may have ended __init__ early
            if self.is_here:
                self.stop()


def _serve(
    requests: queue.SimpleQueue[T],
    serve: Callable[[Iterator[T], Latch], None],
    owner: weakref.ref[QueueThreads[T]],
    stop: Latch,
) -> None:
    def taken() -> Iterator[T]:
        while not stop.is_open:
            try:
                request = requests.get(timeout=_IDLE_CHECK_SECONDS)
            except queue.Empty:
                if owner() is None:  # An interrupt has kept it from stopping its threads.
                    return
                continue
            if not stop.is_open:
                yield request
            del request  # keeps no object of the user's alive while waiting

    serve(taken(), stop)
