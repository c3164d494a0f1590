"""Worker threads of ``map``; each applies the function itself, or through a worker process.

They are started by the first element and end when no iterator holds them.
"""

from __future__ import annotations

import collections
import functools
import itertools
import os
import pickle
import queue
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

from dvkernels import deadlines
from dvkernels.data.array_nest import Element
from dvkernels.data.error_policy import Outcome, owned_outcome_of
from dvkernels.data.node import callable_name
from dvkernels.data.queue_threads import QueueThreads
from dvkernels.errors import DatasetError
from dvkernels.threads.claim import Claim
from dvkernels.threads.thread import Latch
from dvkernels.user_errors import describe

__all__: list[str] = []

KINDS = ("threads", "processes")

_CLAIM_AFTER_SECONDS = 0.05  # after which a waiting caller runs a task that no thread has begun
_GRACE_SECONDS = 5.0  # for a thread to report that its process has missed the deadline

# Yields the outcomes of the elements one by one, until the latch is open.
Apply = Callable[[Sequence[Element], Latch], Iterator[Outcome]]


class _MapTask:
    """Task: elements to which the function is applied by the thread that claims them first.

    The task holds the function, so idle threads refer to nothing that may refer to an iterator.
    """

    __slots__ = ("_apply", "_elements", "claim", "error", "is_done", "outcomes")

    def __init__(self, elements: Sequence[Element], apply: Apply | None) -> None:
        self._elements = elements
        self._apply = apply  # None: the process of a worker thread applies the function
        self.claim = Claim()  # to run the task, or to cancel it
        self.outcomes: list[Outcome] = []
        self.error: BaseException | None = None
        self.is_done = Latch()

    def run(self, process: Apply | None, board: _TaskBoard, stop: Latch) -> None:
        """Run the claimed task; an exception becomes its ``error``."""
        try:
            apply = self._apply or process
            assert apply is not None
            for outcome in apply(self._elements, stop):
                self.outcomes.append(outcome)
                board.last_heartbeat = time.monotonic()
        except BaseException as error:
            self.error = error
        finally:
            self.is_done.open()


class _TaskBoard:
    """Queue of the tasks that wait for a thread, and the time of the latest heartbeat of any."""

    __slots__ = ("last_heartbeat", "tasks")

    def __init__(self) -> None:
        self.tasks: queue.SimpleQueue[_MapTask | None] = queue.SimpleQueue()
        self.last_heartbeat = 0.0


class _WorkerThreads:
    """Worker threads of one map, and their board; they end when this object is collected."""

    def __init__(self, count: int, pickled: bytes, name: str) -> None:
        self.board = _TaskBoard()
        serve = functools.partial(_serve, self.board, pickled, name)
        self.threads = QueueThreads(self.board.tasks, serve, count, "dvkernels-data-map")


def _serve(
    board: _TaskBoard, pickled: bytes, name: str, tasks: Iterator[_MapTask | None], stop: Latch
) -> None:
    process = None
    if pickled:
        # Imported on demand: it loads much of the standard library.
        from dvkernels.data.worker_process import WorkerProcess

        process = WorkerProcess(name, pickled, board)
    try:
        for task in tasks:
            if task is not None and task.claim.take():
                task.run(process, board, stop)
            del task  # keeps no object of the user's alive while waiting
    finally:
        if process is not None:
            process.end()


