"""Memory that the workers of one host share: what lies where in it.

    line 0         unused by anybody but for its address
    lines 1..n     worker w: [0] its process  [1] it has ended the group, and why  [2] it has left
    then for each of the two channels
        a line     [0] the group has ended
        n lines    the rounds of each worker: see dvkernels/kernels/cpu/engine/shm_barrier.py
    texts          of each worker: why it ended or left, and what it says in two rounds a channel
    places         of each channel, for even and odd rounds, of each worker: what it brings; and
                   one or more to which all workers write

A line is 64 bytes, written by one worker only (but for the word that ends the group).
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from dvkernels.cluster import procfs

__all__: list[str] = []

NUM_CHANNELS = 2
# What one round carries at most: two pieces of each worker fit into the second cache. 64 MiB of
# two processes took 14.3 ms with 64 KiB, 13.8 with 128, 12.8 with 256 and 12.7 with 512 KiB
# (medians of 9; 2 busy cores of an AMD EPYC, November 2026).
PLACE_NBYTES = 256 * 1024
_LINE, _WORDS = 64, 8
_TEXT_NBYTES = 2048
_PAGE = 4096
_PROCESS, _ENDED, _LEFT = 0, 1, 2


class Segment:
    """A view of the memory, of one worker.

    Parameters
    ----------
    memory : ndarray of uint8
        Cleared, of :meth:`nbytes_for` bytes at least, beginning on a cache line. All workers see
        the same.
    rank, size : int
        This worker, and how many share the memory.
    num_more : int
        How many places there are in each round behind those of the workers.
    place_nbytes : int
        How large a place is.
    """

    def __init__(
        self,
        memory: Any,
        rank: int,
        size: int,
        num_more: int = 1,
        place_nbytes: int = PLACE_NBYTES,
    ) -> None:
        self.rank, self.size = rank, size
        self._memory = memory
        lines, texts, places = _layout(size)
        self._words = memory[:texts].view(np.int64).reshape(-1, _WORDS)
        self._address = memory.ctypes.data
        self._channels = [lines + k * (1 + size) for k in range(NUM_CHANNELS)]
        count = 1 + 2 * NUM_CHANNELS
        self._texts = _part(memory, texts, (count, size, _TEXT_NBYTES))
        self._places = _part(memory, places, (NUM_CHANNELS, 2, size + num_more, place_nbytes))
        self._words[1 + rank, _PROCESS] = os.getpid()

    @staticmethod
    def nbytes_for(size: int, num_more: int = 1, place_nbytes: int = PLACE_NBYTES) -> int:
        """Return how much memory so many workers need."""
        return _layout(size)[2] + NUM_CHANNELS * 2 * (size + num_more) * place_nbytes

    @staticmethod
    def clear(memory: Any, size: int) -> None:
        """Make the memory what the first worker must find; one of them does this for all."""
        memory[: _layout(size)[1]] = 0

    def lines(self, channel: int) -> int:
        """Return the address of the lines of a channel's rounds."""
        return int(self._address + _LINE * (self._channels[channel] + 1))

    def rounds(self, channel: int) -> Any:
        """Return the lines of a channel's rounds, a row for each worker."""
        first = self._channels[channel] + 1
        return self._words[first : first + self.size]

    def places(self, channel: int) -> Any:
        """Return bytes by the parity of the round and by worker, those of all at the end."""
        return self._places[channel]

    # -- what workers say ------------------------------------------------------------------------

    def say(self, channel: int, parity: int, text: str) -> None:
        """Say something in a round."""
        self._write(1 + 2 * channel + parity, text)

    def said(self, channel: int, parity: int, worker: int) -> str:
        """Return what a worker said in a round."""
        return self._read(1 + 2 * channel + parity, worker)

    def end(self, kind: int, text: str) -> None:
        """End every round of the group, now and later; ``kind`` is above 0."""
        self._write(0, text)
        self._words[1 + self.rank, _ENDED] = kind
        for first in self._channels:
            self._words[first, 0] = 1

    def why_ended(self) -> tuple[int, str] | None:
        """Return what the first worker that ended the group said."""
        for worker in range(self.size):
            kind = int(self._words[1 + worker, _ENDED])
            if kind:
                return kind, self._read(0, worker)
        return None

    def leave(self, text: str) -> None:
        """Say that this worker comes to no further round."""
        if not self._words[1 + self.rank, _ENDED]:
            self._write(0, text)
        self._words[1 + self.rank, _LEFT] = 1

    def why_left(self, worker: int) -> str | None:
        """Return what a worker said when it left; None: it has not."""
        return self._read(0, worker) if self._words[1 + worker, _LEFT] else None

    def process_of(self, worker: int) -> int:
        """Return the number of a worker's process."""
        return int(self._words[1 + worker, _PROCESS])

    def is_alive(self, worker: int) -> bool:
        """Tell whether a worker's process exists."""
        return procfs.state_of(self.process_of(worker)) not in ("Z", "X")

    def _write(self, slot: int, text: str) -> None:
        held = text.encode(errors="replace")[: _TEXT_NBYTES - 1]
        target = self._texts[slot, self.rank]
        target[: len(held)] = np.frombuffer(held, np.uint8)
        target[len(held)] = 0

    def _read(self, slot: int, worker: int) -> str:
        held: bytes = self._texts[slot, worker].tobytes()
        return held[: held.index(0)].decode(errors="replace")


def _part(memory: Any, start: int, shape: tuple[int, ...]) -> Any:
    return memory[start : start + math.prod(shape)].reshape(shape)


def _layout(size: int) -> tuple[int, int, int]:
    """Return the line of the first channel, and the bytes at which texts and places begin."""
    lines = 1 + size
    texts = _LINE * (lines + NUM_CHANNELS * (1 + size))
    places = texts + (1 + 2 * NUM_CHANNELS) * size * _TEXT_NBYTES
    return lines, texts, -(-places // _PAGE) * _PAGE
