"""Map iterator: the results of a task farm, for the caller of ``strategy.map``."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from types import TracebackType
from typing import Any, Generic, NoReturn, Self, TypeVar, final

from dvkernels import tracebacks
from dvkernels.errors import ContextError
from dvkernels.replicas.task_farm import Outcome, TaskFarm
from dvkernels.threads import stoppable_thread
from dvkernels.threads.stoppable_thread import StoppableThread

__all__ = ["MapIterator"]

R = TypeVar("R")

_NAME = "dvkernels-replica"
_CHECK_SECONDS = 1.0  # how often a waiting caller checks that its result can still arrive


@final
class MapIterator(Generic[R]):
    """Results of ``strategy.map``, as they are asked for; also a context manager that closes it.

    Several threads may take results from it: each result goes to one of them.
    """

    __slots__ = ("__weakref__", "_farm", "_has_ended", "_last", "_positions", "_threads")

    def __init__(self, farm: TaskFarm) -> None:
        self._farm = farm
        self._positions = itertools.count()
        self._has_ended = False
        self._threads: list[StoppableThread] = []
        self._last: Any = None  # on GPUs: the memory is used again once it has been dropped
        farm.belong_to(self)

    def start(self, num_replicas: int) -> None:
        """Start the threads; RuntimeError if that fails."""
        farm = self._farm
        self._threads = [
            StoppableThread(functools.partial(farm.serve, rank), f"{_NAME}-{rank}-of-map", farm.end)
            for rank in range(int(farm.has_caller), num_replicas)
        ]
        stoppable_thread.start_all(self._threads)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> R:
        farm = self._farm
        if self._has_ended:
            farm.finish()
            raise StopIteration
        if farm.why_closed or farm.pid != os.getpid():
            self._refuse()
        error: BaseException | None = None
        try:
            position = next(self._positions)
            outcome = farm.outcomes.pop(position, None)
            if outcome is None:
                outcome = self._wait(position)
            if outcome is not None:
                result: R
                result, error = outcome
                if error is None:
                    farm.slots.put(None)
                    if farm.streams is not None:
                        farm.streams.exchange()
                        self._last = result
                    return result
                farm.close("an error ended it")
            else:
                farm.finish()
            self._has_ended = True
        except BaseException as interrupt:
            farm.leave_seat()
            farm.close(f"{type(interrupt).__name__} ended it")
            raise
        if error is None:
            raise StopIteration
        try:
            if isinstance(error, StopIteration):  # which would end the caller's loop silently
                raise RuntimeError("a function of map raised StopIteration") from error
            raise error
        except BaseException as raised:
            tracebacks.trim(raised)
            raise
        finally:
            del error, outcome  # their traceback refers to this frame

    def _wait(self, position: int) -> Outcome | None:
        """Wait for an outcome; None if there are no more."""
        farm = self._farm
        while True:
            helped = farm.has_caller and farm.help_out()
            outcome = (
                farm.outcomes.pop(position, None) if helped else farm.wait(position, _CHECK_SECONDS)
            )
            if outcome is not None:
                return outcome
            if farm.is_behind(position):
                outcome = farm.outcomes.pop(position, None)  # that arrived meanwhile
                if outcome is None and farm.failure is not None:
                    raise farm.failure
                return outcome
            if stoppable_thread.is_over:
                raise SystemExit  # ends a thread of the user's silently
            if farm.why_closed or farm.pid != os.getpid():
                self._refuse()
            if self._threads and all(thread.has_ended.is_open for thread in self._threads):
                outcome = farm.outcomes.pop(position, None)
                if outcome is None:
                    raise ContextError("the threads of a map have ended before its last result")
                return outcome

    def _refuse(self) -> NoReturn:
        why = self._farm.why_closed or "it is open in the process that this one was forked from"
        raise ContextError(f"next was called on a map that gives no more results: {why}")

    def close(self) -> None:
        """End the map: no further item is taken, and the results that remain are dropped.

        Returns when the calls that run have returned. Safe to call twice.

        Raises
        ------
        CollectiveTimeoutError
            A function has not returned within ``timeout_seconds`` of the strategy.
        """
        self._farm.close("it was closed")
        self._farm.await_calls("close")

    def __reduce__(self) -> NoReturn:
        raise TypeError("the iterator of a map cannot be copied or pickled; pass on its results")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # an interrupt may have ended __init__ early
            if self._farm.pid == os.getpid():
                self._farm.close("it was dropped")
