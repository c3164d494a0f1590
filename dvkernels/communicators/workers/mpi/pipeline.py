"""Pieces of arrays in flight between hosts: their stages, and the pipeline that overlaps them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias, final

import numpy as np

from dvkernels.communicators import accumulation
from dvkernels.communicators.accumulation import Accumulation
from dvkernels.communicators.workers.mpi import point_to_point
from dvkernels.communicators.workers.mpi.point_to_point import Finish, PointToPoint, Request
from dvkernels.communicators.workers.mpi.ring import HostRing
from dvkernels.communicators.workers.shm.staging import Staging
from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels.cpu import direct
from dvkernels.schedules import multi_leader, partition

__all__: list[str] = []

Piece: TypeAlias = Iterator[None]  # each next() carries out one stage

_TO_REDUCE, _RESULT = 1, 2  # tags
_LINE = 64
_STAGES = 4  # of a piece, after it has been staged
# The number of stages during which a piece needs its scratch memory.
_EXCHANGE_STAGES, _RING_STAGES = 2, 3
_DONE = object()


@final
class PiecePipeline:
    """One worker's side of the pieces in flight over one channel."""

    def __init__(self, p2p: PointToPoint, staging: Staging, hosts: Sequence[int]) -> None:
        self._p2p, self._staging = p2p, staging
        self._rank, self._size = p2p.rank, p2p.size
        self._roles = multi_leader.roles(hosts, self._rank)
        self._peers = [worker for worker in self._roles.gateways if worker != self._rank]
        self._ring = HostRing(p2p, hosts)
        self._scratch = [_Scratch() for _ in range(_RING_STAGES)]
        # Requests of the pieces in flight. After a failed collective they are kept alive: a late
        # message must not be written to memory that has been reused.
        self._posted: list[list[Request]] = [[] for _ in range(_STAGES)]

    def run(self, pieces: Iterable[Piece], finish: Finish) -> None:
        """Run the pieces through their stages, starting one at each host barrier.

        after barrier   0         1         2         3         4
        piece 0         scatter   add       gather    copy
        piece 1                   scatter   add       gather    copy

        scatter: reduce the parts within the host, send them; add: add the hosts' parts, send the
        sum; gather: receive the sums; copy: copy them to the target. A piece is staged before its
        first barrier. In a ring, add and gather advance whenever this worker waits. The newest
        piece goes first: its messages travel during the stages of the older pieces.
        """
        upcoming = iter(pieces)
        in_flight: list[Piece] = []
        while True:
            piece = next(upcoming, None)
            if piece is not None:
                next(piece)
                in_flight.insert(0, piece)
            if not in_flight:
                break
            self._staging.arrive()
            finish(self._has_host_arrived)
            in_flight = [each for each in in_flight if next(each, _DONE) is not _DONE]
        self._posted = [[] for _ in range(_STAGES)]

    def _has_host_arrived(self) -> bool:
        """Return whether all workers of the host are at the barrier; progress messages if not."""
        if self._staging.all_arrived():
            return True
        self._ring.progress()  # another host may wait for this worker's messages
        self._p2p.progress()
        return False

    # -- pieces -----------------------------------------------------------------------------------

    def exchange(
        self, number: int, target: HostArray, source: HostArray, how: Accumulation, finish: Finish
    ) -> Piece:
        """All-reduce piece ``number``: a reduce-scatter and an all-gather over the hosts."""
        rank, p2p = self._rank, self._p2p
        targets, staged = self._cut(target), self._staging.stage(number, source, how.wide)
        yield
        scratch = self._cleared_scratch(number % _EXCHANGE_STAGES)
        received = {peer: scratch.empty(targets[rank].size, how.wide) for peer in self._peers}
        requests = self._posted[number % _STAGES] = [
            p2p.receive(received[peer], peer, _TO_REDUCE) for peer in self._peers
        ]
        for part, on_host in self._reduced_on_host(staged, how, scratch):
            if part != rank:
                requests.append(p2p.send(on_host, part, _TO_REDUCE))
            else:
                received[rank] = on_host
        yield
        finish(point_to_point.all_complete(requests))
        results = self._staging.results(number, targets)
        in_order = [received[worker] for worker in self._roles.gateways]
        _reduce_between_hosts(in_order, results[rank], how, scratch)
        yield from self._gather_parts(number, results, targets, finish)

    def ring(
        self, number: int, target: HostArray, source: HostArray, how: Accumulation, finish: Finish
    ) -> Piece:
        """All-reduce piece ``number`` by the ring of the hosts."""
        targets, staged = self._cut(target), self._staging.stage(number, source, how.wide)
        yield
        scratch = self._cleared_scratch(number % _RING_STAGES)
        on_host = dict(self._reduced_on_host(staged, how, scratch))
        results = self._staging.results(number, targets)
        request = self._ring.start(number, on_host, results, how, scratch.empty)
        yield
        yield
        finish(request.Test)
        yield
        self._staging.copy_out(results, targets)

    def gather(self, number: int, targets: Sequence[HostArray], finish: Finish) -> Piece:
        """All-gather piece ``number`` of each worker's bytes."""
        yield
        yield
        results = self._staging.results(number, targets)
        if results[self._rank] is not targets[self._rank]:
            results[self._rank][...] = targets[self._rank]
        yield from self._gather_parts(number, results, targets, finish)

    def scatter_gather(self, number: int, target: HostArray, root: int, finish: Finish) -> Piece:
        """Broadcast piece ``number``: scatter its parts to all workers, which all-gather them.

        The root sends about 1 + (H - 1)/n pieces to H hosts of n workers, instead of H - 1 pieces.
        """
        rank, p2p = self._rank, self._p2p
        targets = self._cut(target)
        results = self._staging.results(number, targets)
        yield
        requests = self._posted[number % _STAGES] = []
        if rank == root:
            for worker, part in enumerate(targets):
                if worker != rank:
                    requests.append(p2p.send(part, worker, _TO_REDUCE))
            if results[rank] is not targets[rank]:
                results[rank][...] = targets[rank]
        else:
            requests.append(p2p.receive(results[rank], root, _TO_REDUCE))
        yield
        finish(point_to_point.all_complete(requests))
        yield from self._gather_parts(number, results, targets, finish)

    # -- stages -----------------------------------------------------------------------------------

    def _gather_parts(
        self,
        number: int,
        results: Sequence[HostArray],
        targets: Sequence[HostArray],
        finish: Finish,
    ) -> Piece:
        """Send this worker's part to every other host; receive the parts that enter by it."""
        p2p, rank = self._p2p, self._rank
        requests = self._posted[number % _STAGES] = [
            *(p2p.send(results[rank], peer, _RESULT) for peer in self._peers),
            *(
                p2p.receive(results[part], part, _RESULT)
                for part in self._roles.parts
                if part != rank
            ),
        ]
        yield
        finish(point_to_point.all_complete(requests))
        yield
        self._staging.copy_out(results, targets)

    def _cut(self, array: HostArray) -> list[HostArray]:
        """Return the part of each worker."""
        return [array[start:stop] for start, stop in partition.parts(array.size, self._size)]

    def _cleared_scratch(self, index: int) -> _Scratch:
        scratch = self._scratch[index]
        scratch.clear()
        return scratch

    def _reduced_on_host(
        self, staged: Sequence[HostArray], how: Accumulation, scratch: _Scratch
    ) -> Iterator[tuple[int, HostArray]]:
        """Yield the parts that leave by this worker, with the sums of this host's sources."""
        bounds = partition.parts(staged[0].size, self._size)
        for part in self._roles.parts:
            sources = [each[slice(*bounds[part])] for each in staged]
            total = sources[0]
            if len(sources) > 1:
                total = scratch.empty(total.size, how.wide)
                direct.reduce(sources, how.op, out=total)
            yield part, total


def _reduce_between_hosts(
    sources: list[HostArray], result: HostArray, how: Accumulation, scratch: _Scratch
) -> None:
    """Reduce the hosts' sums of a part to its result."""
    is_in_place = any(np.may_share_memory(source, result) for source in sources)
    total = result
    if is_in_place or how.wide != result.dtype:
        total = scratch.empty(result.size, how.wide)
    direct.reduce(sources, how.op, out=total)
    how.divide(total)
    if total is not result:
        accumulation.write(total, result)


class _Scratch:
    """Bump allocator of scratch memory, reused from piece to piece."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def clear(self) -> None:
        """Free all arrays."""
        self._used = 0

    def empty(self, size: int, dtype: np.dtype[Any]) -> HostArray:
        """Return an uninitialized array, aligned to a cache line."""
        start = -(-self._used // _LINE) * _LINE
        self._used = start + size * dtype.itemsize
        if self._used > len(self._memory):
            # Earlier arrays keep the old memory alive.
            self._memory = np.empty(2 * self._used, np.uint8)
        return self._memory[start : self._used].view(dtype)
