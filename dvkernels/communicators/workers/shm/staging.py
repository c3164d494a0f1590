"""What the workers of one host bring, and what comes for them: they all see it, without a message.

Arrays go by in pieces, numbered from 0 in each collective. Between two meetings each worker may
bring one piece. A place is used for every other piece, a result for every fourth: results of piece
k are written after meeting k, and read after meeting k + 3 (see ``collectives.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, final

from dvkernels.communicators.workers.shm.segment import Segment
from dvkernels.kernels.cpu.engine import shm_barrier

__all__: list[str] = []

NUM_RESULTS = 4
# What one piece holds at most. A message is a part of it, one for each worker: of few workers that
# is long enough for a network. 64 MiB of 2 x 2 pretended hosts took 57 ms with 1 MiB, 96 with 512
# KiB and more with less (fastest of 7; 2 busy cores of an AMD EPYC, MPICH 5.0.2, November 2026).
PIECE_NBYTES = 1024 * 1024
_PAUSES, _PAUSES_OF_MANY = 2000, 50  # a pause is 20 to 45 ns


class Staging(Protocol):
    """One worker's view of its host."""

    def bring(self, number: int, piece: Any, dtype: Any) -> list[Any]:
        """Show a piece to the others, as ``dtype``; return where those of all will be.

        They are there after the next meeting, until the one after it.
        """

    def results(self, number: int, targets: Sequence[Any]) -> list[Any]:
        """Return where to write what becomes of a piece: arrays like the targets."""

    def take(self, results: Sequence[Any], targets: Sequence[Any]) -> None:
        """Bring the results, when they are complete, to the targets."""

    def come(self) -> None:
        """Come to the next meeting, without waiting."""

    def is_met(self) -> bool:
        """Tell whether all workers of the host have come to the meeting."""


@final
class LocalStaging:
    """The host of one worker, which works in its own arrays: nothing is copied."""

    def bring(self, number: int, piece: Any, dtype: Any) -> list[Any]:
        """Return the piece."""
        return [piece.astype(dtype, copy=False)]

    def results(self, number: int, targets: Sequence[Any]) -> list[Any]:
        """Return the targets."""
        return list(targets)

    def take(self, results: Sequence[Any], targets: Sequence[Any]) -> None:
        """Leave the results where they are."""

    def come(self) -> None:
        """Meet nobody."""

    def is_met(self) -> bool:
        """Return True."""
        return True


@final
class SharedStaging:
    """The host of several workers, in memory that they share.

    Parameters
    ----------
    room : Segment
        With ``NUM_RESULTS // 2`` places more than workers, of ``PIECE_NBYTES``.
    channel : int
    is_roomy : bool
        Each worker has a core of its own, so waiting ones may spin.
    """

    def __init__(self, room: Segment, channel: int, is_roomy: bool) -> None:
        self._rank, self._size = room.rank, room.size
        self._lines = room.lines(channel)
        self._places = room.places(channel)
        self._pauses = _PAUSES if is_roomy else _PAUSES_OF_MANY
        self._meeting = 0

    def bring(self, number: int, piece: Any, dtype: Any) -> list[Any]:
        """Copy the piece to this worker's place."""
        nbytes = piece.size * dtype.itemsize
        places = [place[:nbytes].view(dtype) for place in self._places[number & 1, : self._size]]
        places[self._rank][...] = piece
        return places

    def results(self, number: int, targets: Sequence[Any]) -> list[Any]:
        """Return parts of one place, one behind the other."""
        place = self._places[number & 1, self._size + (number >> 1 & 1)]
        found, start = [], 0
        for target in targets:
            stop = start + target.nbytes
            found.append(place[start:stop].view(target.dtype))
            start = stop
        return found

    def take(self, results: Sequence[Any], targets: Sequence[Any]) -> None:
        """Copy them."""
        for result, target in zip(results, targets, strict=True):
            target[...] = result

    def come(self) -> None:
        """Say so in this worker's line."""
        self._meeting += 1
        shm_barrier.arrive(self._lines, self._rank, self._meeting, 0, 0)

    def is_met(self) -> bool:
        """Look at the lines of all for some microseconds."""
        given = (self._lines, self._size, self._rank, self._meeting)
        return bool(shm_barrier.await_round(*given, self._pauses) == shm_barrier.AGREED)
