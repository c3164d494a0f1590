"""Where the replicas of one step meet: they agree, one of them acts for all, all go on.

A step belongs to one call of ``run``. Each replica thread brings a :class:`Request`; the last to
come compares them and performs the collective for everybody, while the others wait at a gate.
Whatever goes wrong in one replica ends the step in all: nobody is left waiting.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dvkernels import deadlines, user_errors
from dvkernels.communicators.carrier import Carrier
from dvkernels.communicators.gates import Gates
from dvkernels.errors import CollectiveMismatchError, CollectiveTimeoutError, ContextError
from dvkernels.profiler import debugging, tracing

__all__: list[str] = []

NOWHERE = debugging.Place("", 0, 0)
_PACKAGE = str(Path(__file__).parent.parent) + os.sep


def num_gates(num_replicas: int) -> int:
    """Return how many gates a step needs."""
    return num_replicas + 2


def rest_gate(num_replicas: int) -> int:
    """Return the number of the gate that opens when a replica comes to rest."""
    return num_replicas + 1


class StepEnded(CollectiveMismatchError):
    """A collective was refused because the step has already failed, here or elsewhere."""


class Same(int):
    """The ``id`` of an object that all replicas must mean; not printed."""

    __slots__ = ()

    def __str__(self) -> str:
        return ""


class Request(NamedTuple):
    """What one replica asks for."""

    verb: str  # the user's word: all_reduce, barrier, Variable.assign
    terms: tuple[Any, ...]  # what all replicas must agree on: op, structure, shapes, dtypes
    payload: Any  # what this replica brings
    act: Callable[[list[Any]], Sequence[Any]]  # all payloads -> one result per replica

    def __str__(self) -> str:
        terms = (str(term) for term in self.terms if term is not None)
        return f"{self.verb}({', '.join(term for term in terms if term)})"


class Pending:
    """A collective that the replicas issue one by one, and that is carried out when all have."""

    __slots__ = ("done", "is_complete", "places", "requests", "results")

    def __init__(self, num_replicas: int) -> None:
        self.requests: list[Request | None] = [None] * num_replicas
        self.places = [""] * num_replicas
        self.results: Sequence[Any] = ()
        self.is_complete = False
        self.done = threading.Event()


class Step:
    """One call of ``run`` over ``num_replicas`` threads.

    A group of one meets nobody and needs no gates; others need ``num_gates`` closed ones.
    """

    __slots__ = (
        "_announce",
        "_arrived",
        "_awaited",
        "_carrier",
        "_echoes",
        "_first",
        "_gates",
        "_gone",
        "_has_stalled",
        "_issued",
        "_mutex",
        "_pending",
        "_pid",
        "_requests",
        "_results",
        "_threads",
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
        timeout: float = deadlines.PATIENCE_SECONDS,
        carrier: Carrier | None = None,
        first_replica: int = 0,
        announce: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.num_replicas = num_replicas
        # Called with what is to be done for all replicas, and what they brought.
        self.perform: Callable[..., Sequence[Any]] | None = None
        self._announce = announce  # tells other processes that this step has failed
        self._first = first_replica  # what the first of these threads is called in messages
        self.failure: BaseException | None = None
        self.errors: dict[int, BaseException] = {}
        self.closed = False
        self._echoes: list[BaseException] = []
        self._mutex = threading.Lock()
        self._arrived = 0
        self._gone: set[int] = set()
        self._carrier = carrier  # of what is issued; without one it is carried out at once
        self._issued = [0] * num_replicas
        self._pending: list[Pending] = []
        self._awaited: dict[int, Pending] = {}  # what each replica waits, or has waited, for
        self._requests: list[Request | None] = [None] * num_replicas
        self._results: Sequence[Any] = ()
        self._threads = [0] * num_replicas
        self._timeout = timeout
        self._pid = os.getpid()
        self.place = NOWHERE
        self._watch: debugging.Watch | None = None
        self._has_stalled = False
        # One gate a replica; one for the caller, opened when all have left; and one that opens
        # whenever a replica comes to rest, so that another may have the interpreter.
        self._gates = gates

    # -- in a replica ---------------------------------------------------------------------------

    def observe(self, watch: debugging.Watch, place: debugging.Place) -> None:
        """Report to a watch what happens in this step, which is ``place``."""
        self._watch = watch
        self.place = place

    def place_of(self, replica: int) -> debugging.Place:
        """Return what messages call a replica of this step."""
        return self.place._replace(replica=self.number_of(replica))

    def number_of(self, replica: int) -> int:
        """Return the number of a replica of this process among those of all."""
        return self._first + replica

    def enter(self, replica: int) -> bool:
        """Say that this thread runs a replica; False: the step ended before it could start."""
        with self._mutex:
            if replica in self._gone:
                return False
            self._threads[replica] = threading.get_ident()
            return True

    def meet(self, replica: int, request: Request) -> Any:
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
            with self._mutex:
                if self.failure is not None:
                    raise self._ended()
                self._requests[replica] = request
                self._arrived += 1
                complete = self._arrived == self.num_replicas
                deserted = bool(self._gone)
                stuck = bool(self._awaited) and self._is_stuck()
            try:
                if deserted or stuck:
                    self._end_deserted()
                elif complete:
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
        with self._mutex:
            if self.failure is not None:
                raise self._ended()
            self._results = results
            self._requests = [None] * self.num_replicas
            self._arrived = 0
        own = results[replica]
        self._let_go(replica)
        return own

    def issue(self, replica: int, request: Request) -> Pending:
        """Bring a request without waiting for the others; see :meth:`await_pending`.

        The k-th request that a replica issues meets the k-th of each other one.
        """
        self._check_alive(request.verb)
        if self._watch is not None:
            self._watch.record(self.place_of(replica), str(request))
        if self._carrier is None:
            alone = Pending(1)
            alone.results = self._act([request])
            alone.done.set()
            return alone
        with self._mutex:
            number = self._issued[replica]
            self._issued[replica] += 1
            if number == len(self._pending):
                self._pending.append(Pending(self.num_replicas))
            pending = self._pending[number]
            pending.requests[replica] = request
            pending.places[replica] = user_line(sys._getframe())
            pending.is_complete = all(pending.requests)
            deserted = any(self._issued[other] <= number for other in self._gone)
        if deserted:
            self._end_deserted()
            raise self._ended()
        if pending.is_complete:
            self._carrier.carry(functools.partial(self._carry_out, pending))
        return pending

    def _carry_out(self, pending: Pending) -> None:
        """Act for all replicas, on the carrier's thread."""
        try:
            if self.failure is None:
                requests = [one for one in pending.requests if one is not None]
                pending.results = self._act(requests, pending.places)
        except BaseException as error:
            self.fail(error)
        finally:
            pending.done.set()

    def await_pending(self, replica: int, pending: Pending) -> Any:
        """Return this replica's result of what was issued, when it has been carried out."""
        if not pending.done.is_set():
            self._check_alive("wait")
            with self._mutex:
                self._awaited[replica] = pending
                stuck = self._is_stuck()
            if stuck:
                self._end_deserted()
            is_done = self._watched(replica, pending.done.wait, pending.done.wait)
            while not is_done and pending.is_complete:
                # All have come: the collective itself takes this long.
                is_done = pending.done.wait(self._timeout)
            if not is_done:
                missing = self._missing(pending.requests)
                self.fail(
                    CollectiveTimeoutError(
                        f"replica {self._first + replica} waited {self._timeout:g} s in vain for "
                        f"replicas {missing} to issue {pending.requests[replica]}; set "
                        f"DVKERNELS_TIMEOUT_SECONDS if they need longer"
                    )
                )
        if not pending.results:
            raise (
                self._ended()
                if self.failure is not None
                else ContextError("the step of this handle has ended")
            )
        return pending.results[replica]

    def _is_stuck(self) -> bool:
        """Return whether all replicas wait, some of them for calls that no other can issue."""
        lost = [self._awaited[k] for k in self._awaited if self._requests[k] is None]
        lost = [pending for pending in lost if not pending.done.is_set()]
        incomplete = sum(not pending.is_complete for pending in lost)
        return 0 < incomplete == self.num_replicas - self._arrived

    def _drain(self) -> None:
        """Wait for what the carrier is at: it reads arrays that are the caller's again after."""
        for pending in self._pending:
            if pending.is_complete and not self._is_forked():
                pending.done.wait()

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

    def _act(self, requests: list[Request], places: Sequence[str] | None = None) -> Sequence[Any]:
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
        assert self._gates is not None
        self._gates.open(rest_gate(self.num_replicas))
        if self._watch is None:
            opened = self._gates.wait(replica, self._timeout)
        else:
            wait, go_on = self._gates.wait, self._gates.sleep
            opened = self._watched(
                replica, functools.partial(wait, replica), functools.partial(go_on, replica)
            )
        while not opened and self._arrived == self.num_replicas:
            # All have come: the collective itself (a merge_call, say) takes this long.
            opened = self._gates.sleep(replica, self._timeout)
        if not opened:
            missing = self._missing(self._requests)
            self.fail(
                CollectiveTimeoutError(
                    f"replica {self._first + replica} waited {self._timeout:g} s in vain for "
                    f"replicas {missing}: {self._who_is_where()}; set "
                    f"DVKERNELS_TIMEOUT_SECONDS if they need longer"
                )
            )

    def _missing(self, requests: Sequence[Request | None]) -> list[int]:
        return [k for k, request in enumerate(requests, self._first) if request is None]

    def _watched(
        self, replica: int, wait: Callable[[float], bool], go_on: Callable[[float], bool]
    ) -> bool:
        """Wait until the deadline; in debug mode say so when it lasts."""
        if self._watch is None:
            return wait(self._timeout)
        soon = min(self._watch.stall_seconds, self._timeout)
        if wait(soon):
            return True
        with self._mutex:
            is_first, self._has_stalled = not self._has_stalled, True
        if is_first:
            place = self.place_of(replica)
            self._watch.report_stall(place, self._who_is_where(), self._threads)
        return soon < self._timeout and go_on(self._timeout - soon)

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
        with self._mutex:
            self._gone.add(replica)
            all_left = len(self._gone) == self.num_replicas
            waited_for = self._arrived > 0 or self._issued[replica] < len(self._pending)
            deserts = waited_for and self.failure is None
        if deserts:
            self._end_deserted()
        if self._gates is not None and not self._is_forked():
            done, rest = self.num_replicas, rest_gate(self.num_replicas)
            self._gates.open(done if all_left else rest)

    # -- from anywhere --------------------------------------------------------------------------

    def fail(self, error: BaseException, replica: int | None = None) -> None:
        """End the step in all replicas; of several failures the first is kept.

        ``replica`` is the one that raised ``error`` by itself; None if nobody did, as for a
        disagreement.
        """
        with self._mutex:
            is_first = self.failure is None
            if is_first:
                self.failure = error
            if replica is None:
                self._echoes.append(error)
            elif not self._is_consequence(error):
                self.errors.setdefault(replica, error)
        if self._gates is not None and not self._is_forked():
            for gate in range(self.num_replicas):
                self._gates.open(gate)
            for pending in self._pending:
                if not pending.is_complete:
                    pending.done.set()
        if is_first and self._announce is not None and not self._is_forked():
            self._announce(error)

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
        with self._mutex:
            if replica == 0 or self._threads[replica] == 0:
                self._gone.add(replica)

    def _wait_for_all(self, patient: bool) -> None:
        while len(self._gone) < self.num_replicas and not self._is_forked():
            if patient and self._gates is not None:
                self._gates.wait(self.num_replicas)
            else:  # after an interrupt the gate may be in any state
                time.sleep(0.001)

    def _is_forked(self) -> bool:
        """Return whether this is a process forked inside the step, without the other replicas.

        Locks that their threads held at that moment, Numba's too, will never be free here.
        """
        return self._pid != os.getpid()

    def end(self) -> None:
        """Refuse what may still come, and drop all errors: their tracebacks refer to this step."""
        self.closed = True
        if len(self._gone) < self.num_replicas:  # an interrupt struck at the door of settle
            self.fail(KeyboardInterrupt(), 0)
            self.settle(started=False)
        self.failure = None
        self.errors = {}
        self._echoes = []
        self._pending = []
        self._awaited = {}

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
        if isinstance(failure, CollectiveMismatchError | CollectiveTimeoutError):
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
        self, replica: int, request: Request | None, frames: dict[int, types.FrameType]
    ) -> str:
        ident = self._threads[replica]
        name = self._first + replica
        if replica in self._gone:
            return f"replica {name} has returned"
        issued = [p for p in self._pending if p.requests[replica] and not p.is_complete]
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
