"""Message channels over MPI: point-to-point messages, matched when they arrive."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import final

import numpy as np
from mpi4py import MPI

from dvkernels.communicators.workers.message_channel import MessageChannel
from dvkernels.devices.array_spec import HostArray

__all__: list[str] = []

_TAG = 0
_LEAST_BYTES_PER_SECOND = 1e8  # a message that moves more slowly is awaited with naps


@final
class MpiChannel(MessageChannel):
    """Message channel over an MPI communicator that has no other messages."""

    def __init__(self, comm: MPI.Comm, peer: int, why_gone: Callable[[], tuple[str, bool]]) -> None:
        super().__init__(peer, f"MPI process {peer}", self._why_gone)
        self._comm = comm
        self._why_left = why_gone
        self._why_lost = ""  # as MPI says, with fault tolerance (ULFM)
        self._sends: deque[tuple[MPI.Request, HostArray]] = deque()
        self._arriving: tuple[MPI.Request, HostArray] | None = None
        self._moving_until = 0.0

    def post(self, parts: Sequence[memoryview]) -> None:
        payload = np.frombuffer(b"".join(parts), np.uint8)
        self._begin(payload.nbytes)
        try:
            self._sends.append((self._comm.Isend([payload, MPI.BYTE], self.peer, _TAG), payload))
        except MPI.Exception as error:
            self._why_lost = str(error)

    def flush(self) -> bool:
        try:
            while self._sends and self._sends[0][0].Test():
                self._sends.popleft()
        except MPI.Exception as error:
            self._why_lost = str(error)
            self._sends.clear()
        if self._sends:
            self._count_as_moving()
        return not self._sends

    def own_unsent(self) -> None:
        pass  # all sends have copies

    def receive(self) -> HostArray | None:
        try:
            if self._arriving is None:
                status = MPI.Status()
                message = self._comm.Improbe(self.peer, _TAG, status)
                if message is None:
                    return None
                payload = np.empty(status.Get_count(MPI.BYTE), np.uint8)
                self._begin(payload.nbytes)
                self._arriving = message.Irecv([payload, MPI.BYTE]), payload
            request, payload = self._arriving
            if not request.Test():
                self._count_as_moving()
                return None
        except MPI.Exception as error:
            self._why_lost = str(error)
            self._arriving = None
            return None
        self._arriving = None
        return payload

    def _begin(self, nbytes: int) -> None:
        self._moving_until = max(
            self._moving_until, time.monotonic() + nbytes / _LEAST_BYTES_PER_SECOND
        )

    def _count_as_moving(self) -> None:
        """Let those who wait poll, for a time: MPI moves data only inside of its calls."""
        self.num_moved += time.monotonic() < self._moving_until

    def _why_gone(self) -> tuple[str, bool]:
        return (f"MPI has lost it: {self._why_lost}", False) if self._why_lost else self._why_left()
