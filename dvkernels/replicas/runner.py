"""Runner of steps: calls one function in every replica at once, each in its own context."""

from __future__ import annotations

import contextvars
import functools
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from dvkernels import deadlines
from dvkernels.errors import CollectiveTimeoutError, ContextError
from dvkernels.philox import StrategyGenerators
from dvkernels.profiler import ask_server, collective_hooks, debugging, tracing
from dvkernels.replicas import foreign_threads, step_report, thread_limits
from dvkernels.replicas.gates import Gates
from dvkernels.replicas.progress_thread import ProgressThread
from dvkernels.replicas.rendezvous import Rendezvous
from dvkernels.replicas.step_lock import StepLock
from dvkernels.replicas.task_farm import TaskFarm
from dvkernels.replicas.thread_limits import ThreadLimit
from dvkernels.replicas.thread_team import ThreadTeam
from dvkernels.replicas.work_meter import WorkMeter
from dvkernels.threads import stoppable_thread

__all__: list[str] = []

Call = Callable[[Rendezvous, int], Any]

_CLOSED = "this strategy has been closed; make a new one"
_CLOSE_SECONDS = 5.0  # how long closing waits for the functions of an open map


class Runner:
    """Runner of one strategy's steps, one at a time; a step inside ``merge_call`` is nested.

    Threads are started at the first step, and again in a forked process. Replicas are numbered from
    ``first_replica``; ``announce`` is called with the first failure of each step. A step waits
    ``timeout_seconds``; the default gives way to the environment variable. ``limit`` holds the
    threads of BLAS, OpenMP and Numba down from the first step until the runner is closed.
    ``algorithm_of`` names the algorithm of a collective in traces: see ``CollectiveEvent``.
    """

    def __init__(
        self,
        num_replicas: int,
        label: str,
        first_replica: int = 0,
        announce: Callable[[BaseException], None] | None = None,
        step_lock: StepLock | None = None,
        generators: StrategyGenerators | None = None,
        timeout_seconds: float = deadlines.DEFAULT_TIMEOUT_SECONDS,
        limit: ThreadLimit | None = None,
        algorithm_of: Callable[[int, int], str] | None = None,
    ) -> None:
        self._generators = StrategyGenerators() if generators is None else generators
        self._step_lock = StepLock() if step_lock is None else step_lock
        self._num_replicas = num_replicas
        self._first_replica = first_replica
        self._announce = announce
        self.label = label
        self._timeout_seconds = timeout_seconds
        self._limit = limit
        self._algorithm_of = algorithm_of
        self._num_steps = 0
        self._closed = False
        self._progress_thread = ProgressThread()
        self._meter = WorkMeter(num_replicas)
        self._make_rendezvous: Callable[..., Rendezvous] = Rendezvous
        # A single replica of a single worker performs asynchronous calls at once.
        is_alone = num_replicas == 1 and announce is None
        self._background = None if is_alone else self._progress_thread
        if announce is not None:  # of several workers
            ask_server.ensure_running()
        self._reset_after_fork()

    def _reset_after_fork(self) -> None:
        self._lock = self._step_lock.lock()
        # All living teams; one dropped by an interrupted step may wait for garbage collection.
        self._teams: list[weakref.ref[ThreadTeam]] = []
        self._idle: list[ThreadTeam] = []  # a stack: nested steps need threads of their own
        self._pid = os.getpid()  # last: after an interrupt before this, it is done again

    def run_program(self, program: Callable[[], Any]) -> Any:
        """Return ``program()``, the step of all replicas at once, called on this thread."""
        self._num_steps += 1
        if tracing.active is not None:
            program = functools.partial(self._traced_program, program)
        try:
            return self.run(None, False, program)
        except BaseException as error:
            if self._announce is not None:
                self._announce(error)
            raise

    def _traced_program(self, program: Callable[[], Any]) -> Any:
        replica, recording = self._first_replica, tracing.active
        about = {"replica": replica, "step": self._num_steps, "strategy": self.label}
        with tracing.span("run", "step", lane=f"replica {replica}", **about):
            result = program()
        if recording is not None:
            recording.sample()
        return result

    def run(self, call: Any, nested: bool, program: Callable[[], Any] | None = None) -> Any:
        """Return ``[call(rendezvous, replica) for each replica]``, called concurrently.

        Raises :meth:`Rendezvous.outcome` if a replica fails. ``nested``: a step of this strategy is
        running and waits for this one.
        """
        if self._pid != os.getpid():
            self._reset_after_fork()  # threads and lock owner stayed in the parent process
        if self._closed:
            raise ContextError(_CLOSED)
        if self._num_replicas > 1 and sys.is_finalizing():
            raise self._too_late("run")
        seconds = self._patience()
        if nested:
            return self._run(call, seconds)
        try:
            if not self._lock.acquire(timeout=seconds):
                raise CollectiveTimeoutError(
                    f"another thread has been running a step of this strategy for {seconds:g} s; "
                    f"one step runs at a time (timeout_seconds of the strategy, or "
                    f"DVKERNELS_TIMEOUT_SECONDS, changes the patience)"
                )
            if self._step_lock.farms:  # opened while this thread waited for the lock
                self._step_lock.check_free("run")
            was_stepping = self._step_lock.is_stepping  # the default strategy may be in merge_call
            try:
                self._step_lock.is_stepping = True
                self._generators.num_begun += 1
                results = self._run(call, seconds) if program is None else program()
                self._generators.num_done += 1
                return results
            finally:
                self._step_lock.is_stepping = was_stepping
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self._lock.release()
            except RuntimeError:  # not ours: the wait timed out or was interrupted
                pass

    def _run(self, call: Call, timeout: float) -> list[Any]:
        results: list[Any] = [None] * self._num_replicas
        rendezvous: Rendezvous | None = None
        team: ThreadTeam | None = None
        gates: Gates | None = None
        has_ended: Sequence[bool] = ()
        is_reusable = False
        try:
            self._num_steps += 1
            limit = self._limit
            debug_state = debugging.active
            number = self._num_steps
            if self._num_replicas > 1:
                try:  # two atomic operations: close() may empty the list meanwhile
                    team = self._idle.pop()
                except IndexError:
                    team = self._new_team()
                team.is_busy = True
                # After the first team, which imports Numba.
                if limit is not None and limit.num_modules != len(sys.modules):
                    limit.apply(stacklevel=5)
                gates, has_ended = team.closed_gates(), team.has_ended
            rendezvous = self._make_rendezvous(
                self._num_replicas,
                gates,
                timeout,
                self._background,
                self._first_replica,
                self._announce,
                has_ended,
            )
            if collective_hooks.active is not None:  # as in debug mode
                label = debugging.RunningReplica(self.label, number, 0, self._algorithm_of)
                rendezvous.observe(debug_state, label)
            if team is not None:
                share = None if limit is None else limit.share
                _run_together(rendezvous, team, call, results, share)
            else:
                try:
                    contextvars.copy_context().run(_take_part, rendezvous, 0, call, results)
                finally:
                    rendezvous.settle(started=True)
            if rendezvous.failure is not None:
                error = rendezvous.outcome(rendezvous.failure)
                if debug_state is not None:
                    debug_state.dump(self.label, number, error)
                raise error
            if team is not None:
                team.is_busy = False
                is_reusable = True  # first: a dismissed team must not be in the idle list
                self._idle.append(team)
            return results
        finally:
            # The traceback of an error refers to this frame, and the step to the error: break the
            # cycle. After a failure a gate may be half open: the team is dropped with its threads.
            if team is not None:
                team.is_busy = False
                if not is_reusable:
                    team.dismiss()
            team = None
            if rendezvous is not None:
                rendezvous.end()
            if self._closed:
                self.close()  # by another thread, during this step

    def farm_out(self, farm: TaskFarm) -> None:
        """Occupy the replicas with a task farm, whose threads its iterator starts."""
        if self._closed:
            raise ContextError(_CLOSED)
        if stoppable_thread.is_over:
            raise self._too_late("map")
        farm.timeout_seconds = self._patience()
        farm.claim()
        if self._limit is not None:
            if self._limit.num_modules != len(sys.modules):
                self._limit.apply(stacklevel=4)
            farm.share = self._limit.share
        self._generators.num_begun += 1  # those of the items begin anew

    def _patience(self) -> float:
        """Return how long waits last [s]: the default gives way to the environment variable."""
        seconds = self._timeout_seconds
        if seconds == deadlines.DEFAULT_TIMEOUT_SECONDS and deadlines.VARIABLE in os.environ:
            return deadlines.timeout_seconds()
        return seconds

    def _too_late(self, verb: str) -> ContextError:
        return ContextError(
            f"{verb} of {self.label} was called while the interpreter is shutting down, when the "
            f"threads of its replicas run no more; call it before that, in a function registered "
            f"with atexit at the latest"
        )

    def measure_work(self, finish: Callable[[int], None] | None = None) -> WorkMeter:
        """Measure the work of the replicas in all later steps; return the meter.

        ``finish`` waits for the work of a replica that its function leaves behind on a stream.
        """
        self._meter.finish = finish
        self._make_rendezvous = self._meter.rendezvous
        return self._meter

    def _new_team(self) -> ThreadTeam:
        share = None if self._limit is None else self._limit.share
        team = ThreadTeam(self._num_replicas, share)
        ask_server.ensure_running()
        self._teams = [ref for ref in self._teams if ref() is not None]
        self._teams.append(weakref.ref(team))
        return team

    def close(self) -> None:
        """End the threads and join them. Safe to call twice."""
        self._closed = True
        for farm in list(self._step_lock.farms):
            farm.close("its strategy was closed")
            farm.wait_for_calls(_CLOSE_SECONDS)
        self._progress_thread.stop()
        if self._pid == os.getpid():
            teams = [ref() for ref in self._teams]
            self._idle.clear()
            for team in teams:
                if team is not None and not team.is_busy:
                    team.stop()
        if self._limit is not None:
            self._limit.release()


