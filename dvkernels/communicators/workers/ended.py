"""End of a worker group: the abort of all its calls, and the error that they raise from then on."""

from __future__ import annotations

from typing import NoReturn, Protocol

from dvkernels.communicators.workers.consistency import FailureState
from dvkernels.errors import CollectiveTimeoutError, WorkerLostError

__all__: list[str] = []

LOST, GAVE_UP = 1, 2  # kinds of an end: a worker is lost, or a worker's deadline has passed


class EndRecord(Protocol):
    """Record of the end of a group, which all workers read."""

    def end(self, kind: int, text: str) -> None:
        """Abort all calls of the group, pending and later ones."""

    def why_ended(self) -> tuple[int, str] | None:
        """Return kind and text of the end; None if the group has not ended."""


class AbortableTransport:
    """Base class of the transports: the end of their group, and failures of single steps.

    Parameters
    ----------
    rank : int
        Of this worker.
    record : EndRecord
    failures : FailureState
        That of this worker, shared by its channels.
    """

    def __init__(self, rank: int, record: EndRecord, failures: FailureState) -> None:
        self.rank = rank
        self._record = record
        self._failures = failures

    def end(self, error: BaseException) -> None:
        """Abort the group, unless it has ended."""
        if not self.has_ended:
            kind = GAVE_UP if isinstance(error, CollectiveTimeoutError) else LOST
            self._record.end(kind, str(error))

    def abort(self, kind: int, text: str) -> NoReturn:
        """Abort the group and raise the error of its end."""
        self._record.end(kind, text)
        raise self.end_error()

    def end_error(self) -> BaseException:
        """Return the error of the end of the group, which has ended."""
        found = self._record.why_ended()
        assert found is not None
        kind, text = found
        error = CollectiveTimeoutError(text) if kind == GAVE_UP else WorkerLostError(text)
        return self._failures.note(error)

    @property
    def has_ended(self) -> bool:
        """Whether the group has been aborted."""
        return self._record.why_ended() is not None

    def announce(self, error: BaseException) -> None:
        """Tell the other workers, in either channel, that this worker's step has failed."""
        if not self.has_ended:
            self._failures.announce(error, self.rank)