class MapWorkers:
    """Worker pool of ``map``: applies ``fn`` to elements on ``count`` threads or processes.

    With threads, a caller that waits runs the tasks that no thread has begun. So ``fn`` may use
    the same workers, and the map works even where no thread can be started.
    """

    def __init__(self, fn: Callable[[Element], Element], count: int, kind: str) -> None:
        self._fn = fn
        self._count = count
        self._pickled = _pickled_function(fn) if kind == "processes" else b""
        self._threads_ref: weakref.ref[_WorkerThreads] | None = None

    def hold(self) -> object:
        """Return an object that keeps the worker threads alive while an iterator refers to it."""
        return self._live_threads()

    def _live_threads(self) -> _WorkerThreads:
        threads = None if self._threads_ref is None else self._threads_ref()
        if threads is None or not threads.threads.is_here:
            threads = _WorkerThreads(self._count, self._pickled, callable_name(self._fn))
            self._threads_ref = weakref.ref(threads)
        return threads

    def map(self, elements: Sequence[Element]) -> Iterator[Outcome]:
        """Yield the outcomes of the elements in order; each worker gets a run of the elements."""
        size = -(-len(elements) // self._count)
        runs = (elements[at : at + size] for at in range(0, len(elements), size))
        return itertools.chain.from_iterable(self._map_runs(runs, self._count))

    def map_lazily(self, elements: Iterable[Element]) -> Iterator[Outcome]:
        """Yield the outcomes of the elements in order, computing a few of them ahead."""
        runs = ([element] for element in elements)
        return itertools.chain.from_iterable(self._map_runs(runs, 2 * self._count))

    def _map_runs(
        self, runs: Iterable[Sequence[Element]], num_ahead: int
    ) -> Iterator[list[Outcome]]:
        threads = self._started()
        submitted: collections.deque[_MapTask] = collections.deque()
        try:
            for run in runs:
                submitted.append(self._submit(threads, run))
                if len(submitted) > num_ahead:
                    yield self._result(threads.board, submitted[0])
                    submitted.popleft()
            while submitted:
                yield self._result(threads.board, submitted[0])
                submitted.popleft()
        finally:
            del threads  # else the traceback of an error would keep the threads alive
            for task in submitted:
                task.claim.take()  # cancels the tasks that no thread has begun

    def _started(self) -> _WorkerThreads:
        threads = self._live_threads()
        try:
            threads.threads.start()
        except RuntimeError as error:
            if self._pickled:
                raise DatasetError(
                    f"map: expected to start threads for the worker processes; got "
                    f"{describe(error)}; free threads or memory, or leave num_workers out"
                ) from error
        return threads

    def _submit(self, threads: _WorkerThreads, elements: Sequence[Element]) -> _MapTask:
        task = _MapTask(elements, None if self._pickled else self._outcomes)
        threads.board.tasks.put(task)
        return task

    def _result(self, board: _TaskBoard, task: _MapTask) -> list[Outcome]:
        began = time.monotonic()
        while not task.is_done.wait(_CLAIM_AFTER_SECONDS):
            if not self._pickled and task.claim.take():
                task.run(None, board, Latch())
            else:
                self._check_alive(time.monotonic() - max(began, board.last_heartbeat))
        if task.error is None:
            return task.outcomes
        error, task.error = task.error, None
        try:
            raise error
        finally:
            del error  # breaks the reference cycle of the error and this frame

    def _check_alive(self, quiet_seconds: float) -> None:
        """Raise if no thread has given a heartbeat for too long."""
        timeout = deadlines.timeout_seconds()
        if quiet_seconds > timeout + (_GRACE_SECONDS if self._pickled else 0):
            raise DatasetError(
                f"map: expected {callable_name(self._fn)} to return within {timeout:g} s; it has "
                "not in any thread; set DVKERNELS_TIMEOUT_SECONDS if an element takes longer"
            )

    def _outcomes(self, elements: Sequence[Element], stop: Latch) -> Iterator[Outcome]:
        for element in elements:
            if stop.is_open:
                raise SystemExit  # the program ends: a thread of the user's ends silently
            yield owned_outcome_of(self._fn, element)


def _pickled_function(fn: Callable[[Element], Element]) -> bytes:
    """Pickle ``fn``; raise :class:`DatasetError` unless worker processes can load it."""
    name = callable_name(fn)
    try:
        pickled = pickle.dumps(fn)
    except Exception as error:
        raise DatasetError(
            f"map: expected a function that can be sent to worker processes; got {name}, which "
            f"cannot be pickled ({describe(error)}); define it at the top of a module, or use "
            f"workers='threads'"
        ) from error
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    is_importable = getattr(main, "__spec__", None) or (path and os.path.isfile(path))
    if b"__main__" in pickled and not is_importable:
        raise DatasetError(
            f"map: expected a function that worker processes can import; got {name} of __main__, "
            "which is no file but a notebook, standard input or an interactive session; put the "
            "function into a module and import it, or use workers='threads'"
        )
    return pickled
