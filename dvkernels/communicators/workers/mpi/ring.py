"""Ring all-reduce between hosts: each part travels around the hosts, and each adds its own.

The algorithm of P. Patarasuk and X. Yuan, J. Parallel Distrib. Comput. 69(2), 117-124 (2009),
doi:10.1016/j.jpdc.2008.09.002, with hosts as ranks and the parts of ``schedules/multi_leader.py``:
a part travels H - 1 steps as a partial sum (reduce-scatter), and H - 1 steps as the result
(all-gather). A worker progresses all parts at once, also those of later pieces, whenever it tests
any of them, so that other workers wait no longer than necessary.

Partial sums of half types travel as float32, and are rounded once, on the host where the part ends.
The result travels in its own element type, so all workers get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, final

import numpy as np

from dvkernels.communicators import accumulation
from dvkernels.communicators.accumulation import Accumulation
from dvkernels.communicators.workers.mpi.point_to_point import PointToPoint, Request
from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels.cpu import direct
from dvkernels.schedules import multi_leader
from dvkernels.schedules.multi_leader import Hop

__all__: list[str] = []

# Above the tags of the exchange. With n workers all tags are below 8 n + 4; MPI guarantees 32767,
# and common implementations allow millions.
_FIRST_TAG = 4
_TAGS_PER_PART = 2  # partial sums and results
_MAX_PIECES = 4  # more than are in flight

_Schedule: TypeAlias = Iterator[Request]
_Allocator: TypeAlias = Callable[[int, np.dtype[Any]], HostArray]


@final
class HostRing:
    """One worker's side of the ring all-reduce over two hosts or more.

    Parts of a failed collective stay here with their memory: a late message must not be written to
    memory that has been reused.
    """

    def __init__(self, p2p: PointToPoint, hosts: Sequence[int]) -> None:
        self._p2p = p2p
        self._hops = multi_leader.ring(hosts, p2p.rank)
        self._last = max(hosts)
        self._pieces: list[_RingRequest] = []

    def start(
        self,
        number: int,
        own: Mapping[int, HostArray],
        results: Sequence[HostArray],
        how: Accumulation,
        empty: _Allocator,
    ) -> Request:
        """Start the parts of piece ``number``; nothing moves before the first test or progress.

        ``own`` and ``results`` are, by part, this host's contributions of dtype ``how.wide`` and
        the result buffers. A contribution is unchanged until the part's result is there, which may
        be in the same memory. ``empty`` allocates scratch memory that lives as long as the piece.
        """
        first_tag = _TAGS_PER_PART * (number % _MAX_PIECES) * self._p2p.size + _FIRST_TAG
        parts = [
            _PartInFlight(
                self._schedule(
                    hop, first_tag + _TAGS_PER_PART * hop.part, own[hop.part], results[hop.part],
                    how, empty,
                )
            )
            for hop in self._hops
            if own[hop.part].size
        ]  # fmt: skip
        request = _RingRequest(parts, self.progress)
        self._pieces.append(request)
        return request

    def progress(self) -> None:
        """Progress every part that can go on."""
        self._pieces = [request for request in self._pieces if not request.progress()]

    def _schedule(
        self,
        hop: Hop,
        tag: int,
        own: HostArray,
        result: HostArray,
        how: Accumulation,
        empty: _Allocator,
    ) -> _Schedule:
        """Yield the requests that one part waits for, one after another."""
        p2p, total = self._p2p, own
        is_end = hop.position == self._last
        if hop.position > 0:
            received = empty(own.size, how.wide)
            yield p2p.receive(received, hop.source, tag)
            total = result if is_end and how.wide == result.dtype else received
            direct.reduce([received, own], how.op, out=total)
        if is_end:
            how.divide(total)
            if total is not result:
                accumulation.write(total, result)
        else:
            yield p2p.send(total, hop.target, tag)
            yield p2p.receive(result, hop.source, tag + 1)
        if hop.position != self._last - 1:  # else the next host already has the result
            yield p2p.send(result, hop.target, tag + 1)


class _RingRequest:
    """Request of the parts of one piece."""

    def __init__(self, parts: list[_PartInFlight], progress_all: Callable[[], None]) -> None:
        self._parts = parts
        self._progress_all = progress_all

    def progress(self) -> bool:
        """Progress each part that can go on; return whether all are complete."""
        self._parts = [part for part in self._parts if not part.progress()]
        return not self._parts

    def Test(self) -> bool:
        """Progress the parts of all pieces; return whether this piece is complete."""
        self._progress_all()
        return not self._parts


class _PartInFlight:
    """One part's schedule, and the request that it waits for."""

    def __init__(self, schedule: _Schedule) -> None:
        self._schedule = schedule
        self._awaited: Request | None = None

    def progress(self) -> bool:
        """Advance as far as possible; return whether the part is complete."""
        while self._awaited is None or self._awaited.Test():
            awaited = next(self._schedule, None)
            if awaited is None:
                return True
            self._awaited = awaited
        return False
