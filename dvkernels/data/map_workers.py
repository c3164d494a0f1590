"""Threads that apply a function to elements, in order, each by itself or through a process.

They are started when the first element needs them, and end when no iterator holds them.
"""

from __future__ import annotations

import collections
import functools
import os
import pickle
import queue
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from dvkernels import deadlines
from dvkernels.data.exclusion import MutualExclusion
from dvkernels.data.node import callable_name
from dvkernels.data.outcome import Outcome, owned_outcome_of
from dvkernels.errors import DatasetError
from dvkernels.threads.stoppable_thread import StoppableThread
from dvkernels.threads.thread import Latch
from dvkernels.user_errors import in_words

__all__ = ["KINDS", "MapWorkers", "check_sendable"]

KINDS = ("threads", "processes")

_LOOK_UP_SECONDS = 1.0  # how often an idle thread asks whether anybody still holds it
_NAP_SECONDS = 0.05  # after which who waits for a thread does the work that none has begun
_END_SECONDS = 5.0  # that a thread has for its own end of a deadline

# Yields the outcomes of elements one by one, until the latch is open.
Apply = Callable[[Sequence[Any], Latch], Iterator[Outcome]]


class _MapTask:
    """Elements to which the function is to be applied, by whoever claims them first.

    It brings the function along: idle threads hold nothing that may refer to an iterator.
    """

    __slots__ = ("_apply", "_claims", "_elements", "error", "is_done", "outcomes")

    def __init__(self, elements: Sequence[Any], apply: Apply | None) -> None:
        self._elements = elements
        self._apply = apply  # None: only the process of a thread can do it
        self._claims = [None]
        self.outcomes: list[Outcome] = []
        self.error: BaseException | None = None
        self.is_done = Latch()

    def claim(self) -> bool:
        """Return True to the first who asks."""
        try:
            self._claims.pop()
        except IndexError:
            return False
        return True

    def run(self, process: Apply | None, board: _Board, stop: Latch) -> None:
        """Do what was claimed; whatever it raises is the answer."""
        try:
            apply = self._apply or process
            assert apply is not None
            for outcome in apply(self._elements, stop):
                self.outcomes.append(outcome)
                board.heard_at = time.monotonic()
        except BaseException as error:
            self.error = error
        finally:
            self.is_done.open()


class _Board:
    """Jobs that wait for a thread, and when any of the threads has given a sign of life."""

    __slots__ = ("heard_at", "jobs")

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_MapTask | None] = queue.SimpleQueue()
        self.heard_at = 0.0


class _Team:
    """The threads; they end when it is dropped."""

    def __init__(self, count: int, pickled: bytes, name: str) -> None:
        self.board = _Board()
        self.pid = os.getpid()
        self._count = count
        self._pickled = pickled  # the function, if processes apply it
        self._name = name
        self._threads: list[StoppableThread] = []
        self._turn = MutualExclusion()

    def start(self) -> None:
        """Start the threads that are missing; an error if there is none at all."""
        if len(self._threads) < self._count:
            self._turn.take(self._hire)

    def _hire(self) -> None:
        own = weakref.ref(self)
        while len(self._threads) < self._count:
            thread = StoppableThread(
                functools.partial(
                    _serve, self.board, self._pickled, self._name, lambda: own() is None
                ),
                "dvkernels-data-map",
                functools.partial(self.board.jobs.put, None),
            )
            try:
                thread.start()
            except RuntimeError:
                if not self._threads:
                    raise
                return  # fewer do as well
            self._threads.append(thread)

    def __del__(self) -> None:
        if self.pid == os.getpid():
            for thread in self._threads:
                thread.stop()


def _serve(
    board: _Board, pickled: bytes, name: str, is_dropped: Callable[[], bool], stop: Latch
) -> None:
    process = None
    if pickled:
        # Loaded when they are wanted: they need much of the standard library.
        from dvkernels.data.worker_process import WorkerProcess

        process = WorkerProcess(name, pickled, board)
    try:
        while not stop.is_open:
            try:
                job = board.jobs.get(timeout=_LOOK_UP_SECONDS)
            except queue.Empty:
                if is_dropped():
                    return
                continue
            if job is not None and job.claim():
                job.run(process, board, stop)
            del job  # keep nothing of the user's alive while waiting
    finally:
        if process is not None:
            process.end()


