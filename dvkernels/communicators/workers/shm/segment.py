"""Layout of the shared-memory segment: control lines, texts, and two staging buffers per worker.

    line 0         unused, but for its address
    lines 1..n     worker w: [0] process id  [1] why it aborted the group  [2] whether it has left
                   [3] when its process started
    then for each of the two channels
        a line     [0] whether the group has been aborted
        n lines    the votes of each worker: see dvkernels/kernels/cpu/engine/shm_barrier.py
    texts          of each worker: why it aborted or left; its texts of two rounds per channel
    buffers        of each channel, for even and for odd rounds: a staging buffer of each worker,
                   and one or more result buffers, to which all workers write

A line is a cache line of 64 bytes, written by one worker only (except the abort flag).
"""

from __future__ import annotations

import math
import os

import numpy as np

from dvkernels.cluster import procfs
from dvkernels.cluster.process_handle import ProcessHandle
from dvkernels.devices.array_spec import HostArray
from dvkernels.profiler.memory_report import Holding

__all__: list[str] = []

NUM_CHANNELS = 2
# Bytes of a staging buffer: both of a worker fit into the L2 cache. An all-reduce of 64 MiB between
# two processes took 14.3 ms with 64 KiB, 13.8 with 128, 12.8 with 256 and 12.7 with 512 KiB
# (medians of 9; 2 busy cores of an AMD EPYC, November 2026).
BUFFER_NBYTES = 256 * 1024
_LINE, _WORDS_PER_LINE = 64, 8
_TEXT_NBYTES = 2048
_PAGE = 4096
_PROCESS, _ENDED, _LEFT, _STARTED = 0, 1, 2, 3  # words of the line of a worker
_IS_ABORTED = 0  # of the first line of a channel


