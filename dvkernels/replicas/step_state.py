"""State of one step: its replicas enter it, fail and leave, and then it ends.

A step is one call of ``run``. A failure in one replica ends it in all of them: none is left
waiting.

The code holds no lock, so an interrupt cannot leave one held. Shared state changes by single atomic
operations (an item of a list, ``dict.setdefault``, ``next`` of a counter), and each thread
publishes its own state before it reads that of the others.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from dvkernels import deadlines, user_errors
from dvkernels.errors import CollectiveTimeoutError, ContextError
from dvkernels.profiler import debugging
from dvkernels.replicas import diagnostics
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.replicas.gates import Gates
from dvkernels.replicas.pending import PendingCalls
from dvkernels.replicas.progress_thread import ProgressThread

__all__: list[str] = []

_NOWHERE = debugging.RunningReplica("", 0, 0)
_CHECK_SECONDS = 1.0  # how often a waiting replica checks that the others can still arrive


def num_gates(num_replicas: int) -> int:
    """Return the number of gates of a step."""
    return num_replicas + 2


def rest_gate(num_replicas: int) -> int:
    """Return the index of the gate that opens when a replica waits or leaves."""
    return num_replicas + 1


class StepState:
    """State of one step: one call of ``run`` over ``num_replicas`` threads.

    A group of one needs no gates; larger groups need ``num_gates(num_replicas)`` closed ones.
    """

    item_index: int | None = None  # of the item in a function of map, which has no step

    __slots__ = (
        "_announce", "_arrivals", "_check_seconds", "_debug_state", "_echoes", "_failures",
        "_first_nap", "_gates", "_has_ended", "_has_left", "_made_pending_calls",
        "_pending_calls", "_performer", "_pid", "_progress_thread", "_requests", "_results",
        "_stalls", "_thread_idents", "_timeout", "closed", "errors", "failure",
        "first_replica", "label", "num_replicas", "perform",
    )  # fmt: skip

    def __init__(
        self,
        num_replicas: int,
        gates: Gates | None = None,
        timeout: float = deadlines.DEFAULT_TIMEOUT_SECONDS,
        progress_thread: ProgressThread | None = None,
        first_replica: int = 0,
        announce: Callable[[BaseException], None] | None = None,
        has_ended: Sequence[bool] = (),
    ) -> None:
        self.num_replicas = num_replicas
        # Called with ``act`` and the payloads of all replicas, in place of ``act(payloads)``.
        self.perform: Callable[..., Sequence[Any]] | None = None
        self._announce = announce  # announces to other processes that this step has failed
        self.first_replica = first_replica  # the global number of this process's replica 0
        self.failure: BaseException | None = None
        self.errors: dict[int, BaseException] = {}
        self.closed = False
        self._failures: dict[int, BaseException] = {}  # the first, as item 0
        self._echoes: list[BaseException] = []
        self._arrivals = itertools.count(1)
        self._has_left = [False] * num_replicas
        self._has_ended = has_ended  # by replica: its thread has ended, so it never arrives
        # None: asynchronous calls are performed at once.
        self._progress_thread = progress_thread
        self._pending_calls: PendingCalls | None = None  # None until the first asynchronous call
        self._made_pending_calls: dict[int, PendingCalls] = {}  # the first, as item 0
        self._requests: list[CollectiveCall | None] = [None] * num_replicas
        self._results: Sequence[Any] = ()
        self._performer = 0  # the replica that performed the latest collective
        self._thread_idents: dict[int, int] = {}  # by replica; 0: it will never start
        self._timeout = timeout
        self._first_nap = min(timeout, _CHECK_SECONDS)
        self._pid = os.getpid()
        self._check_seconds = _CHECK_SECONDS
        self.label = _NOWHERE
        self._debug_state: debugging.DebugState | None = None
        self._stalls = itertools.count()
        # One gate per replica; one for the caller, which opens when all replicas have left; and one
        # that opens whenever a replica waits or leaves, and so releases the GIL.
        self._gates = gates

    # -- called by a replica ----------------------------------------------------------------------

    def observe(
        self, debug_state: debugging.DebugState | None, label: debugging.RunningReplica
    ) -> None:
        """Name this step ``label`` in reports; report its stalls in debug mode."""
        self.label = label
        if debug_state is not None:
            self._debug_state = debug_state
            self._first_nap = min(debug_state.stall_seconds, self._timeout, _CHECK_SECONDS)
            self._check_seconds = min(debug_state.stall_seconds, _CHECK_SECONDS)

    def label_of(self, replica: int) -> debugging.RunningReplica:
        """Return the name of a replica of this step in messages."""
        return self.label._replace(replica=self.global_rank(replica))

    def global_rank(self, replica: int) -> int:
        """Return the number of a local replica among the replicas of all processes."""
        return self.first_replica + replica

    def enter(self, replica: int) -> bool:
        """Register this thread as a replica's; False if the step ended before it started."""
        return self._thread_idents.setdefault(replica, threading.get_ident()) != 0

    def leave(self, replica: int) -> int:
        """Record that this replica's function has ended; return the gate to open, or -1.

        Its thread opens the gate while it waits for the next task; replica 0's, which has called
        ``run``, waits in :meth:`settle`.
        """
        self._has_left[replica] = True
        pending_calls = self._pending_calls
        is_waited_for = (
            pending_calls is not None and pending_calls.calls and pending_calls.is_behind(replica)
        ) or self._requests.count(None) < self.num_replicas
        if is_waited_for and self.failure is None:
            self._fail_deserted()
        if replica == 0 or self._gates is None or self._is_forked():
            return -1
        return rest_gate(self.num_replicas) if False in self._has_left else self.num_replicas

    def _fail_deserted(self) -> None:
        self.fail(diagnostics.desertion_error(self._describe_replicas()))

    def _end_if_dead(self) -> None:
        """End the step if the thread of a replica has ended during it."""
        for replica, is_dead in enumerate(self._has_ended):
            if is_dead and not self._has_left[replica]:
                name = self.first_replica + replica
                self.fail(ContextError(f"the thread of replica {name} has ended during the step"))
                self._has_left[replica] = True

    # -- called by any thread ---------------------------------------------------------------------

    def fail(self, error: BaseException, replica: int | None = None) -> None:
        """End the step in all replicas; the first of several failures is kept.

        ``replica`` is the one whose code raised ``error``; None if no replica's did, as for a
        mismatch.
        """
        self.failure = self._failures.setdefault(0, error)
        if replica is None:
            self._echoes.append(error)
        elif not self._is_consequence(error):
            self.errors.setdefault(replica, error)
        if self._is_forked():
            return
        if self._gates is not None:
            for gate in range(self.num_replicas):
                self._gates.open(gate)
        if self._pending_calls is not None:
            self._pending_calls.wake()
        if self._announce is not None:  # which announces the same failure only once
            self._announce(self.failure)

    def settle(self, started: bool) -> None:
        """Wait until every replica has left; an interrupt ends their collectives meanwhile.

        User code cannot be stopped from outside, so this waits as long as it runs; ``run`` raises
        the interrupt afterwards. Unless all replicas have been ``started``, those that have not
        entered yet never will.
        """
        interrupt: BaseException | None = None
        while True:
            try:
                if interrupt is not None:
                    self.fail(interrupt, 0)
                for replica in range(self.num_replicas):
                    if replica == 0 or not started:
                        self._withdraw(replica)
                self._wait_for_all(patient=interrupt is None)
                pending_calls = self._pending_calls
                if pending_calls is not None and pending_calls.calls and not self._is_forked():
                    pending_calls.drain(lambda: self.failure is not None, self.fail)
                return
            except BaseException as error:
                interrupt = error

    def _withdraw(self, replica: int) -> None:
        """Mark a replica as having left unless its thread is running it."""
        if replica == 0 or self._thread_idents.setdefault(replica, 0) == 0:
            self._has_left[replica] = True

    def _wait_for_all(self, patient: bool) -> None:
        gates, done = self._gates, self.num_replicas
        rest, deadline = rest_gate(self.num_replicas), None
        while False in self._has_left and not self._is_forked():
            if patient and gates is not None:
                gates.wait(done, _CHECK_SECONDS, opening=rest)
                gates.close(done)  # it may have been opened late, by a thread of the step before
            else:  # after an interrupt the gate may be in any state
                time.sleep(0.001)
            if False in self._has_left:
                self._end_if_dead()
                now = time.monotonic()
                deadline = deadline or now + self._timeout
                if now > deadline:
                    self._give_up()

    def _give_up(self) -> None:
        """Stop waiting for replicas that have not begun, because their threads do not run."""
        for replica in range(self.num_replicas):
            if not self._has_left[replica] and replica not in self._thread_idents:
                self._withdraw(replica)
                name = self.first_replica + replica
                if self._has_left[replica]:
                    self.fail(
                        CollectiveTimeoutError(
                            f"replica {name} has not begun within {self._timeout:g} s: its thread "
                            f"does not run"
                        )
                    )

    def _is_forked(self) -> bool:
        """Return whether this process was forked during the step, so has no other replicas.

        Locks that their threads held at that moment, Numba's too, are never released here.
        """
        return self._pid != os.getpid()

    def end(self) -> None:
        """Close the step, and drop all errors, whose tracebacks refer to it."""
        self.closed = True
        if False in self._has_left:  # an interrupt struck on entry to settle
            self.fail(KeyboardInterrupt(), 0)
            self.settle(started=False)
        self.failure = None
        self._failures = {}
        self.errors = {}
        self._echoes = []
        if self._pending_calls is not None:
            self._pending_calls.clear()

    def outcome(self, failure: BaseException) -> BaseException:
        """Return the error that ``run`` raises: that of the lowest replica, others as notes."""
        if not self.errors:
            return failure
        return diagnostics.combined_error(self.errors, self.num_replicas, self.first_replica)

    def _ended(self) -> BaseException:
        echo = diagnostics.echo_of(self.failure)
        self._echoes.append(echo)
        return echo

    def _is_consequence(self, error: BaseException) -> bool:
        """Return whether an error is caused by, or was raised while handling, the failure."""
        return user_errors.is_caused_by(error, self._echoes)

    def waits_of(self, replica: int) -> tuple[str, list[int]]:
        """Return the call that a replica is in, "" for none, and the replicas it waits for."""
        requests: list[CollectiveCall | None] = self._requests
        if requests[replica] is None and self._pending_calls is not None:
            pending = self._pending_calls.awaited[replica]
            if pending is not None and not pending.done.is_open:
                requests = pending.requests
        request = requests[replica]
        if request is None:
            return "", []
        return str(request), diagnostics.missing_replicas(requests, self.first_replica)

    def _describe_replicas(self) -> str:
        return diagnostics.describe_replicas(
            self._requests,
            self._pending_calls,
            self._has_left,
            self._thread_idents,
            self.first_replica,
        )
