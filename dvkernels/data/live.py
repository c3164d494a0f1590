"""Elements that arrive: a source without an end, or with one that only the producer knows."""

from __future__ import annotations

import collections
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from dvkernels.data.checks import check_count, shown
from dvkernels.data.nest import owned
from dvkernels.data.node import Node, add_note, callable_name
from dvkernels.data.stack import stack
from dvkernels.errors import DatasetError

__all__ = ["FromLive"]

# Waiting is cut into pieces of this length, so that Ctrl-C and a closed iterator get through.
_PATIENCE_SECONDS = 0.1

# Python 3.13: the producer has shut the queue down, and it is empty.
_SHUT_DOWN: type[Exception] = getattr(queue, "ShutDown", StopIteration)


class _Feed:
    """What has arrived and not been delivered, and who reads it now; one for all iterators."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: collections.deque[Any] = collections.deque()
        self.arriving: list[Any] = []  # Elements of a batch that is not full yet.
        self.is_over = False
        self.reader: object = None


class FromLive(Node):
    """What a queue, or a callable like its ``get``, gives; each element is given only once."""

    random_access = False
    length = None
    is_replayable = False
    owns_elements = True
    refusal = (
        "what a live source has delivered is gone and cannot be delivered again; keep the "
        "elements yourself (in a file, a log) and read them with from_files to resume"
    )

    def __init__(
        self, source: Any, batch_size: int | None, max_wait_seconds: float | None, end: object
    ) -> None:
        get = getattr(source, "get", source)
        if not callable(get) or isinstance(source, dict | type):
            raise DatasetError(
                "from_live: expected a queue, or a function get(timeout); got "
                f"{shown(source)}, a {type(source).__name__}; pass a queue.Queue that a thread "
                "fills"
            )
        if batch_size is not None:
            batch_size = check_count(
                "from_live", "batch_size", batch_size, 1, "leave it out for single elements"
            )
        if max_wait_seconds is not None:
            if batch_size is None:
                raise DatasetError(
                    f"from_live: expected batch_size with max_wait_seconds={max_wait_seconds!r}; "
                    "got none; single elements do not wait for others"
                )
            check_seconds(max_wait_seconds)
        self._get: Callable[..., Any] = get
        self._name = callable_name(source) if source is get else type(source).__qualname__
        self._size = batch_size
        self._max_wait = max_wait_seconds
        self._end = end
        self._feed = _Feed()
        # Of an iterator's own chain: the position of the first kept element.
        self._begin = 0
        self._has_begun = False

    def describe(self) -> str:
        size = "" if self._size is None else f", batch_size={self._size}"
        wait = "" if self._max_wait is None else f", max_wait_seconds={self._max_wait}"
        return f"from_live({self._name}{size}{wait})"

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        feed = self._feed
        if not self._has_begun:  # The iterator that began last is the one that reads.
            self._has_begun = True
            feed.reader = self
        position = self._begin
        while True:
            with feed.lock:
                self._check_reader()
                is_here = position - self._begin < len(feed.kept)
                if not is_here and not self._arrives(position, epoch):
                    return
                element = feed.kept[position - self._begin]
            if position >= start:
                yield element if self._size is None else stack(element, len(element))
            position += 1

    def sample(self) -> Iterator[Any]:
        return iter(())  # what is taken to look at it would be lost

    def release(self, epoch: int, position: int) -> list[Any]:
        feed = self._feed
        self._check_reader()
        while self._begin < position and feed.kept:
            feed.kept.popleft()
            self._begin += 1
        return []

    def _check_reader(self) -> None:
        if self._feed.reader is not self:
            raise DatasetError(
                "from_live: expected one iterator at a time; a newer one has taken over what "
                "arrives; go on with that one, or give each iterator a queue of its own"
            )

    def _arrives(self, position: int, epoch: int) -> bool:
        """Wait until there is one more to deliver; False at the end.

        A batch waits in the feed, so that what has arrived is not lost if the producer raises.
        """
        feed = self._feed
        deadline = math.inf
        while not feed.is_over:
            if feed.arriving and self._max_wait is not None and deadline == math.inf:
                deadline = time.monotonic() + self._max_wait
            left = deadline - time.monotonic()
            # At the deadline what is there already still comes along.
            try:
                element = self._get(timeout=min(max(left, 0.0), _PATIENCE_SECONDS))
            except (queue.Empty, TimeoutError):
                if left <= 0:
                    break
                self._check_reader()
                continue
            except (StopIteration, _SHUT_DOWN):
                feed.is_over = True
                break
            except Exception as error:
                add_note(error, self._name, self, position, epoch)
                raise
            if element is self._end:
                feed.is_over = True
                break
            feed.arriving.append(owned(element))  # its producer may use the memory again
            if len(feed.arriving) == (self._size or 1):
                break
        if not feed.arriving:
            return False
        feed.kept.append(feed.arriving[0] if self._size is None else feed.arriving)
        feed.arriving = []
        return True


def check_seconds(value: object) -> None:
    """Raise :class:`DatasetError` unless ``value`` is a time to wait."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:  # type: ignore[operator]
        raise DatasetError(
            f"from_live: expected max_wait_seconds to be a number of at least 0; got {value!r}; "
            "leave it out to wait until a batch is full"
        )
