"""Where the replicas of one step meet: they agree, one of them acts for all, all go on.

A step belongs to one call of ``run``. Each replica thread brings a :class:`CollectiveCall`; the
last to come compares them and performs the collective for everybody, while the others wait at a
gate. Whatever goes wrong in one replica ends the step in all: nobody is left waiting.

No lock is held here, so none can be left taken by an interrupt: what several threads change is
changed by one atomic operation (an item of a list, ``dict.setdefault``, ``next`` of a counter), and
each says what it does before it looks at what the others do, so that the last one sees all.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dvkernels import deadlines, nest, user_errors
from dvkernels.errors import CollectiveMismatchError, CollectiveTimeoutError, ContextError
from dvkernels.profiler import debugging, tracing
from dvkernels.replicas.gates import Gates
from dvkernels.replicas.progress_thread import ProgressThread
from dvkernels.threads.thread import Latch

__all__: list[str] = []

NOWHERE = debugging.RunningReplica("", 0, 0)
_PACKAGE = str(Path(__file__).parent.parent) + os.sep
_LOOK_SECONDS = 1.0  # how often who waits asks whether the others can still come


def num_gates(num_replicas: int) -> int:
    """Return how many gates a step needs."""
    return num_replicas + 2


def rest_gate(num_replicas: int) -> int:
    """Return the number of the gate that opens when a replica comes to rest."""
    return num_replicas + 1


class StepEnded(CollectiveMismatchError):
    """A collective was refused because the step has already failed, here or elsewhere."""


_OUR_OWN = (CollectiveMismatchError, CollectiveTimeoutError, StepEnded)


class Same(int):
    """The ``id`` of an object that all replicas must mean; not printed."""

    __slots__ = ()

    def __str__(self) -> str:
        return ""


class CollectiveCall(NamedTuple):
    """What one replica asks for."""

    verb: str  # the user's word: all_reduce, barrier, Variable.assign
    terms: tuple[Any, ...]  # what all replicas must agree on: op, structure, shapes, dtypes
    payload: Any  # what this replica brings
    act: Callable[[list[Any]], Sequence[Any]]  # all payloads -> one result per replica

    def __str__(self) -> str:
        terms = (
            nest.words_of(term) if nest.is_structure(term) else user_errors.text_of(term)
            for term in self.terms
            if term is not None
        )
        return f"{self.verb}({', '.join(term for term in terms if term)})"


class PendingCall:
    """A collective that the replicas issue one by one, and that is carried out when all have."""

    __slots__ = ("_claims", "done", "is_over", "places", "requests", "results")

    def __init__(self, num_replicas: int) -> None:
        self.requests: list[CollectiveCall | None] = [None] * num_replicas
        self.places = [""] * num_replicas
        self.results: Sequence[Any] = ()
        self.done = Latch()  # nobody need wait any more: there are results, or the step has failed
        self.is_over = Latch()  # whoever carried it out is done with it
        self._claims = [None]

    @property
    def is_complete(self) -> bool:
        """Whether all replicas have issued it."""
        return None not in self.requests

    def claim(self) -> bool:
        """Take it, to carry it out or to have nobody do so; False: somebody has."""
        try:
            self._claims.pop()
        except IndexError:
            return False
        return True


class Rendezvous:
    """One call of ``run`` over ``num_replicas`` threads.

    A group of one meets nobody and needs no gates; others need ``num_gates`` closed ones.
    """

    __slots__ = (
        "_announce",
        "_arrivals",
        "_awaited",
        "_carrier",
        "_dead",
        "_echoes",
        "_failures",
        "_first",
        "_first_nap",
        "_gates",
        "_gone",
        "_has_awaited",
        "_issued",
        "_pending",
        "_pid",
        "_requests",
        "_results",
        "_seats",
        "_stalls",
        "_timeout",
        "_watch",
        "closed",
        "errors",
        "failure",
        "num_replicas",
        "perform",
        "place",
    )

    def __init__(
        self,
        num_replicas: int,
        gates: Gates | None = None,
        timeout: float = deadlines.DEFAULT_TIMEOUT_SECONDS,
        carrier: ProgressThread | None = None,
        first_replica: int = 0,
        announce: Callable[[BaseException], None] | None = None,
        dead: Sequence[bool] = (),
    ) -> None:
        self.num_replicas = num_replicas
        # Called with what is to be done for all replicas, and what they brought.
        self.perform: Callable[..., Sequence[Any]] | None = None
        self._announce = announce  # tells other processes that this step has failed
        self._first = first_replica  # what the first of these threads is called in messages
        self.failure: BaseException | None = None
        self.errors: dict[int, BaseException] = {}
        self.closed = False
        self._failures: dict[int, BaseException] = {}  # the first, as item 0
        self._echoes: list[BaseException] = []
        self._arrivals = itertools.count(1)
        self._gone = [False] * num_replicas
        self._dead = dead  # which replicas' threads have ended: they never come to anything
        self._carrier = carrier  # of what is issued; without one it is carried out at once
        self._issued = [0] * num_replicas
        self._pending: dict[int, PendingCall] = {}
        # What each replica waits, or has waited, for.
        self._awaited: list[PendingCall | None] = [None] * num_replicas
        self._has_awaited = False
        self._requests: list[CollectiveCall | None] = [None] * num_replicas
        self._results: Sequence[Any] = ()
        self._seats: dict[int, int] = {}  # the thread of each replica; 0: it will never start
        self._timeout = timeout
        self._first_nap = min(timeout, _LOOK_SECONDS)
        self._pid = os.getpid()
        self.place = NOWHERE
        self._watch: debugging.DebugState | None = None
        self._stalls = itertools.count()
        # One gate a replica; one for the caller, opened when all have left; and one that opens
        # whenever a replica comes to rest, so that another may have the interpreter.
        self._gates = gates

    # -- in a replica ---------------------------------------------------------------------------

    def observe(self, watch: debugging.DebugState, place: debugging.RunningReplica) -> None:
        """Report to a watch what happens in this step, which is ``place``."""
        self._watch = watch
        self._first_nap = min(watch.stall_seconds, self._timeout, _LOOK_SECONDS)
        self.place = place

    def place_of(self, replica: int) -> debugging.RunningReplica:
        """Return what messages call a replica of this step."""
        return self.place._replace(replica=self.number_of(replica))

    def number_of(self, replica: int) -> int:
        """Return the number of a replica of this process among those of all."""
        return self._first + replica

    def enter(self, replica: int) -> bool:
        """Say that this thread runs a replica; False: the step ended before it could start."""
        return self._seats.setdefault(replica, threading.get_ident()) != 0

    def meet(self, replica: int, request: CollectiveCall) -> Any:
        """Bring a request, wait for the others, return this replica's result."""
        recording = tracing.active
        began = 0 if recording is None else time.perf_counter_ns()
        try:
            self._check_alive(request.verb)
            if self._watch is not None:
                self._watch.record(self.place_of(replica), str(request))
            gates = self._gates
            if gates is None:
                return self._act([request])[0]
            gates.close(replica)
            try:
                self._requests[replica] = request
                is_last = next(self._arrivals) % self.num_replicas == 0
                if self.failure is not None:  # meanwhile; after this, it opens the gate
                    raise self._ended()
                if True in self._gone or (self._has_awaited and self._is_stuck()):
                    self._end_deserted()
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
        """Act for all replicas, let them go, and return this replica's result."""
        results = self._act([request for request in self._requests if request is not None])
        if self.failure is not None:
            raise self._ended()
        self._results = results
        self._requests = [None] * self.num_replicas
        own = results[replica]
        self._let_go(replica)
        return own

    def issue(self, replica: int, request: CollectiveCall) -> PendingCall:
        """Bring a request without waiting for the others; see :meth:`await_pending`.

        The k-th request that a replica issues meets the k-th of each other one.
        """
        self._check_alive(request.verb)
        if self._watch is not None:
            self._watch.record(self.place_of(replica), str(request))
        if self._carrier is None:
            alone = PendingCall(1)
            alone.results = self._act([request])
            alone.done.open()
            return alone
        number = self._issued[replica]
        pending = self._pending.get(number) or self._pending.setdefault(
            number, PendingCall(self.num_replicas)
        )
        pending.places[replica] = user_line(sys._getframe())
        pending.requests[replica] = request
        self._issued[replica] = number + 1
        if any(gone and self._issued[k] <= number for k, gone in enumerate(self._gone)):
            self._end_deserted()
        if self.failure is not None:
            raise self._ended()
        if pending.is_complete:  # several may see it: it is carried out once
            self._carrier.carry(functools.partial(self._carry_out, pending))
        return pending

    def _carry_out(self, pending: PendingCall) -> None:
        """Act for all replicas, on the carrier's thread."""
        if not pending.claim():
            return
        try:
            if self.failure is None:
                requests = [one for one in pending.requests if one is not None]
                pending.results = self._act(requests, pending.places)
        except BaseException as error:
            self.fail(error)
        finally:
            pending.done.open()
            pending.is_over.open()

    def await_pending(self, replica: int, pending: PendingCall) -> Any:
        """Return this replica's result of what was issued, when it has been carried out."""
        if not pending.done.is_open:
            self._check_alive("wait")
            self._awaited[replica] = pending
            self._has_awaited = True
            if self._is_stuck():
                self._end_deserted()
            wait = pending.done.wait
            if not wait(self._first_nap) and not self._endure(
                replica, wait, lambda: self._is_carried(pending)
            ):
                missing = self._missing(pending.requests)
                whom = f"replicas {missing} to issue" if missing else "a thread to carry out"
                self.fail(
                    CollectiveTimeoutError(
                        f"replica {self._first + replica} waited {self._timeout:g} s in vain for "
                        f"{whom} {pending.requests[replica]}; set DVKERNELS_TIMEOUT_SECONDS if "
                        f"they need longer"
                    )
                )
        if not pending.results:
            raise (
                self._ended()
                if self.failure is not None
                else ContextError("the step of this handle has ended")
            )
        return pending.results[replica]

    def _is_carried(self, pending: PendingCall) -> bool:
        """Return whether all have issued it, and a thread is there to carry it out."""
        return pending.is_complete and self._carrier is not None and self._carrier.is_served

    def _is_stuck(self) -> bool:
        """Return whether all replicas wait, some of them for calls that no other can issue."""
        met = tuple(self._requests)  # first: who has come here has issued all it could before
        incomplete = 0
        for request, pending in zip(met, self._awaited, strict=True):
            if request is None and pending is not None and not pending.done.is_open:
                incomplete += not pending.is_complete
        return 0 < incomplete == met.count(None)

    def _drain(self) -> None:
        """Wait for what the carrier is at: it reads arrays that are the caller's again after.

        Where the step has failed, what it has not begun with it never will.
        """
        if self._carrier is None or self._is_forked():
            return
        for pending in tuple(self._pending.values()):
            while pending.is_complete and not pending.is_over.is_open:
                if self.failure is not None and pending.claim():
                    break
                if not pending.is_over.wait(_LOOK_SECONDS) and not self._carrier.is_served:
                    if self.failure is not None:
                        break
                    self.fail(ContextError("the thread that carries out collectives has ended"))

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

    def _act(
        self, requests: list[CollectiveCall], places: Sequence[str] | None = None
    ) -> Sequence[Any]:
        first = requests[0]
        for other in requests[1:]:
            if other.verb != first.verb or other.terms != first.terms:
                if places is None:
                    said = self._who_is_where()
                else:
                    said = "; ".join(
                        f"replica {replica} called {request} at {place}"
                        for replica, (request, place) in enumerate(
                            zip(requests, places, strict=True), self._first
                        )
                    )
                remedy = "every replica must call the same collectives in the same order, with "
                remedy += "the same shapes and dtypes"
                if str(other) == str(first):
                    remedy = "they mean different objects that look alike; make them once, outside "
                    remedy += "of run, or all replicas together in it"
                raise CollectiveMismatchError(f"the replicas disagree: {said}; {remedy}")
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
        # Nothing between the two: whoever stood aside for this replica wants the interpreter's lock
        # now, and would sleep for it (a step of 4 KiB: 48 us became 85).
        opened = gates.wait(replica, nap) or self._endure(
            replica, functools.partial(gates.sleep, replica), lambda: self._has_all(replica)
        )
        if not opened:
            missing = self._missing(self._requests)
            self.fail(
                CollectiveTimeoutError(
                    f"replica {self._first + replica} waited {self._timeout:g} s in vain for "
                    f"replicas {missing}: {self._who_is_where()}; set "
                    f"DVKERNELS_TIMEOUT_SECONDS if they need longer"
                )
            )

    def _has_all(self, replica: int) -> bool:
        """Return whether all have come to what a replica waits for, or have done so before."""
        return self._requests[replica] is None or None not in self._requests

    def _missing(self, requests: Sequence[CollectiveCall | None]) -> list[int]:
        return [k for k, request in enumerate(requests, self._first) if request is None]

    def _endure(
        self,
        replica: int,
        go_on: Callable[[float], bool],
        has_all: Callable[[], bool],
    ) -> bool:
        """Wait on, behind the first nap, until the deadline; once all have come, without one.

        Asks now and then whether the others can still come; in debug mode says so when it lasts.
        """
        watch = self._watch
        soon = _LOOK_SECONDS if watch is None else min(watch.stall_seconds, _LOOK_SECONDS)
        began = time.monotonic() - self._first_nap
        is_told = watch is None
        while True:
            waited = time.monotonic() - began
            if watch is not None and not is_told and waited >= watch.stall_seconds:
                is_told = True
                if next(self._stalls) == 0:
                    threads = [self._seats.get(k, 0) for k in range(self.num_replicas)]
                    watch.report_stall(self.place_of(replica), self._who_is_where(), threads)
            self._end_if_dead()
            nap = soon
            if not has_all():
                if waited >= self._timeout:
                    return False
                nap = min(nap, self._timeout - waited)
            if go_on(nap):
                return True

    def _end_if_dead(self) -> None:
        """End the step if the thread of a replica has ended in the midst of it."""
        for replica, is_dead in enumerate(self._dead):
            if is_dead and not self._gone[replica]:
                name = self._first + replica
                self.fail(ContextError(f"the thread of replica {name} has ended during the step"))
                self._gone[replica] = True

    def _let_go(self, replica: int) -> None:
        assert self._gates is not None
        rest = rest_gate(self.num_replicas)
        self._gates.close(rest)
        *others, last = (other for other in range(self.num_replicas) if other != replica)
        for other in others:
            self._gates.open(other)
        self._gates.open_and_let_run(last, rest)

    def _end_deserted(self) -> None:
        self.fail(
            CollectiveMismatchError(
                f"a replica returned while others wait in a collective, or each waits for another: "
                f"{self._who_is_where()}; every replica must call the same collectives in the same "
                f"order"
            )
        )

    def leave(self, replica: int) -> None:
        """Say that this replica's function is over."""
        self._gone[replica] = True
        is_waited_for = (
            self._issued[replica] < len(self._pending)
            or self._requests.count(None) < self.num_replicas
        )
        if is_waited_for and self.failure is None:
            self._end_deserted()
        if self._gates is not None and not self._is_forked():
            done, rest = self.num_replicas, rest_gate(self.num_replicas)
            self._gates.open(rest if False in self._gone else done)

    # -- from anywhere --------------------------------------------------------------------------

    def fail(self, error: BaseException, replica: int | None = None) -> None:
        """End the step in all replicas; of several failures the first is kept.

        ``replica`` is the one that raised ``error`` by itself; None if nobody did, as for a
        disagreement.
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
        for pending in tuple(self._pending.values()):
            pending.done.open()
        if self._announce is not None:  # of the same failure once, however often it is told
            self._announce(self.failure)

    def settle(self, started: bool) -> None:
        """Return when every replica has left; an interrupt ends the collectives meanwhile.

        User code cannot be stopped from outside, so this waits for it however long it takes; the
        interrupt is raised by ``run`` afterwards. If not all replicas have been ``started``, those
        that have not entered yet never will.
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
                self._drain()
                return
            except BaseException as error:
                interrupt = error

    def _withdraw(self, replica: int) -> None:
        """Count a replica as gone unless its thread is at work."""
        if replica == 0 or self._seats.setdefault(replica, 0) == 0:
            self._gone[replica] = True

    def _wait_for_all(self, patient: bool) -> None:
        wait: Callable[[int, float], bool] | None = None
        if patient and self._gates is not None:
            wait = self._gates.wait
        latest = None
        while False in self._gone and not self._is_forked():
            if wait is not None and self._gates is not None:
                wait(self.num_replicas, _LOOK_SECONDS)
                wait = self._gates.sleep
            else:  # after an interrupt the gate may be in any state
                time.sleep(0.001)
            if False in self._gone:
                self._end_if_dead()
                now = time.monotonic()
                latest = latest or now + self._timeout
                if now > latest:
                    self._give_up()

    def _give_up(self) -> None:
        """Wait no longer for replicas that have not begun: their threads do not run."""
        for replica in range(self.num_replicas):
            if not self._gone[replica] and replica not in self._seats:
                self._withdraw(replica)
                name = self._first + replica
                if self._gone[replica]:
                    self.fail(
                        CollectiveTimeoutError(
                            f"replica {name} has not begun within {self._timeout:g} s: its thread "
                            f"does not run"
                        )
                    )

    def _is_forked(self) -> bool:
        """Return whether this is a process forked inside the step, without the other replicas.

        Locks that their threads held at that moment, Numba's too, will never be free here.
        """
        return self._pid != os.getpid()

    def end(self) -> None:
        """Refuse what may still come, and drop all errors: their tracebacks refer to this step."""
        self.closed = True
        if False in self._gone:  # an interrupt struck at the door of settle
            self.fail(KeyboardInterrupt(), 0)
            self.settle(started=False)
        self.failure = None
        self._failures = {}
        self.errors = {}
        self._echoes = []
        self._pending = {}
        self._awaited = [None] * self.num_replicas

    def outcome(self, failure: BaseException) -> BaseException:
        """Return what ``run`` must raise: the own error of the lowest replica, others as notes."""
        if not self.errors:
            return failure
        first, *others = sorted(self.errors)
        error = self.errors[first]
        for other in others:
            raised = self.errors[other]
            name = self._first + other
            user_errors.annotate(
                error, f"replica {name} also raised {user_errors.in_words(raised)}"
            )
        if self.num_replicas > 1:
            user_errors.annotate(
                error, f"raised in replica {self._first + first} of {self.num_replicas}"
            )
        return error

    def _ended(self) -> BaseException:
        failure = self.failure
        # A class of the user's may not be made of its arguments, so none is.
        if failure is not None and type(failure) in _OUR_OWN:
            echo: BaseException = type(failure)(*failure.args)
        else:
            echo = StepEnded(
                f"this step has ended because a replica raised {user_errors.in_words(failure)}"
            )
        self._echoes.append(echo)
        return echo

    def _is_consequence(self, error: BaseException) -> bool:
        """Return whether an error only passes on, or was raised while handling, the failure."""
        return user_errors.rests_on(error, self._echoes)

    def _who_is_where(self) -> str:
        frames = sys._current_frames()
        return "; ".join(
            self._whereabouts(replica, request, frames)
            for replica, request in enumerate(self._requests)
        )

    def _whereabouts(
        self, replica: int, request: CollectiveCall | None, frames: dict[int, types.FrameType]
    ) -> str:
        ident = self._seats.get(replica, 0)
        name = self._first + replica
        if self._gone[replica]:
            return f"replica {name} has returned"
        issued = [
            p for p in tuple(self._pending.values()) if p.requests[replica] and not p.is_complete
        ]
        place = user_line(frames.get(ident))
        if request is not None:
            doing = f"called {request}"
        elif issued:
            doing, place = f"called {issued[0].requests[replica]}", issued[0].places[replica]
        else:
            doing = "is still running"
        return f"replica {name} {doing} at {place}"


def user_line(frame: types.FrameType | None) -> str:
    """Return the file and line of the innermost frame that is not the library's own."""
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
