"""Message channels over shared memory: a ring each way between every two processes of a host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import final

import numpy as np

from dvkernels.communicators.workers.message_channel import MessageChannel
from dvkernels.communicators.workers.shm.segment import Segment
from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels.cpu import message_ring

__all__: list[str] = []

_JOINED_NBYTES = 1 << 16  # of a message that is copied once more, to be one part


@final
class RingChannel(MessageChannel):
    """Message channel over two rings, ``inbox`` and ``outbox``."""

    def __init__(
        self,
        peer: int,
        place: str,
        why_gone: Callable[[], tuple[str, bool]],
        inbox: HostArray,
        outbox: HostArray,
    ) -> None:
        super().__init__(peer, place, why_gone)
        self._inbox, self._outbox = inbox, outbox
        self._inbox_address = inbox.ctypes.data
        self._outbox_address = outbox.ctypes.data
        self._unsent: deque[HostArray] = deque()  # what is left of the messages under way
        self._length = np.zeros(1, np.int64)
        self._begin(self._length.view(np.uint8), is_length=True)

    def post(self, parts: Sequence[memoryview]) -> None:
        nbytes = sum(part.nbytes for part in parts)
        length = np.array([nbytes], np.int64).tobytes()
        if nbytes <= _JOINED_NBYTES:
            self._unsent.append(np.frombuffer(b"".join([length, *parts]), np.uint8))
        else:
            self._unsent.append(np.frombuffer(length, np.uint8))
            self._unsent.extend(np.frombuffer(part, np.uint8) for part in parts if part.nbytes)
        self.flush()

    def flush(self) -> bool:
        unsent = self._unsent
        while unsent:
            part = unsent[0]
            count = message_ring.put(self._outbox_address, part.ctypes.data, part.nbytes)
            self.num_moved += count
            if count < part.nbytes:
                unsent[0] = part[count:]
                return False
            unsent.popleft()
        return True

    def own_unsent(self) -> None:
        unsent = self._unsent
        for k in range(len(unsent)):
            unsent[k] = unsent[k].copy()

    def receive(self) -> HostArray | None:
        while True:
            target = self._target
            address = self._address + self._num_received
            missing = target.nbytes - self._num_received
            count = message_ring.take(self._inbox_address, address, missing)
            self._num_received += count
            self.num_moved += count
            if self._num_received < target.nbytes:
                return None
            if self._is_length:
                self._begin(np.empty(int(self._length[0]), np.uint8), is_length=False)
            else:
                self._begin(self._length.view(np.uint8), is_length=True)
                return target

    def _begin(self, target: HostArray, is_length: bool) -> None:
        self._target, self._is_length, self._num_received = target, is_length, 0
        self._address = target.ctypes.data


def channels(
    segment: Segment, allocate: Callable[[int], list[HostArray]]
) -> list[RingChannel | None]:
    """Return a channel to each other process of a host; all processes call this together.

    ``allocate`` returns new memory of each process, and is called by all processes together.
    """
    rank, size, nbytes = segment.rank, segment.size, message_ring.RING_NBYTES
    inboxes = [memory.reshape(size, nbytes) for memory in allocate(size * nbytes)]

    def why_gone_of(peer: int) -> Callable[[], tuple[str, bool]]:
        def why_gone() -> tuple[str, bool]:
            if (left := segment.why_left(peer)) is not None:
                return left or "it has left", True
            if segment.is_alive(peer):
                return "", False
            return f"process id {segment.process_of(peer)} has ended; was it killed?", False

        return why_gone

    return [
        None
        if peer == rank
        else RingChannel(
            peer,
            f"process {segment.process_of(peer)}",
            why_gone_of(peer),
            inboxes[rank][peer],
            inboxes[peer][rank],
        )
        for peer in range(size)
    ]
