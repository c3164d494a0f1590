"""Staging of arrays between the workers of one host, for collectives between hosts.

An array passes through shared buffers in pieces, numbered from 0 in each collective. Each worker
stages one piece between two host barriers. A staging buffer serves every second piece, a result
buffer every fourth: the result of piece k is written after barrier k, and read after barrier k + 3
(see ``mpi/collectives.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol, final

import numpy as np

from dvkernels.communicators.workers import wait
from dvkernels.communicators.workers.shm.segment import Segment
from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels.cpu.engine import shm_barrier
from dvkernels.schedules import partition

__all__: list[str] = []

NUM_RESULTS = 4
# Bytes of a piece. A message is one worker's part of a piece; with few workers that is long enough
# for a network. 64 MiB on 2 x 2 workers of simulated hosts took 57 ms with 1 MiB, 96 with 512 KiB
# and more with less (fastest of 7; 2 busy cores of an AMD EPYC, MPICH 5.0.2, November 2026).
PIECE_NBYTES = 1024 * 1024


class Staging(Protocol):
    """One worker's view of the staging buffers of its host."""

    def stage(self, number: int, piece: HostArray, dtype: np.dtype[Any]) -> list[HostArray]:
        """Stage a piece as ``dtype``; return views of the staging buffers of all workers.

        They are valid from the next host barrier to the one after it.
        """

    def results(self, number: int, targets: Sequence[HostArray]) -> list[HostArray]:
        """Return result buffers of a piece, in shape and dtype like the targets."""

    def copy_out(self, results: Sequence[HostArray], targets: Sequence[HostArray]) -> None:
        """Copy complete results to the targets."""

    def arrive(self) -> None:
        """Arrive at the next host barrier, without waiting."""

    def all_arrived(self) -> bool:
        """Return whether all workers of the host have arrived at the barrier."""


@final
class LocalStaging:
    """Staging of a host with one worker, which works in its own arrays: nothing is copied."""

    def stage(self, number: int, piece: HostArray, dtype: np.dtype[Any]) -> list[HostArray]:
        """Return the piece."""
        return [piece.astype(dtype, copy=False)]

    def results(self, number: int, targets: Sequence[HostArray]) -> list[HostArray]:
        """Return the targets."""
        return list(targets)

    def copy_out(self, results: Sequence[HostArray], targets: Sequence[HostArray]) -> None:
        """Do nothing: the results are the targets."""

    def arrive(self) -> None:
        """Do nothing: there is no other worker."""

    def all_arrived(self) -> bool:
        """Return True."""
        return True


@final
class SharedStaging:
    """Staging between several workers of a host, in a shared-memory segment.

    The segment has ``NUM_RESULTS // 2`` result buffers, and buffers of ``PIECE_NBYTES``.
    ``may_spin``: each worker has a core of its own.
    """

    def __init__(self, segment: Segment, channel: int, may_spin: bool) -> None:
        self._rank, self._size = segment.rank, segment.size
        self._lines = segment.lines(channel)
        self._buffers = segment.buffers(channel)
        self._pauses = wait.HOST_SPINS.of(may_spin)
        self._barrier = 0

    def stage(self, number: int, piece: HostArray, dtype: np.dtype[Any]) -> list[HostArray]:
        """Copy the piece to this worker's staging buffer."""
        nbytes = piece.size * dtype.itemsize
        buffers = [
            buffer[:nbytes].view(dtype) for buffer in self._buffers[number & 1, : self._size]
        ]
        buffers[self._rank][...] = piece
        return buffers

    def results(self, number: int, targets: Sequence[HostArray]) -> list[HostArray]:
        """Return consecutive parts of one result buffer."""
        buffer = self._buffers[number & 1, self._size + (number >> 1 & 1)]
        starts = partition.starts(target.nbytes for target in targets)
        return [
            buffer[start:stop].view(target.dtype)
            for target, (start, stop) in zip(targets, itertools.pairwise(starts), strict=True)
        ]

    def copy_out(self, results: Sequence[HostArray], targets: Sequence[HostArray]) -> None:
        """Copy the results to the targets."""
        for result, target in zip(results, targets, strict=True):
            target[...] = result

    def arrive(self) -> None:
        """Record the arrival in this worker's control line."""
        self._barrier += 1
        shm_barrier.arrive(self._lines, self._rank, self._barrier, 0, 0)

    def all_arrived(self) -> bool:
        """Poll the control lines of all workers for some microseconds."""
        round_args = (self._lines, self._size, self._rank, self._barrier)
        return bool(shm_barrier.await_round(*round_args, self._pauses) == shm_barrier.AGREED)
