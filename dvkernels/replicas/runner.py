"""How one function becomes one call per replica, at the same time, each in its context."""

from __future__ import annotations

import contextvars
import functools
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

from dvkernels import deadlines
from dvkernels.errors import CollectiveTimeoutError, ContextError
from dvkernels.profiler import debugging, tracing
from dvkernels.replicas import foreign_threads
from dvkernels.replicas.progress_thread import ProgressThread
from dvkernels.replicas.rendezvous import Rendezvous
from dvkernels.replicas.step_lock import StepLock
from dvkernels.replicas.thread_team import ThreadTeam

__all__: list[str] = []

Call = Callable[[Rendezvous, int], Any]


class Runner:
    """Runs the steps of one strategy, one at a time; a step inside ``merge_call`` is nested.

    Holds threads only; they are made at the first step, and anew in a forked process. Replicas
    are called ``first_replica`` and so on; ``announce`` is told of each step's first failure.
    """

    def __init__(
        self,
        num_replicas: int,
        label: str,
        first_replica: int = 0,
        announce: Callable[[BaseException], None] | None = None,
        turn: StepLock | None = None,
    ) -> None:
        self._turns = StepLock() if turn is None else turn
        self._num_replicas = num_replicas
        self._first_replica = first_replica
        self._announce = announce
        self._label = label
        self._num_steps = 0
        self._closed = False
        self._carrier = ProgressThread()
        self._forget()

    def _forget(self) -> None:
        self._turn = self._turns.lock()
        # All crews that exist; one dropped by an interrupted step may wait for garbage collection.
        self._crews: list[weakref.ref[ThreadTeam]] = []
        self._idle: list[ThreadTeam] = []  # a stack: nested steps need threads of their own
        self._pid = os.getpid()  # last: an interrupt before this leaves it to be done again

    def run(self, call: Call, nested: bool) -> list[Any]:
        """Return ``[call(step, replica) for each replica]``, called at the same time.

        Raises what :meth:`Step.outcome` says if any of them failed. ``nested`` says that a step of
        this strategy is under way and waits for this one.
        """
        if self._pid != os.getpid():
            self._forget()  # threads and the owner of the lock stayed in the parent process
        if self._closed:
            raise ContextError("this strategy has been closed; make a new one")
        if self._num_replicas > 1 and sys.is_finalizing():
            raise ContextError(
                f"run of {self._label} was called while the interpreter is shutting down, when the "
                f"threads of its replicas run no more; call it before that, in a function "
                f"registered with atexit at the latest"
            )
        seconds = deadlines.timeout_seconds()
        if nested:
            return self._run(call, seconds)
        try:
            if not self._turn.acquire(timeout=seconds):
                raise CollectiveTimeoutError(
                    f"another thread has been running a step of this strategy for {seconds:g} s; "
                    f"one step runs at a time (DVKERNELS_TIMEOUT_SECONDS changes the patience)"
                )
            was_stepping = self._turns.is_stepping  # the default strategy may be in merge_call
            try:
                self._turns.is_stepping = True
                return self._run(call, seconds)
            finally:
                self._turns.is_stepping = was_stepping
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self._turn.release()
            except RuntimeError:  # not ours: the wait was in vain or was interrupted
                pass

    def _run(self, call: Call, timeout: float) -> list[Any]:
        results: list[Any] = [None] * self._num_replicas
        step: Rendezvous | None = None
        crew: ThreadTeam | None = None
        is_kept = False
        try:
            self._num_steps += 1
            watch = debugging.active
            number = self._num_steps
            if self._num_replicas == 1:
                # Alone among all workers it would wait for itself: what it issues is done at once.
                carrier = None if self._announce is None else self._carrier
                step = Rendezvous(1, None, timeout, carrier, self._first_replica, self._announce)
                if watch is not None:
                    step.observe(watch, debugging.RunningReplica(self._label, number, 0))
                try:
                    contextvars.copy_context().run(_take_part, step, 0, call, results)
                finally:
                    step.settle(started=True)
            else:
                crew = self._idle.pop() if self._idle else self._new_crew()
                crew.is_busy = True
                step = crew.step(timeout, self._carrier, self._first_replica, self._announce)
                if watch is not None:
                    step.observe(watch, debugging.RunningReplica(self._label, number, 0))
                _run_together(step, crew, call, results)
            if step.failure is not None:
                error = step.outcome(step.failure)
                if watch is not None:
                    watch.dump(self._label, number, error)
                raise error
            if crew is not None:
                crew.is_busy = False
                is_kept = True  # first: a crew that is dismissed must not be found idle
                self._idle.append(crew)
            return results
        finally:
            # The traceback of an error refers to this frame, and the step to the error: leave no
            # circle. After a failure a gate may be half open: the crew is dropped with its threads.
            if crew is not None:
                crew.is_busy = False
                if not is_kept:
                    crew.dismiss()
            crew = None
            if step is not None:
                step.end()
            if self._closed:
                self.close()  # by another thread, during this step

    def _new_crew(self) -> ThreadTeam:
        crew = ThreadTeam(self._num_replicas)
        self._crews = [ref for ref in self._crews if ref() is not None]
        self._crews.append(weakref.ref(crew))
        return crew

    def close(self) -> None:
        """End the threads, and wait for that. Safe to call twice."""
        self._closed = True
        self._carrier.stop()
        if self._pid == os.getpid():
            crews = [ref() for ref in self._crews]
            self._idle.clear()
            for crew in crews:
                if crew is not None and not crew.is_busy:
                    crew.stop()


def _take_part(step: Rendezvous, rank: int, call: Call, results: list[Any]) -> None:
    """Run one replica: its result goes into ``results``, its error into the step."""
    if not step.enter(rank):
        return
    watching = debugging.active is not None
    before = debugging.enter(step.place_of(rank)) if watching else None
    try:
        results[rank] = call(step, rank) if tracing.active is None else _traced(step, rank, call)
    except BaseException as error:
        step.fail(error, rank)
    finally:
        if watching:
            debugging.enter(before)
        step.leave(rank)


foreign_threads.ENTRANCES.add(_take_part.__code__)


def _traced(step: Rendezvous, rank: int, call: Call) -> Any:
    """Return what the replica returns, and record it."""
    replica = step.number_of(rank)
    with tracing.span("run", "step", lane=f"replica {replica}", replica=replica):
        return call(step, rank)


def _run_together(step: Rendezvous, crew: ThreadTeam, call: Call, results: list[Any]) -> None:
    """Run all replicas, replica 0 here, and return when every one has left.

    An interrupt may strike between any two operations; whatever it skips, the replicas that were
    started are waited for, and the others never start.
    """
    contexts = [contextvars.copy_context() for _ in results]
    tasks = [
        functools.partial(contexts[rank].run, _take_part, step, rank, call, results)
        for rank in range(1, len(results))
    ]
    started = False
    try:
        crew.start(tasks)
        started = True
        contexts[0].run(_take_part, step, 0, call, results)
    except BaseException as error:
        step.fail(error, 0)
    finally:
        step.settle(started)
        del crew, tasks  # the traceback of an error that the user keeps refers to this frame
