"""Rendezvous of the replicas of one step: the last to arrive performs the collective for all.

Each replica thread arrives with a :class:`CollectiveCall`; the last replica to arrive compares the
calls and performs the collective for all replicas, while the others wait at a gate. Each thread
publishes its own state before it reads that of the others, so the last to arrive sees everything:
see ``step_state.py``.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from dvkernels.errors import CollectiveMismatchError, ContextError
from dvkernels.profiler import collective_hooks
from dvkernels.profiler.collective_hooks import CollectiveEvent
from dvkernels.replicas import diagnostics, observed_calls
from dvkernels.replicas.collective_call import CollectiveCall
from dvkernels.replicas.pending import PendingCall, PendingCalls
from dvkernels.replicas.step_state import StepState, rest_gate

__all__: list[str] = []


class Rendezvous(StepState):
    """Collectives of the replicas of one step."""

    __slots__ = ()

    def meet(self, replica: int, request: CollectiveCall, is_observed: bool = False) -> Any:
        """Perform a collective with the other replicas; return this replica's result."""
        if collective_hooks.active is not None and not is_observed:
            return observed_calls.meet(self, replica, request, Rendezvous.meet)
        self.check_alive(request.verb)
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

    def _complete(self, replica: int) -> Any:
        """Perform the collective, release the other replicas, return this replica's result."""
        results = self._perform_call([request for request in self._requests if request is not None])
        if self.failure is not None:
            raise self._ended()
        self._results = results
        self._performer = replica
        self._requests = [None] * self.num_replicas
        own = results[replica]
        self._release(replica)
        return own

    def issue(
        self, replica: int, request: CollectiveCall, event: CollectiveEvent | None = None
    ) -> PendingCall:
        """Issue an asynchronous collective without waiting; see :meth:`await_pending`.

        The k-th call that a replica issues is matched with the k-th of each other replica.
        """
        if collective_hooks.active is not None and event is None:
            return observed_calls.issue(self, replica, request, Rendezvous.issue)
        self.check_alive(request.verb)
        if self._progress_thread is None:
            alone = PendingCall(1)
            alone.events[0] = event
            alone.results = self._perform_call([request])
            alone.done.open()
            return alone
        pending_calls = self._pending_calls
        if pending_calls is None:  # several replicas may see it; all take the first that is made
            made = PendingCalls(self.num_replicas, self._progress_thread)
            pending_calls = self._made_pending_calls.setdefault(0, made)
            self._pending_calls = pending_calls
        call_site = diagnostics.user_line(sys._getframe())
        pending = pending_calls.issue(replica, request, call_site)
        pending.events[replica] = event
        if True in self._has_left and pending_calls.is_deserted(replica, self._has_left):
            self._fail_deserted()
        if self.failure is not None:
            raise self._ended()
        if pending.is_complete:  # several replicas may see it; one job gets its claim
            pending_calls.progress_thread.carry(functools.partial(self._perform_pending, pending))
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

    def await_pending(self, replica: int, pending: PendingCall, is_observed: bool = False) -> Any:
        """Wait for an asynchronous collective; return this replica's result."""
        event = pending.events[replica]
        if event is not None and not is_observed:
            pending.events[replica] = None  # it may be awaited again
            again = functools.partial(Rendezvous.await_pending, self, replica, pending, True)
            return observed_calls.await_pending(self, replica, event, again)
        if not pending.done.is_open:
            self.check_alive("wait")
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
                missing = diagnostics.missing_replicas(pending.requests, self.first_replica)
                whom = f"replicas {missing} to issue" if missing else "a thread to carry out"
                self._fail_late(replica, f"{whom} {pending.requests[replica]}")
        if not pending.results:
            raise (
                self._ended()
                if self.failure is not None
                else ContextError("the step of this handle has ended")
            )
        return pending.results[replica]

    def check_alive(self, verb: str) -> None:
        """Raise if the step has ended or failed, or if this process was forked in it."""
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
                    else diagnostics.describe_issued(requests, call_sites, self.first_replica)
                )
                raise diagnostics.mismatch_error(calls, first, other)
        payloads = [request.payload for request in requests]
        if collective_hooks.active is not None:
            return observed_calls.perform(self, first, payloads, call_sites is not None)
        return first.act(payloads) if self.perform is None else self.perform(first.act, payloads)

    def _wait(self, replica: int) -> None:
        gates, nap = self._gates, self._first_nap
        assert gates is not None
        opened = gates.wait(
            replica, nap, opening=rest_gate(self.num_replicas)
        ) or self._keep_waiting(
            replica, functools.partial(gates.sleep, replica), lambda: self._has_all(replica)
        )
        if not opened:
            missing = diagnostics.missing_replicas(self._requests, self.first_replica)
            self._fail_late(replica, f"replicas {missing}: {self._describe_replicas()}")
        elif not gates.spins:
            self._release_after(replica)

    def _has_all(self, replica: int) -> bool:
        """Return whether all replicas have arrived at the collective a replica waits in."""
        return self._requests[replica] is None or None not in self._requests

    def _keep_waiting(
        self, replica: int, wait_on: Callable[[float], bool], has_all: Callable[[], bool]
    ) -> bool:
        """Go on waiting after the first nap, up to the deadline; without one once all are here.

        Checks regularly that the others can still arrive; in debug mode reports a stall.
        """
        debug_state = self._debug_state
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
            nap = self._check_seconds
            if not has_all():
                if waited >= self._timeout:
                    return False
                nap = min(nap, self._timeout - waited)
            if wait_on(nap):
                return True

    def _release(self, replica: int) -> None:
        gates = self._gates
        assert gates is not None
        if not gates.spins:
            self._release_after(-1)
            return
        rest = rest_gate(self.num_replicas)
        gates.close(rest)
        *others, last = (other for other in range(self.num_replicas) if other != replica)
        for other in others:
            gates.open(other)
        gates.open_and_let_run(last, rest)

    def _release_after(self, replica: int) -> None:
        """Release the next replica that waits: each that wakes is to wake the next.

        All woken at once would queue for the GIL, and each of them sleep a second time.
        """
        following = replica + 1 + (replica + 1 == self._performer)
        if following < self.num_replicas:
            assert self._gates is not None
            self._gates.open(following)

    def _fail_late(self, replica: int, awaited: str) -> None:
        self.fail(diagnostics.timeout_error(self.first_replica + replica, self._timeout, awaited))
