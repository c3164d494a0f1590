"""Remote worker: a process that runs the closures which one thread of the coordinator sends it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np

from dvkernels import pickling
from dvkernels.coordinator.closure import Closure
from dvkernels.coordinator.per_worker import IteratorHasNotBegun, end_own, has_ended, to_begin
from dvkernels.errors import ContextError
from dvkernels.strategies.servers import message
from dvkernels.strategies.servers.processes import JobProcesses
from dvkernels.user_errors import brief, describe

__all__: list[str] = []

MOST_CAPTURED_NBYTES = 1 << 20


@final
class RemoteWorker:
    """Worker process, as the thread of the coordinator that sends its closures sees it."""

    def __init__(self, processes: JobProcesses, number: int) -> None:
        self._processes = processes
        self._channel = processes.channel(processes.workers[number])
        self.place = f"in {self._channel.place}"
        self._rank = self._channel.peer
        self._begun = processes.iterators[self._rank]
        # One thread at a time uses the channel: coordinators of one strategy have it in turn.
        self.turn = processes.turns[self._rank].lock()

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended."""
        return bool(self._channel.why_gone()[0])

    @property
    def why_servers_lost(self) -> str:
        """Which server is gone, with its variables; "" if all are there."""
        return self._processes.client.why_lost()

    def call(self, closure: Closure) -> Any:
        """Send a closure, wait for its end, and return its result or raise its error.

        Writes that count once come with the result, and this process hands them on to the servers:
        a worker that dies has reported all of them or none.
        """
        gone = [number for number in self._begun if has_ended(number)]
        if gone:
            self._begun.difference_update(gone)
            self._make(closure, end_own, (gone,))
        error, result, writes = self._reply(closure, closure.sent)
        while isinstance(error, IteratorHasNotBegun):
            error = self._make(closure, *to_begin(*(begun := error.args)))
            if error is None:
                self._begun.update(begun)
                error, result, writes = self._reply(closure, closure.sent)
        if error is not None:
            raise error
        if writes:
            self._processes.client.ask(f"the writes of {closure}", writes, self._rank)
        return result

    def _make(self, closure: Closure, fn: Any, arguments: tuple[Any, ...]) -> BaseException | None:
        """Make a call of our own before that of a closure, and return its error."""
        call = (closure.number, False, fn, arguments, dict[str, Any]())
        sent = message.encode(call, self._processes.objects, closure.number)
        return self._reply(closure, sent)[0]

    def _reply(
        self, closure: Closure, sent: Sequence[memoryview]
    ) -> tuple[BaseException | None, Any, Any]:
        self._channel.post(sent)
        came = None
        # Replies come in order; one before may be to a coordinator that has been closed.
        while came is None or pickling.number_of(came) != closure.number:
            came = self._channel.next(str(closure), math.inf)
        reply: tuple[BaseException | None, Any, Any]
        reply = message.decode(came, self._processes.objects)
        return reply


def encoded(
    processes: JobProcesses,
    number: int,
    once: bool,
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[list[memoryview], tuple[Any, ...]]:
    """Return a call as a message; raise if it cannot be sent, or captures too much.

    Return also the variables and optimizers that it refers to: servers keep them while they live.

    The message has its own copy of all arrays, so that the call sees them as they were scheduled,
    also if it runs again.
    """
    kept: list[Any] = []
    try:
        parts = message.encode(
            (number, once, fn, tuple(args), dict(kwargs)), processes.objects, number, kept
        )
        nbytes = message.nbytes_of(parts)
        if nbytes > MOST_CAPTURED_NBYTES:  # of the function, or of its arguments?
            nbytes = message.nbytes_of(message.encode(fn, processes.objects))
    except Exception as error:
        raise ContextError(
            f"schedule: the call of {brief(fn, 40)} cannot be sent to a worker process: "
            f"{describe(error)}; create inside the function what cannot be sent"
        ) from error
    if nbytes > MOST_CAPTURED_NBYTES:
        raise ContextError(
            f"schedule: {brief(fn, 40)} captures {nbytes:,} bytes{_largest_of(fn)}, which would be "
            f"sent with every call, and at most {MOST_CAPTURED_NBYTES:,} may be: make it a "
            f"dv.Variable in the scope of the strategy, which the function reads by read_value or "
            f"gather_rows; or data of the workers, by create_per_worker_dataset"
        )
    return message.owned(parts), tuple(kept)


def _largest_of(fn: Any) -> str:
    """Return the name of the largest array that a function captures, for its error."""
    try:
        captured = inspect.getclosurevars(fn)
    except TypeError:
        return ""
    found = {**captured.globals, **captured.nonlocals}
    arrays = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    if not arrays:
        return ""
    name = max(arrays, key=lambda each: arrays[each].nbytes)
    return f", of which the array {name!r} has {arrays[name].nbytes:,}"