class Segment:
    """One worker's view of the shared-memory segment.

    ``memory`` has at least :meth:`nbytes_for` bytes, aligned to a cache line, cleared by
    :meth:`clear`. ``num_result_buffers`` is that of each parity.
    """

    def __init__(
        self,
        memory: HostArray,
        rank: int,
        size: int,
        num_result_buffers: int = 1,
        buffer_nbytes: int = BUFFER_NBYTES,
    ) -> None:
        self.rank, self.size = rank, size
        self._memory = memory
        self._holding = Holding("cpu:0", "staging", memory.nbytes // size)
        lines, texts, buffers_start = _layout(size)
        self._control = memory[:texts].view(np.int64).reshape(-1, _WORDS_PER_LINE)
        self._address = memory.ctypes.data
        self._channels = [lines + k * (1 + size) for k in range(NUM_CHANNELS)]
        count = 1 + 2 * NUM_CHANNELS
        self._texts = _region(memory, texts, (count, size, _TEXT_NBYTES))
        self._buffers = _region(
            memory, buffers_start, (NUM_CHANNELS, 2, size + num_result_buffers, buffer_nbytes)
        )
        self._handles: dict[int, ProcessHandle] = {}  # by worker
        self._control[1 + rank, _STARTED] = procfs.start_time_of(os.getpid())
        self._control[1 + rank, _PROCESS] = os.getpid()

    @staticmethod
    def nbytes_for(
        size: int, num_result_buffers: int = 1, buffer_nbytes: int = BUFFER_NBYTES
    ) -> int:
        """Return the bytes of the segment of ``size`` workers."""
        return _layout(size)[2] + NUM_CHANNELS * 2 * (size + num_result_buffers) * buffer_nbytes

    @staticmethod
    def control_nbytes_for(size: int) -> int:
        """Return the bytes of the control lines and texts, at its start."""
        return _layout(size)[2]

    @staticmethod
    def process_in(memory: HostArray, rank: int, size: int) -> int:
        """Return the process id of a worker that has attached to a segment, or 0."""
        lines = memory[: _layout(size)[1]].view(np.int64).reshape(-1, _WORDS_PER_LINE)
        return int(lines[1 + rank, _PROCESS])

    @staticmethod
    def clear(memory: HostArray, size: int) -> None:
        """Clear the control lines and texts; one worker does this before the others attach."""
        memory[: _layout(size)[1]] = 0

    def lines(self, channel: int) -> int:
        """Return the address of a channel's control lines."""
        return int(self._address + _LINE * (self._channels[channel] + 1))

    def control_lines(self, channel: int) -> HostArray:
        """Return a channel's control lines, one row of int64 for each worker."""
        first = self._channels[channel] + 1
        return self._control[first : first + self.size]

    def buffers(self, channel: int) -> HostArray:
        """Return a channel's buffers by round parity and worker; result buffers come last."""
        buffers: HostArray = self._buffers[channel]
        return buffers

    # -- messages and state -----------------------------------------------------------------------

    def publish_text(self, channel: int, parity: int, text: str) -> None:
        """Write this worker's text of a round."""
        self._write_text(1 + 2 * channel + parity, text)

    def published_text(self, channel: int, parity: int, worker: int) -> str:
        """Return a worker's text of a round."""
        return self._read_text(1 + 2 * channel + parity, worker)

    def end(self, kind: int, text: str) -> None:
        """Abort all rounds of the group, pending and later ones; ``kind`` is above 0."""
        self._write_text(0, text)
        self._control[1 + self.rank, _ENDED] = kind
        for first in self._channels:
            self._control[first, _IS_ABORTED] = 1

    def why_ended(self) -> tuple[int, str] | None:
        """Return kind and text of the abort of the lowest worker that aborted; None if none has."""
        for worker in range(self.size):
            kind = int(self._control[1 + worker, _ENDED])
            if kind:
                return kind, self._read_text(0, worker)
        return None

    def leave(self, text: str) -> None:
        """Record that this worker arrives in no further round, and why."""
        if not self._control[1 + self.rank, _ENDED]:
            self._write_text(0, text)
        self._control[1 + self.rank, _LEFT] = 1

    def why_left(self, worker: int) -> str | None:
        """Return why a worker has left; None if it has not."""
        return self._read_text(0, worker) if self._control[1 + worker, _LEFT] else None

    def process_of(self, worker: int) -> int:
        """Return the process id of a worker; 0 if it has not attached."""
        return int(self._control[1 + worker, _PROCESS])

    def is_alive(self, worker: int) -> bool:
        """Return whether a worker's process lives; it has attached."""
        handle = self._handles.get(worker)
        if handle is None:
            started = int(self._control[1 + worker, _STARTED])
            handle = self._handles[worker] = ProcessHandle(self.process_of(worker), started)
        return handle.is_alive()

    def _write_text(self, slot: int, text: str) -> None:
        write_text(self._texts[slot, self.rank], text)

    def _read_text(self, slot: int, worker: int) -> str:
        return read_text(self._texts[slot, worker])


def write_text(field: HostArray, text: str) -> None:
    """Write as much of a text as fits into the bytes of a field, and a zero behind it."""
    encoded = text.encode(errors="replace")[: len(field) - 1]
    field[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    field[len(encoded)] = 0


def read_text(field: HostArray) -> str:
    """Return the text in a field."""
    encoded: bytes = field.tobytes()
    return encoded[: encoded.index(0)].decode(errors="replace")


def _region(memory: HostArray, start: int, shape: tuple[int, ...]) -> HostArray:
    return memory[start : start + math.prod(shape)].reshape(shape)


def _layout(size: int) -> tuple[int, int, int]:
    """Return the first channel's line, and the byte offsets of the texts and the buffers."""
    lines = 1 + size
    texts = _LINE * (lines + NUM_CHANNELS * (1 + size))
    buffers_start = texts + (1 + 2 * NUM_CHANNELS) * size * _TEXT_NBYTES
    return lines, texts, -(-buffers_start // _PAGE) * _PAGE
