"""Out-of-band messages between workers over MPI: rounds waited in, departures, and the abort."""

from __future__ import annotations

import contextlib

import numpy as np
from mpi4py import MPI

from dvkernels.communicators.workers.shm.segment import NUM_CHANNELS
from dvkernels.communicators.workers.transport import GAVE_UP, LOST
from dvkernels.devices.array_spec import HostArray

__all__: list[str] = []

_LOST_ROUNDS = [-1, -1]  # the last rounds of a worker that MPI has lost
_PRESENT: tuple[list[int], str] = [], ""
_LEFT, _WAITS = 3, 4  # tags, beside the kinds of an end; _WAITS + channel


class OutOfBandMessages:
    """Out-of-band messages of one worker, and what the others' messages say.

    Used by two threads: each message is received by one of them, and recorded here.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank, self.size = comm.rank, comm.size
        self._others = [other for other in range(comm.size) if other != comm.rank]
        self._pending_sends: list[tuple[MPI.Request, HostArray]] = []  # requests and their payloads
        self.ended: tuple[int, str] | None = None
        self.left: dict[int, tuple[list[int], str]] = {}  # by worker: its last rounds, and why
        self.rounds = [0] * NUM_CHANNELS  # by channel: the latest round of this worker
        self._waits: dict[tuple[int, int], int] = {}  # by channel and worker: its reported round

    def report_wait(self, channel: int) -> None:
        """Tell the other workers in which round of a channel this worker waits."""
        self._send(_WAITS + channel, str(self.rounds[channel]))

    def leave(self, text: str) -> None:
        """Tell the other workers that this one arrives in no further round, and why."""
        self._send(_LEFT, f"{' '.join(map(str, self.rounds))};{text}")

    def end(self, kind: int, text: str) -> None:
        """Abort the group on all workers."""
        if self.ended is None:
            self.ended = kind, text
            self._send(kind, text)

    def why_ended(self) -> tuple[int, str] | None:
        """Return kind and text of the abort, if any has been announced to this worker."""
        self.poll()
        return self.ended

    def _send(self, tag: int, text: str) -> None:
        """Send a message to all other workers, without waiting."""
        payload = np.frombuffer(text.encode(errors="replace"), np.uint8)
        self._pending_sends = [
            pending for pending in self._pending_sends if not _is_over(pending[0])
        ]
        for other in self._others:
            with contextlib.suppress(MPI.Exception):  # a lost worker receives nothing
                self._pending_sends.append(
                    (self._comm.Isend([payload, MPI.BYTE], other, tag), payload)
                )

    def poll(self) -> None:
        """Receive and record all messages that have arrived."""
        for other in self._others:
            if self.left.get(other, _PRESENT)[0] is not _LOST_ROUNDS:
                try:
                    self._receive_from(other)
                except MPI.Exception as error:  # from an MPI with fault tolerance (ULFM)
                    self.left[other] = _LOST_ROUNDS, f"MPI has lost it: {error}"

    def _receive_from(self, other: int) -> None:
        status = MPI.Status()
        while (message := self._comm.Improbe(other, MPI.ANY_TAG, status)) is not None:
            payload = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            message.Recv([payload, MPI.BYTE])
            text, tag = payload.tobytes().decode(errors="replace"), status.Get_tag()
            if tag in (LOST, GAVE_UP):
                self.ended = self.ended or (tag, text)
            elif tag == _LEFT:
                rounds, _, why = text.partition(";")
                self.left[other] = [int(number) for number in rounds.split()], why
            else:
                self._waits[tag - _WAITS, other] = int(text)

    def why_gone(self, other: int) -> tuple[str, bool]:
        """Return why a worker has left, "" if it has not, and whether it did so in order."""
        self.poll()
        rounds, why = self.left.get(other, _PRESENT)
        return why, rounds is not _LOST_ROUNDS and bool(why)

    def remaining(self) -> list[int]:
        """Return the other workers that have not left."""
        self.poll()
        return [other for other in self._others if other not in self.left]

    @property
    def has_lost(self) -> bool:
        """Whether MPI has lost a worker."""
        return any(rounds is _LOST_ROUNDS for rounds, _ in self.left.values())

    def absent(self, channel: int) -> list[int]:
        """Return the workers that have not reported to wait in a channel's round, or a later one.

        Those that wait in the previous round, or over the other channel, are absent because of a
        third worker, which stopped half-way: left out, unless there are no others.
        """
        number = self.rounds[channel]
        absent = [w for w in self._others if self._waits.get((channel, w), 0) < number]
        return [worker for worker in absent if not self._is_blocked(worker)] or absent

    def is_awaited(self, channel: int) -> bool:
        """Return whether a worker has reported to wait in a channel's round, or a later one."""
        number = self.rounds[channel]
        return any(self._waits.get((channel, w), 0) >= number for w in self._others)

    def _is_blocked(self, worker: int) -> bool:
        """Return whether a worker reported to wait in a channel's current or previous round.

        In the previous one it may wait for data, while this worker has its own and is in the next.
        """
        own = enumerate(self.rounds)
        return any(self._waits.get((channel, worker), -2) >= number - 1 for channel, number in own)


def _is_over(request: MPI.Request) -> bool:
    try:
        return bool(request.Test())
    except MPI.Exception:
        return True
