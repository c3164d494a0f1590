"""Task farm: threads of replicas that take items one by one, each the next as soon as it is free.

Replica 0 may be the caller's thread, while it waits for a result. The threads advance the iterator
of the items themselves, one thread at a time, so that no item is handed over. A thread leaves each
result under its position, and wakes the caller only if it waits for that position.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context, copy_context
from typing import Any, final

from dvkernels import deadlines, user_errors
from dvkernels.devices.jax_devices import DefaultDevices
from dvkernels.devices.replica_streams import StreamOrder
from dvkernels.errors import CollectiveTimeoutError, ContextError
from dvkernels.profiler import tracing
from dvkernels.replicas import foreign_threads, thread_limits
from dvkernels.replicas.item_step import ItemStep
from dvkernels.replicas.step_lock import StepLock
from dvkernels.threads.thread import Latch

__all__: list[str] = []

Outcome = tuple[Any, BaseException | None]  # a result, or the error that was raised instead

_IDLE_CHECK_SECONDS = 1.0  # how often an idle thread checks that somebody still wants results
_LAST_SLEEP_SECONDS = 0.02  # of a wait for calls to return
_END = object()  # in place of an item: there is none left


@final
class TaskFarm:
    """Items, the replicas that apply ``fn`` to them, and the outcomes that wait for the caller.

    Parameters
    ----------
    fn : callable
        Called with one item, in the context of the replica that took it.
    items : iterator
        Advanced by the replicas' threads, one at a time, always in one context.
    steps, contexts : list
        Of each local replica its rendezvous, and the context variables of its calls.
    is_ordered : bool
        Whether position k has the result of item k, or the k-th that was ready.
    name : str
        The strategy and the caller's line, for messages.
    first_replica : int
        The number of the first local replica among those of all processes.
    has_caller : bool
        Whether replica 0 is the thread that waits for a result: it works on items meanwhile. With a
        thread more than cores, Linux lets one of them wait for milliseconds.
    """

    def __init__(
        self,
        fn: Callable[[Any], Any],
        items: Iterator[Any],
        steps: Sequence[ItemStep],
        contexts: Sequence[Context],
        *,
        is_ordered: bool,
        name: str,
        first_replica: int,
        step_lock: StepLock,
        has_caller: bool,
    ) -> None:
        self.has_caller = has_caller
        self._seat: list[None] = [None]  # of replica 0, for the caller's thread that takes it
        self._num_threads = len(steps) - has_caller
        self._fn = fn
        self._items = items
        self._source_context = copy_context()
        self._steps = steps
        self._contexts = contexts
        self._is_ordered = is_ordered
        self.name = name
        self.first_replica = first_replica
        self._step_lock = step_lock
        self._completions = itertools.count()
        self._num_taken = 0
        self._num_left = itertools.count(1)
        # Tokens: one for each item that may be taken ahead of the caller, and the right to take
        # one. A SimpleQueue stays consistent when an interrupt strikes between two operations.
        self.slots: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._turns: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(2 * len(steps) + 1):
            self.slots.put(None)
        self._turns.put(None)
        self.outcomes: dict[int, Outcome] = {}  # by position
        self.waiting: dict[int, threading.Lock] = {}  # by position: wakes who waits for it
        self.count: int | None = None  # of the outcomes, once it is known
        self.failure: BaseException | None = None  # of a thread, outside of user code
        self.why_closed = ""  # not empty: nobody wants results any more
        self.calls: list[int | None] = [None] * len(steps)  # the item each replica works on
        self._idents = [0] * len(steps)
        self._is_over = False  # no further item is taken
        self.streams: StreamOrder | DefaultDevices | None = None
        self.timeout_seconds = deadlines.DEFAULT_TIMEOUT_SECONDS  # of waits for calls to return
        self.share: int | None = None  # the threads of BLAS, OpenMP and Numba in each replica
        self._owner: Callable[[], object] = _nobody
        self.pid = os.getpid()

    # -- opening ----------------------------------------------------------------------------------

    def belong_to(self, owner: object) -> None:
        """End, once this object is dropped."""
        self._owner = weakref.ref(owner)

    def claim(self) -> None:
        """Occupy the replicas of the strategy; raise if they are occupied."""
        occupy = functools.partial(self._step_lock.farms.setdefault, self)
        self._step_lock.between_steps(occupy, "map")

    # -- the threads of the replicas --------------------------------------------------------------

    def serve(self, rank: int, _: Latch) -> None:
        """Take items and call ``fn`` on them, as one replica, until there are no more."""
        self._idents[rank] = threading.get_ident()
        streams = self.streams
        try:
            with contextlib.nullcontext() if streams is None else streams.replica(rank):
                self._serve(rank)
        except BaseException as error:  # no memory is left, or the program ends
            self.failure = error
        finally:
            self.calls[rank], self._idents[rank] = None, 0  # the next thread may have that ident
            self._steps[rank].closed = True
            if self.failure is not None:
                self.end()
            is_last = next(self._num_left) == self._num_threads
            if is_last and (self.why_closed or self._owner() is None):
                self._step_lock.farms.pop(self, None)

    def _serve(self, rank: int) -> None:
        share, num_lowered = self.share, 0
        get_slot, get_turn = self.slots.get, self._turns.get
        has_slot = False
        while True:
            try:
                has_slot = has_slot or get_slot(True, _IDLE_CHECK_SECONDS) is None
                get_turn(True, _IDLE_CHECK_SECONDS)
            except queue.Empty:
                if self._is_over or self._owner() is None:
                    return
                continue
            has_slot = False
            if share is not None and num_lowered < len(thread_limits.settings):
                num_lowered = thread_limits.lower(share, num_lowered)
            if not self._take(rank):
                return

    def _take(self, rank: int) -> bool:
        """Take an item, with a slot and the turn, and leave its outcome; False: no more are taken.

        On the caller's thread a KeyboardInterrupt is raised: it may be Ctrl-C.
        """
        if self._is_over or self._owner() is None:
            self.end()
            return False
        step, calls = self._steps[rank], self.calls
        index = position = self._num_taken
        try:
            item = self._source_context.run(next, self._items, _END)
        except BaseException as error:
            user_errors.annotate(error, f"raised by the items of map, in place of item {index}")
            outcome: Outcome = (None, error)
            self.end()
        else:
            if item is _END:
                self.count = index
                self.end()
                return False
            self._num_taken = index + 1
            self._turns.put(None)
            calls[rank] = step.item_index = index
            if self.why_closed:  # whoever closes this waits for the calls it sees
                return False
            recording = tracing.active
            began = 0 if recording is None else time.perf_counter_ns()
            try:
                outcome = (self._contexts[rank].copy().run(self._fn, item), None)
            except BaseException as error:
                replica = self.first_replica + rank
                user_errors.annotate(error, f"raised for item {index} of map, by replica {replica}")
                if self.has_caller and rank == 0 and isinstance(error, KeyboardInterrupt):
                    raise
                outcome = (None, error)
                self.end()
            del item  # keep no object of the user alive while waiting
            if os.getpid() != self.pid:
                return False  # fn forked, and this is the child
            if recording is not None:
                recording.name_lane(f"replica {self.first_replica + rank}")
                recording.add("map", "step", began, {"item": index})
            if not self._is_ordered:
                position = next(self._completions)
        calls[rank] = None  # first: when the last outcome is received, no call runs
        self.outcomes[position] = outcome
        lock = self.waiting.pop(position, None)
        if lock is not None:
            lock.release()
        return True

    # -- the caller -------------------------------------------------------------------------------

    def help_out(self) -> bool:
        """Work on one item as replica 0, on this thread; False: it may take none now."""
        share, own = self.share, threading.get_ident()
        if own in self._idents:
            return False  # a function of this map asks for a result
        try:
            self._seat.pop()
        except IndexError:
            return False  # another thread is replica 0
        try:
            try:
                self.slots.get(False)
            except queue.Empty:
                return False
            try:
                self._turns.get(False)
            except queue.Empty:
                self.slots.put(None)
                return False
            self._idents[0] = own
            if share is None or not thread_limits.settings:
                return self._take(0)
            return bool(thread_limits.run_limited(share, self._take, 0))
        finally:
            if thread_limits.late:
                thread_limits.restore_late()
            self.leave_seat()

    def leave_seat(self) -> None:
        """Record that this thread works as replica 0 no more; also after an interrupt."""
        if self.has_caller and self._idents[0] in (0, threading.get_ident()):
            self.calls[0], self._idents[0] = None, 0
            self._steps[0].closed = self._is_over
            self._seat[:] = [None]

    def wait(self, position: int, seconds: float) -> Outcome | None:
        """Wait for an outcome for so many seconds; None if it is not there, or there is none."""
        if threading.get_ident() in self._idents:
            raise ContextError(
                "next was called on a map by its own function or items, which it waits for; take "
                "its results outside"
            )
        lock = threading.Lock()
        lock.acquire()
        self.waiting[position] = lock
        outcome = self.outcomes.pop(position, None)
        if outcome is None and not self.why_closed and not self.is_behind(position):
            lock.acquire(timeout=seconds)
            outcome = self.outcomes.pop(position, None)
        self.waiting.pop(position, None)
        return outcome

    def is_behind(self, position: int) -> bool:
        """Return whether this position is behind the last outcome, or a thread has failed."""
        return self.failure is not None or (self.count is not None and position >= self.count)

    def end(self) -> None:
        """Take no further item, and wake all who wait."""
        self._is_over = True
        for _ in self._steps:
            self.slots.put(None)
            self._turns.put(None)
        for position in list(self.waiting):
            lock = self.waiting.pop(position, None)
            if lock is not None:
                lock.release()

    def close(self, why: str) -> None:
        """End, and let nobody receive results any more."""
        self.why_closed = self.why_closed or why
        self.end()
        self.outcomes.clear()
        if self.num_calls == 0:
            self._step_lock.farms.pop(self, None)

    def finish(self) -> None:
        """End, once the last outcome has been received: the replicas are free.

        Another thread may still wait for an earlier one.
        """
        if self.num_calls == 0 and not self.outcomes:
            self._step_lock.farms.pop(self, None)

    @property
    def num_calls(self) -> int:
        """The number of calls that run, other than one that this thread makes."""
        own = threading.get_ident()
        pairs = zip(self.calls, self._idents, strict=True)
        return sum(call is not None and ident != own for call, ident in pairs)

    def wait_for_calls(self, seconds: float) -> bool:
        """Wait until no call runs; return whether none does within so many seconds."""
        deadline, pause = time.monotonic() + seconds, 0.0001
        while self.pid == os.getpid() and self.num_calls:
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LAST_SLEEP_SECONDS)
        return True

    def vacate(self, verb: str) -> None:
        """Free the replicas for ``verb``: raise if results are wanted, else wait for the calls."""
        if self.pid == os.getpid():
            is_wanted = not self.why_closed and self._owner() is not None
            if is_wanted or threading.get_ident() in self._idents:
                raise ContextError(
                    f"{verb} was called while a map of {self.name} is open; take all its results "
                    f"first (list(...)), close it (close(), or a with statement), or drop it: a "
                    f"variable keeps it, also in the traceback of an exception"
                )
            self.end()
            self.await_calls(verb)
        self._step_lock.farms.pop(self, None)

    def await_calls(self, verb: str) -> None:
        """Wait until no call runs; raise CollectiveTimeoutError at the deadline."""
        seconds = self.timeout_seconds
        if not self.wait_for_calls(seconds):
            running = sorted(call for call in self.calls if call is not None)
            raise CollectiveTimeoutError(
                f"{verb} waited {seconds:g} s in vain for functions of a map of {self.name} to "
                f"return, for items {running}; set timeout_seconds of the strategy, or "
                f"DVKERNELS_TIMEOUT_SECONDS, if they need longer"
            )


foreign_threads.ENTRANCES.add(TaskFarm.serve.__code__)
foreign_threads.ENTRANCES.add(TaskFarm.help_out.__code__)
thread_limits.entrances[TaskFarm._serve.__code__] = False
thread_limits.entrances[TaskFarm.help_out.__code__] = True


def _nobody() -> None:
    """Stand for an owner that does not exist."""
