"""Worker thread: takes closures and runs them; one that is lost is replaced by another."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, final

from dvkernels import context, pytree, user_errors
from dvkernels.context import Frame
from dvkernels.coordinator.closure import Closure
from dvkernels.coordinator.closure_queue import ClosureQueue
from dvkernels.coordinator.coordinator_stats import counters
from dvkernels.coordinator.per_worker import PerWorkerIterator
from dvkernels.coordinator.remote_worker import RemoteWorker
from dvkernels.errors import WorkerLostError
from dvkernels.optimizers.optimizer import check_steps
from dvkernels.profiler import tracing
from dvkernels.replicas import thread_limits
from dvkernels.strategies.current_call import current_call
from dvkernels.threads import stoppable_thread
from dvkernels.threads.stoppable_thread import StoppableThread
from dvkernels.threads.thread import Latch
from dvkernels.variables.table_server import apply_pending, pending_writes

__all__: list[str] = []

_IDLE_SECONDS = 1.0  # how often an idle worker checks that its coordinator exists
# Workers that one closure may lose, before its error is taken to be its own.
MOST_RUNS = 4


@final
class WorkerThread:
    """Worker of one number: the thread that runs its closures, and what belongs to it alone.

    A closure that raises ``WorkerLostError``, of something that the worker reaches for it, loses
    the worker: this thread ends and another begins, with new iterators and that closure.

    Parameters
    ----------
    number : int
    closures : ClosureQueue
    frame : Frame
        The context of its calls.
    owner : callable
        Returns the coordinator while it exists.
    share : int, optional
        The threads of BLAS, OpenMP and Numba in a call.
    remote : RemoteWorker, optional
        The process that runs the closures, if it is not this one.
    living : set of int
        The workers of the coordinator that are not lost.
    """

    def __init__(
        self,
        number: int,
        closures: ClosureQueue,
        frame: Frame,
        owner: Callable[[], Any],
        share: int | None,
        remote: RemoteWorker | None,
        living: set[int],
    ) -> None:
        self.number = number
        self.threads: list[StoppableThread] = []  # the last one lives
        self.num_returned = self.num_failed = self.num_repeated = 0  # runs
        self._closures = closures
        self._frame = frame
        self._owner = owner
        self._share = share
        self._remote = remote
        self._living = living
        self._num_lowered = 0
        self._iterators: weakref.WeakKeyDictionary[PerWorkerIterator, Iterator[Any]]
        self._inherited: Closure | None = None  # of the thread before

    def new_thread(self) -> StoppableThread:
        """Return a thread of this worker, which has not begun."""
        name = f"dvkernels-replica-worker-{self.number}"
        thread = StoppableThread(self._serve, name, self._closures.wake)
        self.threads = [*self.threads[-1:], thread]
        return thread

    def _serve(self, stop: Latch) -> None:
        """Run closures until the coordinator is closed, or this worker is lost."""
        closures, closure = self._closures, self._inherited
        self._inherited = None
        self._num_lowered = 0
        self._iterators = weakref.WeakKeyDictionary()
        turn = None if self._remote is None else self._remote.turn
        try:
            if turn is not None and not self._waits_for(turn, stop):
                return self._leave()
            while True:
                if closure is None:
                    if self._remote is not None and self._remote.is_gone:
                        return self._leave()
                    closure = closures.take(self.number, self._living, _IDLE_SECONDS)
                if closure is not None:
                    if self._is_lost_by(closure):
                        return  # to the next thread
                    closure = None
                elif closures.why_closed or stop.is_open or self._owner() is None:
                    return self._leave()
        except BaseException as error:  # no memory is left, or the program ends
            if closure is not None and not closure.done.is_open:
                closures.fail(self.number, closure, error)
            self._is_replaced()
        finally:
            if turn is not None:
                try:  # noqa: SIM105 - as in TableServer.ask
                    turn.release()
                except RuntimeError:  # the turn never came
                    pass

    def _waits_for(self, turn: threading.RLock, stop: Latch) -> bool:
        """Wait for the end of an earlier coordinator's thread; return whether to go on."""
        closures = self._closures
        while not turn.acquire(timeout=_IDLE_SECONDS):
            closures.why_idle[self.number] = "runs a call of an earlier coordinator"
            if closures.why_closed or stop.is_open or self._owner() is None:
                return False
        closures.why_idle.pop(self.number, None)
        return True

    def _is_lost_by(self, closure: Closure) -> bool:
        """Run a closure to its end; return whether another thread does instead."""
        closures, number = self._closures, self.number
        closures.begin(number, closure, "" if self._remote is None else self._remote.place)
        share = self._share
        if share is not None and self._num_lowered < len(thread_limits.settings):
            self._num_lowered = thread_limits.lower(share, self._num_lowered)
        recording = tracing.active
        began = 0 if recording is None else time.perf_counter_ns()
        closure.runs += 1
        try:
            result = closure.variables.copy().run(self._call, closure)
        except BaseException as error:
            is_lost = isinstance(error, WorkerLostError) and closure.runs < MOST_RUNS
            if is_lost and self._remote is None and self._is_replaced(closure):
                return True
            # Without its server no worker can run it.
            if is_lost and self._remote is not None and not self._remote.why_servers_lost:
                self.num_repeated += 1
                closures.put_back(number, self._living, closure)
                return False
            self.num_failed += 1
            user_errors.annotate(error, f"raised by {closure}, on worker {number}")
            self._record(recording, began, closure)
            closures.fail(number, closure, error)
        else:
            self.num_returned += 1
            self._record(recording, began, closure)
            closures.finish(number, closure, result)
        return False

    def _record(self, recording: tracing.trace | None, began: int, closure: Closure) -> None:
        """Record a call in the trace."""
        if recording is not None:
            recording.name_lane(f"worker {self.number}")
            recording.add("call", "step", began, {"number": closure.number})
            coordinator = self._owner()
            if coordinator is not None:
                recording.sample(lambda: counters(coordinator))

    def _call(self, closure: Closure) -> Any:
        """Call the function, in the context of the strategy and of this worker."""
        if self._remote is not None:
            return self._remote.call(closure)
        context.enter(self._frame)
        current_call.set((self.number, closure.number))
        args, kwargs = closure.args, closure.kwargs
        if closure.has_workers_values:
            args, kwargs = pytree.map_leaves(self._own, (args, kwargs))
        if not closure.once:
            return closure.fn(*args, **kwargs)
        writes: list[Any] = []
        token = pending_writes.set(writes)
        result = closure.fn(*args, **kwargs)
        pending_writes.reset(token)
        check_steps(request for _, _, request, *_ in writes)
        apply_pending(writes)
        return result

    def _own(self, value: Any) -> Any:
        """Return this worker's iterator for that of all workers; another value as it is."""
        if not isinstance(value, PerWorkerIterator):
            return value
        found = self._iterators.get(value)
        if found is None:
            found = self._iterators[value] = value.of_worker(self.number)
        return found

    def _leave(self) -> None:
        """Take no more closures."""
        if self._remote is None:
            return
        lost = WorkerLostError(f"all workers of {self._closures.name} are lost")
        self._closures.leave(self.number, self._living, lost)

    def _is_replaced(self, closure: Closure | None = None) -> bool:
        """Start another thread, which runs this closure again; return whether it has started."""
        if stoppable_thread.is_over:
            return False
        before, self._inherited = self.threads, closure
        self.num_repeated += closure is not None
        try:
            self.new_thread().start()
        except RuntimeError:  # no thread can be started
            self.threads, self._inherited = before, None
            self.num_repeated -= closure is not None
            return False
        return True
