"""Transport of arrays between workers: its methods, and the end of its group."""

from __future__ import annotations

import os
import sys
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

from dvkernels.communicators.workers.consistency import (
    ConsistencyCheck,
    ControlChannel,
    FailureState,
    Fingerprint,
)
from dvkernels.communicators.workers.message_channel import MessageChannel
from dvkernels.communicators.workers.shm.symmetric_memory import Columns, SymmetricMemory
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import ClusterError, CollectiveTimeoutError, WorkerLostError
from dvkernels.reduce_op import Reduction
from dvkernels.user_errors import describe

__all__: list[str] = []

LOST, GAVE_UP = 1, 2  # kinds of an end: a worker is lost, or a worker's deadline has passed

_in_this_process: weakref.WeakSet[Transport] = weakref.WeakSet()


class EndRecord(Protocol):
    """Record of the end of a group, which all workers read."""

    def end(self, kind: int, text: str) -> None:
        """Abort all calls of the group, pending and later ones."""

    def why_ended(self) -> tuple[int, str] | None:
        """Return kind and text of the end; None if the group has not ended."""


class Transport(ControlChannel):
    """Transport of flat arrays between workers, which first checks that all call the same.

    One for each channel; ``failures`` are those of this worker, shared by its channels.
    """

    takes_columns = False  # all_reduce_into takes several columns, of several arrays each
    has_lost = False  # a worker that has not left in order
    symmetric_memory: SymmetricMemory | None = None  # whose arrays are reduced in place
    on_close: Callable[[str], object] | None = None  # leaves the group, where its end is no exit

    def __init__(
        self,
        rank: int,
        size: int,
        timeout_seconds: float,
        record: EndRecord,
        channel: int = 0,
        failures: FailureState | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.timeout_seconds = timeout_seconds
        self._record = record
        self._channel = channel
        self._failures = failures or FailureState()
        self._consistency = ConsistencyCheck(self, self._failures)
        self._number = 0  # of the latest round
        self._last: Fingerprint | None = None  # the latest call that all workers made
        self._duplicate: Transport | None = None
        _in_this_process.add(self)

    @abstractmethod
    def all_reduce_into(
        self, columns: Columns, num_sources: int, op: Reduction, call: Fingerprint, divisor: int = 1
    ) -> None:
        """Write the reduction of all workers' sources to each target: flat arrays of one dtype.

        Targets may be sources. A worker's own sources are combined first, and the result is divided
        by ``divisor``. A transport that does not take columns gets one column of one source and one
        target, and no divisor.
        """

    def all_reduce_short(
        self,
        source: HostArray,
        target: HostArray,
        op: Reduction,
        call: Fingerprint,
        divisor: int = 1,
    ) -> bool:
        """Write the reduction of all workers' sources to the target, if that takes a short call.

        False: nothing has been done.
        """
        del source, target, op, call, divisor
        return False

    @abstractmethod
    def all_gather_bytes(self, source: HostArray, call: Fingerprint) -> list[HostArray]:
        """Return the bytes of all workers, whose numbers may differ."""

    @abstractmethod
    def broadcast_into(self, target: HostArray, root: int, call: Fingerprint) -> None:
        """Write the root's bytes, which its ``target`` holds, to every ``target``."""

    def channels(self) -> list[MessageChannel | None]:
        """Return a message channel to each other worker; all workers call this together."""
        raise ClusterError("servers need workers of MPI or of one host: these exchange no messages")

    def duplicate(self) -> Transport:
        """Return the transport between the same workers for another thread: the second channel."""
        return self._duplicate or self

    # -- the end ----------------------------------------------------------------------------------

    def announce(self, error: BaseException) -> None:
        """Tell the other workers, in either channel, that this worker's step has failed."""
        if not self.has_ended:
            self._failures.announce(error, self.rank)

    def end(self, error: BaseException) -> None:
        """Abort the group, unless it has ended: every later call on any worker raises ``error``."""
        if not self.has_ended:
            kind = GAVE_UP if isinstance(error, CollectiveTimeoutError) else LOST
            self._record.end(kind, str(error))

    @property
    def has_ended(self) -> bool:
        """Whether the group has been aborted, or this process has left it."""
        return self.has_closed or self._record.why_ended() is not None

    @property
    def has_closed(self) -> bool:
        """Whether this process has left the group, or was forked from a worker."""
        return bool(self._consistency.refusal)

    def close(self) -> None:
        """Leave the group, where that is possible before this process exits."""
        if self.on_close is not None and not self.has_closed:
            error = sys.exception()  # that of a ``with`` block
            after = "" if error is None else f" after {describe(error)}"
            self.on_close(f"it has closed its strategy{after}")
            self.refuse(
                "this worker has closed its strategy, and with that has left the group of workers; "
                "make a new strategy on all of them"
            )

    def refuse(self, text: str) -> None:
        """Let every later call of this process raise ``ContextError``; other workers go on."""
        for transport in (self, self._duplicate or self):
            transport._consistency.refusal = text

    @property
    def is_settled(self) -> bool:
        """Whether the exit of this process need not wait for anything pending."""
        return True

    @abstractmethod
    def leave(self, text: str) -> None:
        """Tell the other workers that this worker makes no further call, and why."""

    @abstractmethod
    def remaining_workers(self) -> list[int]:
        """Return the other workers that have not left, as far as is known."""

    def _lose(self, worker: int, call: Fingerprint, why: str) -> NoReturn:
        """Abort the group because a worker will never make the call that this worker waits in."""
        self._abort(LOST, f"worker {worker} is lost while {call.text} waits for it: {why}")

    def _give_up(self, absent: Sequence[int], call: Fingerprint, seen: str) -> NoReturn:
        """Abort the group after the deadline; ``seen`` says what is known of the absent workers."""
        self._abort(
            GAVE_UP,
            f"worker {self.rank} waited {self.timeout_seconds:g} s in vain for workers {absent} "
            f"to call {call.text}: {seen}; give timeout_seconds if they need longer",
        )

    def _abort(self, kind: int, text: str) -> NoReturn:
        """Abort the group and raise the error of its end."""
        self._record.end(kind, text)
        raise self._end_error()

    def _end_error(self) -> BaseException:
        """Return the error of the end of the group, which has ended."""
        found = self._record.why_ended()
        assert found is not None
        kind, text = found
        error = CollectiveTimeoutError(text) if kind == GAVE_UP else WorkerLostError(text)
        return self._failures.note(error)

    @property
    def _last_seen(self) -> str:
        return "before any collective" if self._last is None else f"in {self._last.text}"


def text_of_exit() -> str:
    """Return why this process leaves its groups at its exit."""
    error = getattr(sys, "last_value", None)
    return "it has exited" if error is None else f"it exited after {describe(error)}"


def _refuse_in_child() -> None:
    for transport in [*_in_this_process]:
        transport.refuse(
            f"this process was forked from worker {transport.rank}, and is no worker itself; call "
            f"this there, or make a strategy of its own here"
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_refuse_in_child)
