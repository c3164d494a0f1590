"""Server of a table: it answers reads of a variable's rows and applies changes, one at a time."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, final

from dvkernels import deadlines
from dvkernels.errors import CollectiveTimeoutError
from dvkernels.replicas.step_lock import StepLock
from dvkernels.variables.request_counts import RequestCounts

__all__: list[str] = []

T = TypeVar("T")

SERVED = "served"  # the mode of a variable that has a server


class Server(Protocol):
    """Server of one variable's rows, in this process or in others."""

    shards: tuple[range, ...]

    def ask(self, what: str, request: Callable[..., T], copies: Any, *arrays: Any) -> T:
        """Return what the server answers to a request; ``what`` is for messages."""

    def apply(self, what: str, request: Callable[..., None], copies: Any, *arrays: Any) -> None:
        """Carry out a request that writes; in a call whose writes count once, when it returns."""


@final
class TableServer:
    """Server of one variable's rows: requests of all threads are carried out one at a time.

    A request is a function of a module and arrays, so that a server in another process can be sent
    one. It computes the new rows first and commits them in one call: an error or an interrupt
    leaves all rows as they were, or all written.

    Attributes
    ----------
    shards : tuple of range
        The rows of each shard.
    counts : RequestCounts
        Of its requests.
    """

    __slots__ = ("_turn", "counts", "shards")

    def __init__(self, shards: Sequence[range]) -> None:
        self.shards = tuple(shards)
        self.counts = RequestCounts()
        self._turn = StepLock()

    def ask(self, what: str, request: Callable[..., T], copies: Any, *arrays: Any) -> T:
        """Return ``request(copies, *arrays)``, called while no other thread reads or writes."""
        lock = self._turn.lock()
        try:
            if not lock.acquire(blocking=False) and not lock.acquire(
                timeout=deadlines.timeout_seconds()
            ):
                raise CollectiveTimeoutError(
                    f"{what} of variable {copies.name!r} waited {deadlines.timeout_seconds():g} s "
                    f"in vain for another thread that reads or writes it; "
                    f"DVKERNELS_TIMEOUT_SECONDS changes the timeout"
                )
            self.counts.note(threading.get_ident(), what, copies, arrays)
            return request(copies, *arrays)
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                lock.release()
            except RuntimeError:  # not acquired: the wait timed out or was interrupted
                pass

    def apply(self, what: str, request: Callable[..., None], copies: Any, *arrays: Any) -> None:
        """Carry out a request that writes; in a call whose writes count once, when it returns."""
        if not postpone(self, what, request, copies, *arrays):
            self.ask(what, request, copies, *arrays)


PendingWrites = list[tuple[Any, ...]]
pending_writes: ContextVar[PendingWrites | None] = ContextVar("dvkernels_writes", default=None)


def postpone(server: Server, what: str, request: Any, copies: Any, *arrays: Any) -> bool:
    """Keep a write for the end of a call whose writes count once; return whether this is one."""
    pending = pending_writes.get()
    if pending is None:
        return False
    pending.append((server, what, request, copies, *copy.deepcopy(arrays)))  # it may use them again
    return True


def apply_together(writes: PendingWrites) -> None:
    """Apply writes, ``(server, what, request, copies, *arrays)``, of several variables.

    Servers in other processes get one message each.
    """
    together = getattr(writes[0][0], "apply_together", None)
    if together is not None:
        together(writes)
        return
    for server, *request in writes:
        server.apply(*request)


def apply_pending(writes: PendingWrites) -> None:
    """Apply the writes of a call that has returned, in their order; each leaves the list first."""
    while writes:
        server, *request = writes.pop(0)
        server.ask(*request)