class MapWorkers:
    """Applies ``fn`` to elements on ``count`` threads or processes.

    A thread that waits for others does itself what none of them has begun, unless it takes a
    process: so ``fn`` may use the same workers, and there may be no thread to be had.
    """

    def __init__(self, fn: Callable[[Any], Any], count: int, kind: str) -> None:
        self._fn = fn
        self._count = count
        self._pickled = pickle.dumps(fn) if kind == "processes" else b""
        self._team: weakref.ref[_Team] | None = None

    def hold(self) -> object:
        """Return what keeps them; an iterator holds it while it goes."""
        return self._held()

    def _held(self) -> _Team:
        team = None if self._team is None else self._team()
        if team is None or team.pid != os.getpid():
            team = _Team(self._count, self._pickled, callable_name(self._fn))
            self._team = weakref.ref(team)
        return team

    def map(self, elements: Sequence[Any]) -> list[Outcome]:
        """Return the outcome of each element, in their order."""
        team = self._started()
        size = -(-len(elements) // self._count)
        starts = range(0, len(elements), size)
        jobs = [self._submit(team, elements[start : start + size]) for start in starts]
        try:
            return [outcome for job in jobs for outcome in self._result(team.board, job)]
        finally:
            del team  # else an error's traceback would keep the threads
            for job in jobs:
                job.claim()  # what nobody has begun is not wanted any more

    def map_lazily(self, elements: Iterable[Any]) -> Iterator[Outcome]:
        """Yield the outcome of each element in their order, a few of them ahead."""
        team = self._started()
        ahead: collections.deque[_MapTask] = collections.deque()
        try:
            for element in elements:
                ahead.append(self._submit(team, [element]))
                if len(ahead) > 2 * self._count:
                    yield self._result(team.board, ahead[0])[0]
                    ahead.popleft()
            while ahead:
                yield self._result(team.board, ahead[0])[0]
                ahead.popleft()
        finally:
            del team
            for job in ahead:
                job.claim()

    def _started(self) -> _Team:
        team = self._held()
        try:
            team.start()
        except RuntimeError as error:
            if self._pickled:
                raise DatasetError(
                    f"map: expected to start threads for the worker processes; got "
                    f"{in_words(error)}; free threads or memory, or leave num_workers out"
                ) from error
        return team

    def _submit(self, team: _Team, elements: Sequence[Any]) -> _MapTask:
        job = _MapTask(elements, None if self._pickled else self._outcomes)
        team.board.jobs.put(job)
        return job

    def _result(self, board: _Board, job: _MapTask) -> list[Outcome]:
        began = time.monotonic()
        while not job.is_done.wait(_NAP_SECONDS):
            if not self._pickled and job.claim():
                job.run(None, board, Latch())
            else:
                self._check(time.monotonic() - max(began, board.heard_at))
        if job.error is None:
            return job.outcomes
        error, job.error = job.error, None
        try:
            raise error
        finally:
            del error  # or it would hold this frame, and this frame the error

    def _check(self, quiet_seconds: float) -> None:
        """Raise if nothing has been heard of any thread for too long."""
        patience = deadlines.timeout_seconds()
        if quiet_seconds > patience + (_END_SECONDS if self._pickled else 0):
            raise DatasetError(
                f"map: expected {callable_name(self._fn)} to return within {patience:g} s; it has "
                "not in any thread; set DVKERNELS_TIMEOUT_SECONDS if an element takes longer"
            )

    def _outcomes(self, elements: Sequence[Any], stop: Latch) -> Iterator[Outcome]:
        for element in elements:
            if stop.is_open:
                raise SystemExit  # the program is over: a thread of the user's ends in silence
            yield owned_outcome_of(self._fn, element)


def check_sendable(fn: Callable[[Any], Any]) -> None:
    """Raise :class:`DatasetError` unless worker processes can be given ``fn``."""
    name = callable_name(fn)
    try:
        pickled = pickle.dumps(fn)
    except Exception as error:
        raise DatasetError(
            f"map: expected a function that can be sent to worker processes; got {name}, which "
            f"cannot be pickled ({in_words(error)}); define it at the top of a module, or use "
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
