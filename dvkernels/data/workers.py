"""Threads or processes that apply a function to elements, in order.

They are started when the first iterator needs them and end when the last one lets go. Processes are
spawned, never forked: a child forked from a process with OpenMP threads may end or hang.
"""

from __future__ import annotations

import collections
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from dvkernels.errors import DatasetError, WorkerLostError

__all__ = ["KINDS", "Outcome", "Workers", "outcome_of"]

KINDS = ("threads", "processes")


class Outcome(NamedTuple):
    """What the function made of an element: a value, or the error it raised."""

    value: Any
    error: Exception | None


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
                return executor.submit(_apply_installed, elements)
            return executor.submit(_apply, self._fn, elements)
        except BrokenProcessPool as error:
            raise self._lost() from error

    def _result(self, future: Future[list[Outcome]]) -> list[Outcome]:
        try:
            return future.result()
        except BrokenProcessPool as error:
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
        return ProcessPoolExecutor(
            self._count,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_install,
            initargs=(self._pickled,),
        )


_installed: Callable[[Any], Any] | None = None  # in a worker process


def _install(pickled: bytes) -> None:
    global _installed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _installed = pickle.loads(pickled)


def _end_with_parent() -> None:
    """End this process when its parent is gone: a killed one cannot say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _apply_installed(elements: Sequence[Any]) -> list[Outcome]:
    assert _installed is not None
    outcomes = _apply(_installed, elements)
    for place, outcome in enumerate(outcomes):
        if outcome.error is not None and not _travels(outcome.error):
            error = RuntimeError(f"{type(outcome.error).__name__}: {outcome.error}")
            outcomes[place] = Outcome(None, error)
    return outcomes


def _apply(fn: Callable[[Any], Any], elements: Sequence[Any]) -> list[Outcome]:
    return [outcome_of(fn, element) for element in elements]


def outcome_of(fn: Callable[[Any], Any], element: Any) -> Outcome:
    """Return what a function makes of an element."""
    try:
        return Outcome(fn(element), None)
    except Exception as error:
        return Outcome(None, error)


def _travels(error: Exception) -> bool:
    """Return whether an error survives the way between processes: not all do."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True
