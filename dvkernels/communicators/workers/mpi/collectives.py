"""Collectives between hosts: pipelined pieces over point-to-point messages.

Three algorithms for an all-reduce; with each of them all workers get the same bits:

    gather     all-gather of the arrays, which every worker reduces in rank order; short arrays
    exchange   reduce-scatter + all-gather [1]_, after a reduction within each host: worker j
               receives part j of every host, adds the parts in the order of the hosts, and sends
               the sum to every host
    ring       the ring all-reduce [2]_ over the hosts, after a reduction within each host

A broadcast is scatter + all-gather [3]_. Unlike the recursive halving and doubling of [1]_ and the
binomial scatter of [3]_, both phases send each part directly to its worker: two messages one after
the other, whatever the number of workers. ``schedules/multi_leader.py`` holds the schedules, and
``schedules/cost_model.py`` chooses the algorithm.

MPI transfers bytes only, and the kernels do the arithmetic: MPI's reductions lack half types, do
not define NaN in a minimum, and need not give all ranks the same bits. No message is longer than a
piece, so counts stay small however long the array is.

References
----------
.. [1] R. Rabenseifner's algorithm in R. Thakur, R. Rabenseifner, W. Gropp, Int. J. High Perform.
   Comput. Appl. 19(1), 49-66 (2005), doi:10.1177/1094342005051521.
.. [2] P. Patarasuk, X. Yuan, J. Parallel Distrib. Comput. 69(2), 117-124 (2009),
   doi:10.1016/j.jpdc.2008.09.002.
.. [3] Van de Geijn's algorithm: E. Chan, M. Heimlich, A. Purkayastha, R. van de Geijn,
   Concurrency Comput. Pract. Exper. 19(13), 1749-1783 (2007), doi:10.1002/cpe.1206.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import numpy as np

from dvkernels.communicators import accumulation
from dvkernels.communicators.workers.mpi.pipeline import Piece, run_pipeline
from dvkernels.communicators.workers.mpi.point_to_point import PointToPoint
from dvkernels.communicators.workers.mpi.request import AllRequests, Finish
from dvkernels.communicators.workers.mpi.ring import HostRing
from dvkernels.communicators.workers.shm.staging import PIECE_NBYTES, Staging
from dvkernels.kernels.cpu import direct
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import multi_leader, partition
from dvkernels.schedules.cost_model import Routing

__all__: list[str] = []

_TO_REDUCE, _RESULT = 1, 2  # tags
_MAX_GATHERS = 64
_LINE = 64
_STAGES = 4  # of a piece, after it has been staged
# The number of stages during which a piece needs its scratch memory.
_EXCHANGE_STAGES, _RING_STAGES = 2, 3


@final
class MpiCollectives:
    """One worker's side of the collectives between hosts, over one channel.

    Parameters
    ----------
    p2p : PointToPoint
        Messages between the workers, used by this object only.
    staging : Staging
        The staging buffers of this host's workers.
    hosts : sequence of int
        The host number of each worker.
    routing : Routing
        Chooses the algorithm of a reduction; the same on all workers.

    Notes
    -----
    Each method takes ``finish``, which waits for a request, or raises. All workers call the same
    methods, with arrays of the same sizes.
    """

    def __init__(
        self, p2p: PointToPoint, staging: Staging, hosts: Sequence[int], routing: Routing
    ) -> None:
        self._p2p, self._staging, self._routing = p2p, staging, routing
        self._rank, self._size = p2p.rank, p2p.size
        self._roles = multi_leader.roles(hosts, self._rank)
        self._ring = HostRing(p2p, hosts)
        self._peers = [worker for worker in self._roles.gateways if worker != self._rank]
        self._is_flat = len({*hosts}) == self._size
        self._scratch = [_Scratch() for _ in range(_RING_STAGES)]
        self._gathers: dict[int, tuple[Any, Any, Any]] = {}  # by the bytes per worker
        # Requests of the pieces in flight. After a failed collective they are kept alive: a late
        # message must not be written to memory that has been reused.
        self._posted: list[list[Any]] = [[] for _ in range(_STAGES)]

    # -- collectives ------------------------------------------------------------------------------

    def all_reduce(self, target: Any, source: Any, op: Reduction, finish: Finish) -> None:
        """Write the reduction of all sources to the target: flat arrays of one dtype."""
        if not source.size:
            return
        how = accumulation.of(op, source.dtype, self._size)
        algorithm = self._routing.algorithm_for(
            self._size, len(self._roles.gateways), source.nbytes, source.size * how.wide.itemsize
        )
        if algorithm == "gather":
            self._gather_and_reduce(target, source, op, finish)
            return
        if algorithm == "exchange" and self._is_flat:  # one level: the kernels round and divide
            how = accumulation.Accumulation(op, source.dtype, 1)
        all_reduce_piece = (
            self._ring_all_reduce if algorithm == "ring" else self._reduce_scatter_all_gather
        )
        step = PIECE_NBYTES // how.wide.itemsize
        pieces = (
            all_reduce_piece(
                k, target[start : start + step], source[start : start + step], how, finish
            )
            for k, start in enumerate(range(0, source.size, step))
        )
        self._run(pieces, finish)

    def all_gather(self, targets: Sequence[Any], finish: Finish) -> None:
        """All-gather bytes: ``targets[rank]`` holds this worker's, the others are written."""
        step = max(1, PIECE_NBYTES // self._size)
        longest = max(map(len, targets))
        pieces = (
            self._all_gather_piece(k, [each[start : start + step] for each in targets], finish)
            for k, start in enumerate(range(0, longest, step))
        )
        self._run(pieces, finish)

    def broadcast(self, target: Any, root: int, finish: Finish) -> None:
        """Write the root's bytes, which its target holds, to every target."""
        pieces = (
            self._scatter_all_gather(k, target[start : start + PIECE_NBYTES], root, finish)
            for k, start in enumerate(range(0, len(target), PIECE_NBYTES))
        )
        self._run(pieces, finish)

    # -- short arrays -----------------------------------------------------------------------------

    def _gather_and_reduce(self, target: Any, source: Any, op: Reduction, finish: Finish) -> None:
        own, gathered, request = self._gather_request(source.nbytes)
        own[:] = source.view(np.uint8)
        request.Start()
        finish(request)
        direct.reduce([each.view(source.dtype) for each in gathered], op, out=target)

    def _gather_request(self, nbytes: int) -> tuple[Any, Any, Any]:
        """Return a persistent all-gather of ``nbytes`` per worker: a step repeats its sizes."""
        found = self._gathers.get(nbytes)
        if found is None:
            if len(self._gathers) == _MAX_GATHERS:
                _, _, request = self._gathers.pop(next(iter(self._gathers)))
                request.Free()
            own, gathered = np.empty(nbytes, np.uint8), np.empty((self._size, nbytes), np.uint8)
            request = self._p2p.all_gather(own, gathered)
            found = self._gathers[nbytes] = own, gathered, request
        return found

    # -- pieces -----------------------------------------------------------------------------------

    def _run(self, pieces: Iterable[Piece], finish: Finish) -> None:
        """Run the pieces through their stages, starting one at each host barrier.

        after barrier   0         1         2         3         4
        piece 0         scatter   add       gather    copy
        piece 1                   scatter   add       gather    copy

        scatter: reduce the parts within the host, send them; add: add the hosts' parts, send the
        sum; gather: receive the sums; copy: copy them to the target. A piece is staged before its
        first barrier. In a ring, add and gather advance whenever this worker waits.
        """

        def before_turn(piece: Piece | None) -> None:
            if piece is not None:
                next(piece)
            self._staging.arrive()
            finish(_HostBarrier(self._staging, self._progress))

        run_pipeline(pieces, before_turn)
        self._posted = [[] for _ in range(_STAGES)]

    def _progress(self) -> None:
        """Progress messages during a host barrier: another host may wait for this worker's."""
        self._ring.progress()
        self._p2p.progress()

    def _reduce_scatter_all_gather(
        self, number: int, target: Any, source: Any, how: accumulation.Accumulation, finish: Finish
    ) -> Piece:
        rank, p2p = self._rank, self._p2p
        parts = [slice(*bounds) for bounds in partition.parts(source.size, self._size)]
        targets = [target[part] for part in parts]
        staged = self._staging.stage(number, source, how.wide)
        yield
        scratch = self._cleared_scratch(number % _EXCHANGE_STAGES)
        received = {peer: scratch.empty(targets[rank].size, how.wide) for peer in self._peers}
        requests = self._posted[number % _STAGES] = [
            p2p.receive(received[peer], peer, _TO_REDUCE) for peer in self._peers
        ]
        for part in self._roles.parts:
            on_host = self._reduce_on_host([each[parts[part]] for each in staged], how, scratch)
            if part != rank:
                requests.append(p2p.send(on_host, part, _TO_REDUCE))
            else:
                received[rank] = on_host
        yield
        finish(AllRequests(requests))
        results = self._staging.results(number, targets)
        in_order = [received[worker] for worker in self._roles.gateways]
        self._reduce_between_hosts(in_order, results[rank], how, scratch)
        requests = self._all_gather_parts(number, results)
        yield
        finish(AllRequests(requests))
        yield
        self._staging.copy_out(results, targets)

    def _ring_all_reduce(
        self, number: int, target: Any, source: Any, how: accumulation.Accumulation, finish: Finish
    ) -> Piece:
        parts = [slice(*bounds) for bounds in partition.parts(source.size, self._size)]
        targets = [target[part] for part in parts]
        staged = self._staging.stage(number, source, how.wide)
        yield
        scratch = self._cleared_scratch(number % _RING_STAGES)
        on_host = {
            part: self._reduce_on_host([each[parts[part]] for each in staged], how, scratch)
            for part in self._roles.parts
        }
        results = self._staging.results(number, targets)
        request = self._ring.start(number, on_host, results, how, scratch.empty)
        yield
        yield
        finish(request)
        yield
        self._staging.copy_out(results, targets)

    def _cleared_scratch(self, index: int) -> _Scratch:
        scratch = self._scratch[index]
        scratch.clear()
        return scratch

    def _reduce_on_host(
        self, sources: list[Any], how: accumulation.Accumulation, scratch: _Scratch
    ) -> Any:
        """Return the sum of this host's sources of a part; a single source as it is."""
        if len(sources) == 1:
            return sources[0]
        total = scratch.empty(sources[0].size, how.wide)
        direct.reduce(sources, how.op, out=total)
        return total

    def _reduce_between_hosts(
        self, sources: list[Any], result: Any, how: accumulation.Accumulation, scratch: _Scratch
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

    def _all_gather_piece(self, number: int, targets: Sequence[Any], finish: Finish) -> Piece:
        yield
        yield
        results = self._staging.results(number, targets)
        if results[self._rank] is not targets[self._rank]:
            results[self._rank][...] = targets[self._rank]
        requests = self._all_gather_parts(number, results)
        yield
        finish(AllRequests(requests))
        yield
        self._staging.copy_out(results, targets)

    def _scatter_all_gather(self, number: int, target: Any, root: int, finish: Finish) -> Piece:
        """Broadcast a piece: scatter its parts to all workers, which then all-gather them.

        The root sends about 1 + (H - 1)/n pieces to H hosts of n workers, instead of H - 1 pieces.
        """
        rank, p2p = self._rank, self._p2p
        parts = [slice(*bounds) for bounds in partition.parts(target.size, self._size)]
        targets = [target[part] for part in parts]
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
        finish(AllRequests(requests))
        requests = self._all_gather_parts(number, results)
        yield
        finish(AllRequests(requests))
        yield
        self._staging.copy_out(results, targets)

    def _all_gather_parts(self, number: int, results: Sequence[Any]) -> list[Any]:
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
        return requests


class _HostBarrier:
    """Barrier of the workers of a host, as a request that progresses messages meanwhile."""

    def __init__(self, staging: Staging, progress: Callable[[], None]) -> None:
        self._staging, self._progress = staging, progress

    def Test(self) -> bool:
        """Return whether all workers of the host have arrived."""
        if self._staging.all_arrived():
            return True
        self._progress()
        return False


class _Scratch:
    """Bump allocator of scratch memory, reused from piece to piece."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def clear(self) -> None:
        """Free all arrays."""
        self._used = 0

    def empty(self, size: int, dtype: Any) -> Any:
        """Return an uninitialized array, aligned to a cache line."""
        start = -(-self._used // _LINE) * _LINE
        self._used = start + size * dtype.itemsize
        if self._used > len(self._memory):
            # Earlier arrays keep the old memory alive.
            self._memory = np.empty(2 * self._used, np.uint8)
        return self._memory[start : self._used].view(dtype)
