"""Parts on their way around the hosts: who receives one adds its own, and sends it on.

The way of each part says ``schedules/host_parts.py``. A worker carries all of them at once:
whenever it is asked about any, every one that can goes a step further, those of the next pieces
among them, so that others wait no longer than they must.

Sums travel as they are added up, of half types in float32, and are rounded once, where the part
ends. Its result goes around in its own type, so all workers get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

from dvkernels.communicators import accumulation
from dvkernels.communicators.accumulation import Accumulation
from dvkernels.communicators.workers.mpi.point_to_point import PointToPoint
from dvkernels.communicators.workers.wait import Request
from dvkernels.kernels.cpu import direct
from dvkernels.schedules import host_parts
from dvkernels.schedules.host_parts import Hop

__all__: list[str] = []

# Beyond the tags of an exchange. Of n workers they end below 8 n + 4, where MPI allows 32767 at
# least and those in use allow millions.
_FIRST_TAG = 4
_LEGS = 2  # sums, then results
_AT_ONCE = 4  # more pieces than are under way

_Walk = Iterator[Request]


@final
class HostRing:
    """One worker's side of all parts that are on their way around two hosts or more.

    Parameters
    ----------
    traffic : PointToPoint
    placed : sequence of int
        The number of each worker's host.

    Notes
    -----
    What fails half-way stays here with its memory: a message that comes late must not be written to
    memory that has become another's.
    """

    def __init__(self, traffic: PointToPoint, placed: Sequence[int]) -> None:
        self._traffic = traffic
        self._stops = host_parts.ring(placed, traffic.rank)
        self._last = max(placed)
        self._laps: list[_Lap] = []

    def start(
        self,
        number: int,
        own: Mapping[int, Any],
        results: Sequence[Any],
        how: Accumulation,
        new: Callable[[int, Any], Any],
    ) -> Request:
        """Send the parts of a piece around; nothing moves before somebody asks for it.

        Parameters
        ----------
        number : int
            Of the piece.
        own : mapping of int to array
            By part, what this host has of those that come by, as ``how.wide``. They stay as they
            are until a part's result is there, which may lie in the same place.
        results : sequence of array
            By part, where to write the results of those that come by.
        how : Accumulation
        new : callable
            Returns memory, of a size and a dtype, that stays until the piece is around.
        """
        lap = _Lap(self.move)
        for stop in self._stops:
            if own[stop.part].size:
                tag = _LEGS * (number % _AT_ONCE * self._traffic.size + stop.part) + _FIRST_TAG
                lap.add(self._walk(stop, tag, own[stop.part], results[stop.part], how, new))
        self._laps.append(lap)
        return lap

    def move(self) -> None:
        """Let every part go on that can."""
        self._laps = [lap for lap in self._laps if not lap.move()]

    def _walk(
        self,
        stop: Hop,
        tag: int,
        own: Any,
        result: Any,
        how: Accumulation,
        new: Callable[[int, Any], Any],
    ) -> _Walk:
        """Yield, one after another, what has to be done before a part goes on."""
        traffic, total = self._traffic, own
        is_end = stop.position == self._last
        if stop.position > 0:
            received = new(own.size, how.wide)
            yield traffic.receive(received, stop.source, tag)
            total = result if is_end and how.wide == result.dtype else received
            direct.reduce([received, own], how.op, out=total)
        if is_end:
            how.divide(total)
            if total is not result:
                accumulation.write(total, result)
        else:
            yield traffic.send(total, stop.target, tag)
            yield traffic.receive(result, stop.source, tag + 1)
        if stop.position != self._last - 1:  # else the next one is where the result comes from
            yield traffic.send(result, stop.target, tag + 1)


class _Lap:
    """The parts of one piece, as a request."""

    def __init__(self, move_all: Callable[[], None]) -> None:
        self._move_all = move_all
        self._parts: list[_Part] = []

    def add(self, walk: _Walk) -> None:
        self._parts.append(_Part(walk))

    def move(self) -> bool:
        """Let each part go on that can; tell whether all are around."""
        self._parts = [part for part in self._parts if not part.move()]
        return not self._parts

    def Test(self) -> bool:
        """Let the parts of all pieces go on; tell whether those of this one are around."""
        self._move_all()
        return not self._parts


class _Part:
    """A walk, and what it waits for."""

    def __init__(self, walk: _Walk) -> None:
        self._walk = walk
        self._awaited: Request | None = None

    def move(self) -> bool:
        """Go on as far as it goes; tell whether that is the end."""
        while self._awaited is None or self._awaited.Test():
            awaited = next(self._walk, None)
            if awaited is None:
                return True
            self._awaited = awaited
        return False
