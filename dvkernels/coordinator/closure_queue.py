"""Queue of closures: scheduled in order, taken by workers, cancelled behind one that fails.

No lock is held by the threads that schedule and wait, so Ctrl-C between any two operations leaves
the queue consistent: each closure stands in one deque from the moment it is scheduled until it has
ended, and a claim decides who runs or cancels it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from typing import Any, final

from dvkernels import deadlines, thread_frames
from dvkernels.coordinator.closure import Closure
from dvkernels.errors import (
    CallCancelledError,
    CollectiveTimeoutError,
    ContextError,
    WorkerLostError,
)
from dvkernels.replicas import diagnostics
from dvkernels.threads.thread import Latch
from dvkernels.user_errors import describe

__all__: list[str] = []

MOST_QUEUED = 1024  # closures that wait for a worker; schedule waits while there are more
MOST_QUEUED_NBYTES = 64 << 20  # of those that are sent to other processes, likewise
_LARGE_NBYTES = 1 << 16
_POLL_SECONDS = 0.1


@final
class ClosureQueue:
    """Closures of one coordinator that have not ended, and the errors that have not come out.

    Parameters
    ----------
    name : str
        Of the strategy, for messages.
    timeout_seconds : float
        The longest wait in which no closure ends; the default gives way to the environment
        variable.
    bound : int
        The number of closures that may wait for a worker.
    """

    def __init__(self, name: str, timeout_seconds: float, bound: int = MOST_QUEUED) -> None:
        self.name = name
        self.bound = bound
        # By worker: since when, on which thread, and in which other process.
        self.running: dict[int, tuple[Closure, float, int, str]] = {}
        self.why_closed = ""
        self.loss: BaseException | None = None  # of the last worker
        # By worker: why its thread takes no closure yet, though it is not running one.
        self.why_idle: dict[int, str] = {}
        self.pid = os.getpid()
        self._timeout_seconds = timeout_seconds
        self._open: deque[Closure] = deque()  # scheduled, perhaps not ended
        self._queue: queue.SimpleQueue[Closure | None] = queue.SimpleQueue()
        self._returned: deque[Closure] = deque()  # by workers that are lost
        self._failed: deque[tuple[Closure, BaseException]] = deque()
        self._last_end = 0.0  # of a closure

    # -- the threads that schedule ----------------------------------------------------------------

    def put(self, closure: Closure) -> None:
        """Schedule a closure; raise the error of one before it instead, if it has not come out."""
        self.raise_error()
        if len(self._open) >= 2 * self.bound:  # many have ended behind one that has not
            for ended in [each for each in list(self._open) if each.done.is_open]:
                self._remove(ended)
        while len(self._open) >= self.bound:
            self._prune()
            if self._queue.qsize() < self.bound:
                break
            # Half of them at a time, so that not every closure wakes this thread.
            middle = self._at(len(self._open) // 2)
            if middle is not None:
                self._wait(middle.done, "schedule, whose queue is full,")
            self.raise_error()
        if closure.nbytes >= _LARGE_NBYTES:
            while (waiting := self._waiting_beside(closure)) is not None:
                self._wait(waiting.done, "schedule, whose queue is full,")
                self.raise_error()
        if self.why_closed:
            self._check_workers()
            raise ContextError(f"schedule of {self.name}: {self.why_closed}")
        self._open.append(closure)
        self._queue.put(closure)
        self._cancel_if_closed()  # by another thread meanwhile
        self._check_workers()

    def _check_workers(self) -> None:
        """Raise if the last worker is lost."""
        if self.loss is not None:
            raise WorkerLostError(f"schedule of {self.name}: {self.loss}") from self.loss

    def _waiting_beside(self, closure: Closure) -> Closure | None:
        """Return the first closure that waits for a worker, if all have too many bytes."""
        waiting = [each for each in list(self._open) if each.claim.is_free]
        total = closure.nbytes + sum(each.nbytes for each in waiting)
        return waiting[0] if waiting and total > MOST_QUEUED_NBYTES else None

    def join(self) -> None:
        """Wait until all closures have ended; raise an error that has not come out."""
        while (head := self._at(0)) is not None:
            if not head.done.is_open:
                self._wait(head.done, "join", head)
            self._remove(head)
        self.raise_error()

    def wait(self, closure: Closure) -> None:
        """Wait until one closure has ended."""
        self._wait(closure.done, "fetch", closure)

    @property
    def is_idle(self) -> bool:
        """Whether all closures have ended."""
        self._prune()
        return all(closure.done.is_open for closure in list(self._open))

    @property
    def num_queued(self) -> int:
        """How many closures wait for a worker."""
        return sum(closure.claim.is_free for closure in list(self._open)) + len(self._returned)

    def raise_error(self) -> None:
        """Raise the first error that has not come out, and cancel what was scheduled behind it."""
        if not self._failed:
            return
        failed = self._failed[0]
        self._cancel_behind(*failed)
        try:
            raise failed[1]
        finally:  # an interrupt from here on has the error as its context
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self._failed.remove(failed)
            except ValueError:  # another thread raises it too
                pass
            del failed  # the traceback of the error refers to this frame

    def _prune(self) -> None:
        while (head := self._at(0)) is not None and head.done.is_open:
            self._remove(head)

    def _at(self, position: int) -> Closure | None:
        try:
            return self._open[position]
        except IndexError:  # other threads remove some
            return None

    def _remove(self, closure: Closure) -> None:
        try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
            self._open.remove(closure)  # the first of them: another thread may have removed it
        except ValueError:
            pass

    def _wait(self, done: Latch, verb: str, closure: Closure | None = None) -> None:
        """Wait for a latch; raise when no closure has ended for too long."""
        began = time.monotonic()
        while not done.wait(_POLL_SECONDS):
            if self.pid != os.getpid():
                raise ContextError(
                    f"{verb} of {self.name}: its workers are threads of the process that this one "
                    f"was forked from; make a strategy and a coordinator here"
                )
            if closure is not None and closure.claim.is_free and self._queue.empty():
                self._queue.put(closure)  # an interrupt came between the two steps of put
            seconds = self.patience()
            if time.monotonic() - max(began, self._last_end) > seconds:
                raise CollectiveTimeoutError(
                    f"{verb} of {self.name} waited in vain: no call has ended for {seconds:g} s; "
                    f"{self.describe_running()}; set timeout_seconds of the strategy, or "
                    f"DVKERNELS_TIMEOUT_SECONDS, if they need longer"
                )

    def patience(self) -> float:
        """Return how long waits last [s]."""
        return deadlines.of_strategy(self._timeout_seconds)

    def describe_running(self) -> str:
        """Describe the closures that run: on which worker, since when, and at which line."""
        frames, now = thread_frames.current_frames(), time.monotonic()
        lines = [
            f"worker {worker} has been running {closure} for {now - began:.1f} s, "
            f"{place or 'at ' + diagnostics.user_line(frames.get(ident))}"
            for worker, (closure, began, ident, place) in sorted(self.running.copy().items())
        ]
        lines += [f"worker {worker} {why}" for worker, why in sorted(self.why_idle.copy().items())]
        return "; ".join(lines) or "no worker is running one"

    # -- the workers ------------------------------------------------------------------------------

    def take(self, worker: int, workers: set[int], seconds: float) -> Closure | None:
        """Take a closure to run it; None if there is none for so long, or the queue is closed.

        One that has lost this worker is for the others of ``workers``, while there are any.
        """
        for returned in list(self._returned):
            if worker not in returned.lost_by or workers <= returned.lost_by:
                with contextlib.suppress(ValueError):  # another worker took it
                    self._returned.remove(returned)
                    return returned
        try:
            closure = self._queue.get(True, seconds)
        except queue.Empty:
            return None
        if closure is None or not closure.claim.take():
            return None
        try:
            failed = self._failed[0]
        except IndexError:
            return closure
        self._cancel(closure, *failed)  # it was scheduled while that one failed
        return None

    def begin(self, worker: int, closure: Closure, place: str) -> None:
        """Record that a worker runs a closure, on this thread or in another process."""
        self.running[worker] = closure, time.monotonic(), threading.get_ident(), place

    def finish(self, worker: int, closure: Closure, result: Any) -> None:
        """End a closure with its result."""
        self.running.pop(worker, None)
        self._last_end = time.monotonic()
        closure.end(result, None)

    def fail(self, worker: int, closure: Closure, error: BaseException) -> None:
        """End a closure with its error, and cancel those that no worker has taken."""
        self.running.pop(worker, None)
        self._last_end = time.monotonic()
        self._failed.append((closure, error))
        self._cancel_behind(closure, error)
        closure.end(None, error)

    def _cancel_behind(self, failed: Closure, error: BaseException) -> None:
        for closure in list(self._open):
            if closure.claim.take():
                self._cancel(closure, failed, error)

    def _cancel(self, closure: Closure, failed: Closure, error: BaseException) -> None:
        text = f"{closure} was cancelled: {failed}, scheduled before it, raised {describe(error)}"
        closure.end(None, CallCancelledError(f"{text}; schedule it again"))

    def put_back(self, worker: int, workers: set[int], closure: Closure) -> None:
        """Return a closure whose worker is lost, for another one to run."""
        closure.lost_by.add(worker)
        self.running.pop(worker, None)
        self._returned.append(closure)
        for _ in workers.copy():  # this worker may be the first to wake
            self.wake()

    def leave(self, worker: int, workers: set[int], error: BaseException) -> None:
        """Record that a worker takes no more closures; the last one ends those that are left."""
        workers.discard(worker)
        if workers:
            return
        if not self.why_closed:  # else the calls that are left were cancelled
            self.loss = error
        while self._returned:
            with contextlib.suppress(IndexError):
                self.fail(worker, self._returned.popleft(), error)
        if self.loss is not None:
            waiting = next((each for each in list(self._open) if each.claim.take()), None)
            if waiting is not None:
                self.fail(worker, waiting, error)
        self.close("all its workers are lost", 0)

    # -- the end ----------------------------------------------------------------------------------

    def close(self, why: str, num_workers: int) -> None:
        """Cancel the closures that no worker has taken, and let the workers end."""
        self.why_closed = self.why_closed or why
        self._cancel_if_closed()
        for _ in range(num_workers):
            self.wake()

    def _cancel_if_closed(self) -> None:
        if not self.why_closed:
            return
        for closure in list(self._open):
            if closure.claim.take():
                text = f"{closure} was cancelled: {self.why_closed}"
                closure.end(None, CallCancelledError(text))

    def wake(self) -> None:
        """Let a worker that waits for a closure see that there will be none."""
        self._queue.put(None)