def _take_part(rendezvous: Rendezvous, rank: int, call: Call, results: list[Any]) -> int:
    """Run one replica: store its result in ``results``, or its error in the rendezvous.

    Return the gate that its thread opens next, or -1.
    """
    if not rendezvous.enter(rank):
        return -1
    is_observed = debugging.active is not None
    before = debugging.enter(rendezvous.label_of(rank)) if is_observed else None
    try:
        results[rank] = (
            call(rendezvous, rank) if tracing.active is None else _traced(rendezvous, rank, call)
        )
    except BaseException as error:
        rendezvous.fail(error, rank)
    finally:
        if is_observed:
            debugging.enter(before)
        gate = rendezvous.leave(rank)
    return gate


foreign_threads.ENTRANCES.add(_take_part.__code__)
step_report.REPLICAS.add(_take_part.__code__)
step_report.RUNS.add(Runner._run.__code__)


def _traced(rendezvous: Rendezvous, rank: int, call: Call) -> Any:
    """Run one replica inside a trace span."""
    replica, recording = rendezvous.global_rank(rank), tracing.active
    label = rendezvous.label
    about = {"replica": replica, "step": label.step, "strategy": label.strategy}
    with tracing.span("run", "step", lane=f"replica {replica}", **about):
        result = call(rendezvous, rank)
    if rank == 0 and recording is not None:
        recording.sample()
    return result


def _run_together(
    rendezvous: Rendezvous,
    team: ThreadTeam,
    call: Call,
    results: list[Any],
    share: int | None,
) -> None:
    """Run all replicas, replica 0 on this thread, and return when all have left.

    An interrupt may strike between any two operations. Whatever it skips, the replicas that have
    started are waited for, and the others never start.
    """
    contexts = [contextvars.copy_context() for _ in results]
    tasks = [
        functools.partial(contexts[rank].run, _take_part, rendezvous, rank, call, results)
        for rank in range(1, len(results))
    ]
    started = False
    try:
        team.start(tasks)
        started = True
        run = contexts[0].run
        if share is None or not thread_limits.settings:
            run(_take_part, rendezvous, 0, call, results)
        else:
            thread_limits.run_limited(share, run, _take_part, rendezvous, 0, call, results)
    except BaseException as error:
        rendezvous.fail(error, 0)
    finally:
        rendezvous.settle(started)
        if thread_limits.late:
            thread_limits.restore_late()
        del team, tasks  # the traceback of an error that the user keeps refers to this frame


thread_limits.entrances[_run_together.__code__] = True
