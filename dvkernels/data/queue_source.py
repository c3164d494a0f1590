"""Elements that arrive: a source without an end, or with one that only the producer knows."""

from __future__ import annotations

import functools
import itertools
import math
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

from dvkernels.data.array_nest import owned
from dvkernels.data.checks import check_count
from dvkernels.data.exclusion import MutualExclusion
from dvkernels.data.node import Node, add_note, callable_name
from dvkernels.data.stacking import stack
from dvkernels.errors import DatasetError
from dvkernels.user_errors import shown

__all__ = ["FromQueue"]

# Waiting is cut into pieces of this length, so that Ctrl-C and a closed iterator get through.
_PATIENCE_SECONDS = 0.1

_ONCE = [()]  # arguments of one call

# Python 3.13: the producer has shut the queue down, and it is empty.
_SHUT_DOWN: type[Exception] = getattr(queue, "ShutDown", StopIteration)


class _QueueReader:
    """What has arrived and not been delivered, and who reads it now; one for all iterators."""

    def __init__(self) -> None:
        self.turn = MutualExclusion()
        self.kept: list[list[Any]] = []  # Runs of elements, each of which is delivered together.
        self.arriving: list[Any] = []  # Elements of a batch that is not full yet.
        self.is_over = False
        self.reader: object = None


class FromQueue(Node):
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
        self._feed = _QueueReader()
        # Of an iterator's own chain: the position of the first kept element.
        self._begin = 0
        self._has_begun = False
        self._is_stopped = False

    def describe(self) -> str:
        size = "" if self._size is None else f", batch_size={self._size}"
        wait = "" if self._max_wait is None else f", max_wait_seconds={self._max_wait}"
        return f"from_live({self._name}{size}{wait})"

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Any]:
        feed = self._feed
        if not self._has_begun:  # The iterator that began last is the one that reads.
            self._has_begun = True
            feed.reader = self
        self._is_stopped = False
        for position in itertools.count(self._begin):
            found = feed.turn.take(functools.partial(self._look, position, epoch))
            if not found:
                return
            if position >= start:
                yield found[0] if self._size is None else stack(found, len(found))

    def stop(self) -> None:
        self._is_stopped = True

    def _look(self, position: int, epoch: int) -> list[Any]:
        """Return the run that has arrived, or does now, at a position; empty at the end."""
        self._check_reader()
        place = position - self._begin
        is_here = place < len(self._feed.kept) or self._arrives(position, epoch)
        return self._feed.kept[place] if is_here else []

    def sample(self) -> Iterator[Any]:
        return iter(())  # what is taken to look at it would be lost

    def release(self, epoch: int, position: int) -> list[Any]:
        self._check_reader()
        count = position - self._begin
        if count > 0:
            # Without a call between the two: there an interrupt might strike.
            self._feed.kept, self._begin = self._feed.kept[count:], position
        return []

    def _check_reader(self) -> None:
        if self._is_stopped:
            raise DatasetError(
                "next(iterator): expected an open iterator; this one was closed by another thread "
                "while it waited for an element"
            )
        if self._feed.reader is not self:
            raise DatasetError(
                "from_live: expected one iterator at a time; a newer one has taken over what "
                "arrives; go on with that one, or give each iterator a queue of its own"
            )

    def _arrives(self, position: int, epoch: int) -> bool:
        """Wait until there is one more to deliver; False at the end.

        A batch waits in the feed, so that what has arrived is not lost if the producer raises.
        """
        feed, size = self._feed, self._size or 1
        deadline = math.inf
        while True:
            arriving = feed.arriving
            if arriving and arriving[-1] is self._end:
                feed.is_over, feed.arriving = True, arriving[:-1]
            if feed.is_over or len(arriving) == size:
                break
            if arriving and self._max_wait is not None and deadline == math.inf:
                deadline = time.monotonic() + self._max_wait
            left = deadline - time.monotonic()
            # At the deadline what is there already still comes along.
            get = functools.partial(self._get, timeout=min(max(left, 0.0), _PATIENCE_SECONDS))
            count = len(arriving)
            try:
                # One call, since an interrupt between two would lose what has been taken.
                arriving.extend(itertools.starmap(get, _ONCE))
                feed.is_over = len(arriving) == count  # ``get`` raised StopIteration
                if not feed.is_over and arriving[-1] is not self._end:
                    arriving[-1] = owned(arriving[-1])  # its producer may use the memory again
            except (queue.Empty, TimeoutError):
                if left <= 0:
                    break
                self._check_reader()
            except _SHUT_DOWN:
                feed.is_over = True
            except Exception as error:
                add_note(error, self._name, self, position, epoch)
                raise
        if not feed.arriving:
            return False
        # Without a call, as in release().
        feed.kept, feed.arriving = [*feed.kept, feed.arriving], []
        return True


def check_seconds(value: object) -> None:
    """Raise :class:`DatasetError` unless ``value`` is a time to wait."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:  # type: ignore[operator]
        raise DatasetError(
            f"from_live: expected max_wait_seconds to be a number of at least 0; got {value!r}; "
            "leave it out to wait until a batch is full"
        )
