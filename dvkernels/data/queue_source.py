"""Live source: elements that arrive in a queue until the producer says that they end."""

from __future__ import annotations

import functools
import itertools
import math
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

from dvkernels.data.array_nest import Element, owned_copy
from dvkernels.data.checks import check_count, unexpected
from dvkernels.data.exclusion import MutualExclusion
from dvkernels.data.node import Node, add_note, callable_name
from dvkernels.data.stacking import stack
from dvkernels.errors import DatasetError

__all__: list[str] = []

# The longest wait at a time, so that Ctrl-C and the closing of the iterator are noticed.
_POLL_SECONDS = 0.1

_ONE_CALL = [()]  # the arguments of one call, for itertools.starmap

# Python 3.13: the producer has shut the queue down, and it is empty.
_SHUT_DOWN: type[Exception] = getattr(queue, "ShutDown", StopIteration)


class _Arrivals:
    """Buffer of the elements that have arrived but not been delivered; shared by all iterators."""

    def __init__(self) -> None:
        self.mutex = MutualExclusion()
        self.undelivered: list[list[Any]] = []  # Runs of elements: one run makes one batch.
        self.incomplete: list[Any] = []  # The elements of a batch that is not full yet.
        self.is_over = False
        self.reader: object = None  # The chain of the one iterator that may read.


class FromQueue(Node):
    """Source of the elements of a queue, or of a callable like its ``get``, each delivered once."""

    random_access = False
    length = None
    is_replayable = False
    owns_elements = True
    refusal = (
        "elements that a live source has delivered cannot be delivered again; keep the "
        "elements yourself (in a file, a log) and read them with from_files to resume"
    )

    def __init__(
        self, source: Any, batch_size: int | None, max_wait_seconds: float | None, end: object
    ) -> None:
        get = getattr(source, "get", source)
        if not callable(get) or isinstance(source, dict | type):
            remedy = "pass a queue.Queue that a thread fills"
            raise unexpected("from_live", "a queue, or a function get(timeout)", source, remedy)
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
        self._arrivals = _Arrivals()
        # In the own chain of an iterator: the position of the first undelivered run.
        self._first_position = 0
        self._has_begun = False
        self._is_stopped = False

    def describe(self) -> str:
        size = "" if self._size is None else f", batch_size={self._size}"
        wait = "" if self._max_wait is None else f", max_wait_seconds={self._max_wait}"
        return f"from_live({self._name}{size}{wait})"

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Element]:
        arrivals = self._arrivals
        if not self._has_begun:  # The iterator begun last becomes the reader.
            self._has_begun = True
            arrivals.reader = self
        self._is_stopped = False
        for position in itertools.count(self._first_position):
            run = arrivals.mutex.run(functools.partial(self._run_at, position, epoch))
            if not run:
                return
            if position >= start:
                yield run[0] if self._size is None else stack(run, len(run))

    def stop(self) -> None:
        self._is_stopped = True

    def _run_at(self, position: int, epoch: int) -> list[Any]:
        """Return the run at a position, waiting for it to arrive; an empty list at the end."""
        self._check_reader()
        offset = position - self._first_position
        has_run = offset < len(self._arrivals.undelivered) or self._wait_for_run(position, epoch)
        return self._arrivals.undelivered[offset] if has_run else []

    def sample(self) -> Iterator[Any]:
        return iter(())  # an element taken for a sample would be lost

    def release(self, epoch: int, position: int) -> list[Any]:
        self._check_reader()
        count = position - self._first_position
        if count > 0:
            # One statement without a call in between, where an interrupt might strike.
            self._arrivals.undelivered, self._first_position = (
                self._arrivals.undelivered[count:],
                position,
            )
        return []

    def _check_reader(self) -> None:
        if self._is_stopped:
            raise DatasetError(
                "next(iterator): expected an open iterator; this one was closed by another thread "
                "while it waited for an element"
            )
        if self._arrivals.reader is not self:
            raise DatasetError(
                "from_live: expected one iterator at a time; a newer one has taken over the "
                "source; go on with that one, or give each iterator a queue of its own"
            )

    def _wait_for_run(self, position: int, epoch: int) -> bool:
        """Wait until one more run can be delivered; False at the end.

        An incomplete batch stays in the buffer, so that its elements are not lost if the producer
        raises.
        """
        arrivals, size = self._arrivals, self._size or 1
        deadline = math.inf
        while True:
            incomplete = arrivals.incomplete
            if incomplete and incomplete[-1] is self._end:
                arrivals.is_over, arrivals.incomplete = True, incomplete[:-1]
            if arrivals.is_over or len(incomplete) == size:
                break
            if incomplete and self._max_wait is not None and deadline == math.inf:
                deadline = time.monotonic() + self._max_wait
            left = deadline - time.monotonic()
            # After the deadline, elements that have arrived already are still taken.
            get = functools.partial(self._get, timeout=min(max(left, 0.0), _POLL_SECONDS))
            count = len(incomplete)
            try:
                # One call: an interrupt between two would lose the element that was taken.
                incomplete.extend(itertools.starmap(get, _ONE_CALL))
                arrivals.is_over = len(incomplete) == count  # ``get`` raised StopIteration
                if not arrivals.is_over and incomplete[-1] is not self._end:
                    incomplete[-1] = owned_copy(incomplete[-1])  # its producer may reuse the memory
            except (queue.Empty, TimeoutError):
                if left <= 0:
                    break
                self._check_reader()
            except _SHUT_DOWN:
                arrivals.is_over = True
            except Exception as error:
                add_note(error, self._name, self, position, epoch)
                raise
        if not arrivals.incomplete:
            return False
        # Without a call between the two, as in release().
        arrivals.undelivered, arrivals.incomplete = [*arrivals.undelivered, arrivals.incomplete], []
        return True


def check_seconds(value: object) -> None:
    """Raise :class:`DatasetError` unless ``value`` is a finite number of seconds, at least 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:  # type: ignore[operator]
        raise DatasetError(
            f"from_live: expected max_wait_seconds to be a number of at least 0; got {value!r}; "
            "leave it out to wait until a batch is full"
        )
