"""Rendezvous of the replicas of one step: the last to arrive performs the collective for all.

A step is one call of ``run``. Each replica thread arrives with a :class:`CollectiveCall`; the last
replica to arrive compares the calls and performs the collective for all replicas, while the others
wait at a gate. A failure in one replica ends the step in all of them: no replica is left waiting.

The code holds no lock, so an interrupt cannot leave one held. Shared state changes by single atomic
operations (an item of a list, ``dict.setdefault``, ``next`` of a counter), and each thread
publishes its own state before it reads that of the others, so the last to arrive sees everything.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from dvkernels import deadlines, user_errors
from dvkernels.errors import CollectiveMismatchError, CollectiveTimeoutError, ContextError
from dvkernels.profiler import debugging, tracing
from dvkernels.replicas import diagnostics
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.replicas.gates import Gates
from dvkernels.replicas.pending import PendingCall, PendingCalls
from dvkernels.replicas.progress_thread import ProgressThread

__all__: list[str] = []

NOWHERE = debugging.RunningReplica("", 0, 0)
_CHECK_SECONDS = 1.0  # how often a waiting replica checks that the others can still arrive


def num_gates(num_replicas: int) -> int:
    """Return the number of gates of a step."""
    return num_replicas + 2


def rest_gate(num_replicas: int) -> int:
    """Return the index of the gate that opens when a replica waits or leaves."""
    return num_replicas + 1


class Rendezvous:
    """State of one step: one call of ``run`` over ``num_replicas`` threads.

    A group of one needs no gates; larger groups need ``num_gates(num_replicas)`` closed ones.
    """

    __slots__ = (
        "_announce",
        "_arrivals",
        "_debug_state",
        "_echoes",
        "_failures",
        "_first_nap",
        "_first_replica",
        "_gates",
        "_has_ended",
        "_has_left",
        "_pending_calls",
        "_pid",
        "_requests",
        "_results",
        "_stalls",
        "_thread_idents",
        "_timeout",
        "closed",
        "errors",
        "failure",
        "label",
        "num_replicas",
        "perform",
    )

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
        self._first_replica = first_replica  # the global number of this process's replica 0
        self.failure: BaseException | None = None
        self.errors: dict[int, BaseException] = {}
        self.closed = False
        self._failures: dict[int, BaseException] = {}  # the first, as item 0
        self._echoes: list[BaseException] = []
        self._arrivals = itertools.count(1)
        self._has_left = [False] * num_replicas
        self._has_ended = has_ended  # by replica: its thread has ended, so it never arrives
        # None without a progress thread: asynchronous calls are then performed at once.
        self._pending_calls = (
            None if progress_thread is None else PendingCalls(num_replicas, progress_thread)
        )
        self._requests: list[CollectiveCall | None] = [None] * num_replicas
        self._results: Sequence[Any] = ()
        self._thread_idents: dict[int, int] = {}  # by replica; 0: it will never start
        self._timeout = timeout
        self._first_nap = min(timeout, _CHECK_SECONDS)
        self._pid = os.getpid()
        self.label = NOWHERE
        self._debug_state: debugging.DebugState | None = None
        self._stalls = itertools.count()
        # One gate per replica; one for the caller, which opens when all replicas have left; and one
        # that opens whenever a replica waits or leaves, and so releases the GIL.
        self._gates = gates

    # -- called by a replica ----------------------------------------------------------------------

    def observe(self, debug_state: debugging.DebugState, label: debugging.RunningReplica) -> None:
        """Report the events of this step, whose name is ``label``, in debug mode."""
        self._debug_state = debug_state
        self._first_nap = min(debug_state.stall_seconds, self._timeout, _CHECK_SECONDS)
        self.label = label

    def label_of(self, replica: int) -> debugging.RunningReplica:
        """Return the name of a replica of this step in messages."""
        return self.label._replace(replica=self.global_rank(replica))

    def global_rank(self, replica: int) -> int:
        """Return the number of a local replica among the replicas of all processes."""
        return self._first_replica + replica

    def enter(self, replica: int) -> bool:
        """Register this thread as a replica's; False if the step ended before it started."""
        return self._thread_idents.setdefault(replica, threading.get_ident()) != 0

    def meet(self, replica: int, request: CollectiveCall) -> Any:
        """Perform a collective with the other replicas; return this replica's result."""
        recording = tracing.active
        began = 0 if recording is None else time.perf_counter_ns()
        try:
            self._check_alive(request.verb)
            if self._debug_state is not None:
                self._debug_state.record(self.label_of(replica), str(request))
            gates = self._gates
            if gates is None:
                return self._perform_call([request])[0]
            gates.close(replica)
            try:
                self._requests[replica] = request
                is_last = next(self._arrivals) % self.num_replicas == 0
                if self.failure is not None:  # meanwhile; a later failure opens the gate
                    raise self._ended()
                pending_calls = self._pending_calls
                if True in self._has_left or (
                    pending_calls is not None
                    and pending_calls.has_awaited
                    and pending_calls.is_stuck(self._requests)
                ):
                    self._fail_deserted()
                elif is_last:
                    return self._complete(replica)
                else:
                    self._wait(replica)
            except BaseException as error:  # of the collective itself, or Ctrl-C at any point
                self.fail(error, None if isinstance(error, CollectiveMismatchError) else replica)
                raise
            if self.failure is not None:
                raise self._ended()
            return self._results[replica]
        finally:
            if recording is not None:
                recording.add(request.verb, "collective", began, {"call": str(request)})

    def _complete(self, replica: int) -> Any:
        """Perform the collective, release the other replicas, return this replica's result."""
        results = self._perform_call([request for request in self._requests if request is not None])
        if self.failure is not None:
            raise self._ended()
        self._results = results
        self._requests = [None] * self.num_replicas
        own = results[replica]
        self._release(replica)
        return own

    def issue(self, replica: int, request: CollectiveCall) -> PendingCall:
        """Issue an asynchronous collective without waiting; see :meth:`await_pending`.

        The k-th call that a replica issues is matched with the k-th of each other replica.
        """
        self._check_alive(request.verb)
        if self._debug_state is not None:
            self._debug_state.record(self.label_of(replica), str(request))
        pending_calls = self._pending_calls
        if pending_calls is None:
            alone = PendingCall(1)
            alone.results = self._perform_call([request])
            alone.done.open()
            return alone
        call_site = diagnostics.user_line(sys._getframe())
        pending = pending_calls.issue(replica, request, call_site)
        if True in self._has_left and pending_calls.is_deserted(replica, self._has_left):
            self._fail_deserted()
        if self.failure is not None:
            raise self._ended()
        if pending.is_complete:  # several replicas may see it; one job gets its claim
            pending_calls.progress_thread.submit(functools.partial(self._perform_pending, pending))
        return pending

    def _perform_pending(self, pending: PendingCall) -> None:
        """Perform an asynchronous collective, on the progress thread."""
        if not pending.claim.take():
            return
        try:
            if self.failure is None:
                requests = [request for request in pending.requests if request is not None]
                pending.results = self._perform_call(requests, pending.call_sites)
        except BaseException as error:
            self.fail(error)
        finally:
            pending.done.open()
            pending.is_over.open()

    def await_pending(self, replica: int, pending: PendingCall) -> Any:
        """Wait for an asynchronous collective; return this replica's result."""
        if not pending.done.is_open:
            self._check_alive("wait")
            pending_calls = self._pending_calls
            assert pending_calls is not None
            pending_calls.awaited[replica] = pending
            pending_calls.has_awaited = True
            if pending_calls.is_stuck(self._requests):
                self._fail_deserted()
            wait = pending.done.wait
            if not wait(self._first_nap) and not self._keep_waiting(
                replica, wait, lambda: pending_calls.will_be_performed(pending)
            ):
                missing = diagnostics.missing_replicas(pending.requests, self._first_replica)
                whom = f"replicas {missing} to issue" if missing else "a thread to carry out"
                self._fail_late(replica, f"{whom} {pending.requests[replica]}")
        if not pending.results:
            raise (
                self._ended()
                if self.failure is not None
                else ContextError("the step of this handle has ended")
            )
        return pending.results[replica]

    def _check_alive(self, verb: str) -> None:
        if self.closed:
            raise ContextError(
                f"{verb} was called through the context of a run that has ended; get the context "
                f"anew with get_replica_context() inside each run"
            )
        if self._is_forked():
            raise ContextError(
                f"{verb} was called in a process forked inside a step: the other replicas are not "
                f"here; call run again in the new process"
            )
        if self.failure is not None:
            raise self._ended()

    def _perform_call(
        self, requests: list[CollectiveCall], call_sites: Sequence[str] | None = None
    ) -> Sequence[Any]:
        first = requests[0]
        for other in requests[1:]:
            if other.verb != first.verb or other.terms != first.terms:
                calls = (
                    self._describe_replicas()
                    if call_sites is None
                    else diagnostics.describe_issued(requests, call_sites, self._first_replica)
                )
                raise diagnostics.mismatch_error(calls, first, other)
        payloads = [request.payload for request in requests]
        recording = tracing.active
        began = 0 if recording is None else time.perf_counter_ns()
        try:
            return (
                first.act(payloads) if self.perform is None else self.perform(first.act, payloads)
            )
        finally:
            if recording is not None:
                recording.add("reduce", "collective", began, {"call": str(first)})

    def _wait(self, replica: int) -> None:
        gates, nap = self._gates, self._first_nap
        assert gates is not None
        gates.open(rest_gate(self.num_replicas))
        # Nothing between the two: the replica that spins at the rest gate needs the GIL now, and
        # would sleep for it (a step of 4 KiB: 48 us became 85).
        opened = gates.wait(replica, nap) or self._keep_waiting(
            replica, functools.partial(gates.sleep, replica), lambda: self._has_all(replica)
        )
        if not opened:
            missing = diagnostics.missing_replicas(self._requests, self._first_replica)
            self._fail_late(replica, f"replicas {missing}: {self._describe_replicas()}")

    def _has_all(self, replica: int) -> bool:
        """Return whether all replicas have arrived at the collective a replica waits in."""
        return self._requests[replica] is None or None not in self._requests

    def _keep_waiting(
        self,
        replica: int,
        wait_on: Callable[[float], bool],
        has_all: Callable[[], bool],
    ) -> bool:
        """Go on waiting after the first nap, up to the deadline; without one once all are here.

        Checks regularly that the others can still arrive; in debug mode reports a stall.
        """
        debug_state = self._debug_state
        interval = (
            _CHECK_SECONDS
            if debug_state is None
            else min(debug_state.stall_seconds, _CHECK_SECONDS)
        )
        began = time.monotonic() - self._first_nap
        is_reported = debug_state is None
        while True:
            waited = time.monotonic() - began
            if debug_state is not None and not is_reported and waited >= debug_state.stall_seconds:
                is_reported = True
                if next(self._stalls) == 0:
                    threads = [self._thread_idents.get(k, 0) for k in range(self.num_replicas)]
                    debug_state.report_stall(
                        self.label_of(replica), self._describe_replicas(), threads
                    )
            self._end_if_dead()
            nap = interval
            if not has_all():
                if waited >= self._timeout:
                    return False
                nap = min(nap, self._timeout - waited)
            if wait_on(nap):
                return True

    def _end_if_dead(self) -> None:
        """End the step if the thread of a replica has ended during it."""
        for replica, is_dead in enumerate(self._has_ended):
            if is_dead and not self._has_left[replica]:
                name = self._first_replica + replica
                self.fail(ContextError(f"the thread of replica {name} has ended during the step"))
                self._has_left[replica] = True

    def _release(self, replica: int) -> None:
        assert self._gates is not None
        rest = rest_gate(self.num_replicas)
        self._gates.close(rest)
        *others, last = (other for other in range(self.num_replicas) if other != replica)
        for other in others:
            self._gates.open(other)
        self._gates.open_and_let_run(last, rest)

    def _fail_deserted(self) -> None:
        self.fail(diagnostics.desertion_error(self._describe_replicas()))

    def _fail_late(self, replica: int, awaited: str) -> None:
        self.fail(diagnostics.timeout_error(self._first_replica + replica, self._timeout, awaited))

    def leave(self, replica: int) -> None:
        """Record that this replica's function has ended."""
        self._has_left[replica] = True
        pending_calls = self._pending_calls
        is_waited_for = (
            pending_calls is not None and pending_calls.calls and pending_calls.is_behind(replica)
        ) or self._requests.count(None) < self.num_replicas
        if is_waited_for and self.failure is None:
            self._fail_deserted()
        if self._gates is not None and not self._is_forked():
            done, rest = self.num_replicas, rest_gate(self.num_replicas)
            self._gates.open(rest if False in self._has_left else done)

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
        wait: Callable[[int, float], bool] | None = None
        if patient and self._gates is not None:
            wait = self._gates.wait
        deadline = None
        while False in self._has_left and not self._is_forked():
            if wait is not None and self._gates is not None:
                wait(self.num_replicas, _CHECK_SECONDS)
                wait = self._gates.sleep
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
                name = self._first_replica + replica
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
        return diagnostics.combined_error(self.errors, self.num_replicas, self._first_replica)

    def _ended(self) -> BaseException:
        echo = diagnostics.echo_of(self.failure)
        self._echoes.append(echo)
        return echo

    def _is_consequence(self, error: BaseException) -> bool:
        """Return whether an error is caused by, or was raised while handling, the failure."""
        return user_errors.is_caused_by(error, self._echoes)

    def _describe_replicas(self) -> str:
        return diagnostics.describe_replicas(
            self._requests,
            self._pending_calls,
            self._has_left,
            self._thread_idents,
            self._first_replica,
        )
