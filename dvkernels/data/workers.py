"""Threads or processes that apply a function to elements, in order.

They are started when the first iterator needs them and end when the last one lets go.
"""

from __future__ import annotations

import collections
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from typing import Any

from dvkernels.data.outcome import Outcome, outcomes_of
from dvkernels.errors import DatasetError, WorkerLostError

__all__ = ["KINDS", "Workers"]

KINDS = ("threads", "processes")


class Workers:
    """Applies ``fn`` to elements on ``count`` threads or processes."""

    def __init__(self, fn: Callable[[Any], Any], count: int, kind: str) -> None:
        self._fn = fn
        self._count = count
        self._kind = kind
        self._pickled = b""
        if kind == "processes":
            try:
                self._pickled = pickle.dumps(fn)
            except Exception as error:
                raise DatasetError(
                    f"map: expected a function that can be sent to worker processes; got {fn!r}, "
                    f"which cannot be pickled ({error}); define it at the top of a module, or use "
                    f"workers='threads'"
                ) from error
        self._mutex = threading.Lock()
        self._holders = 0
        self._executor: Executor | None = None

    def hold(self) -> None:
        """Say that an iterator may need them."""
        with self._mutex:
            self._holders += 1

    def let_go(self) -> None:
        """Say that it no longer does; the last one ends them."""
        with self._mutex:
            self._holders -= 1
            executor = None if self._holders else self._forget()
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)

    def map(self, elements: Sequence[Any]) -> list[Outcome]:
        """Return the outcome of each element, in their order."""
        size = -(-len(elements) // self._count)
        starts = range(0, len(elements), size)
        under_way = [self._submit(elements[start : start + size]) for start in starts]
        return [outcome for future in under_way for outcome in self._result(future)]

    def map_lazily(self, elements: Iterable[Any]) -> Iterator[Outcome]:
        """Yield the outcome of each element in their order, a few of them ahead."""
        ahead: collections.deque[Future[list[Outcome]]] = collections.deque()
        try:
            for element in elements:
                ahead.append(self._submit([element]))
                if len(ahead) > 2 * self._count:
                    yield self._result(ahead.popleft())[0]
            while ahead:
                yield self._result(ahead.popleft())[0]
        finally:
            for future in ahead:
                future.cancel()

    def _submit(self, elements: Sequence[Any]) -> Future[list[Outcome]]:
        with self._mutex:
            if self._executor is None:
                self._executor = self._start()
            executor = self._executor
        try:
            if self._kind == "processes":
                from dvkernels.data import processes

                return executor.submit(processes.apply, elements)
            return executor.submit(outcomes_of, self._fn, elements)
        except BrokenExecutor as error:
            raise self._lost() from error

    def _result(self, future: Future[list[Outcome]]) -> list[Outcome]:
        try:
            return future.result()
        except BrokenExecutor as error:
            raise self._lost() from error

    def _lost(self) -> WorkerLostError:
        with self._mutex:
            executor = self._forget()
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)
        return WorkerLostError(
            "map: a worker process ended before it answered: was it killed, perhaps for its "
            "memory, or did the function end the process? The next batch starts new ones"
        )

    def _forget(self) -> Executor | None:
        executor, self._executor = self._executor, None
        return executor

    def _start(self) -> Executor:
        if self._kind == "threads":
            return ThreadPoolExecutor(self._count, thread_name_prefix="dvkernels-data-map")
        # Loaded when they are wanted: they need much of the standard library.
        from dvkernels.data import processes

        return processes.start(self._count, self._pickled)
