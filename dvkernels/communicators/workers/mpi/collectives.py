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

from collections.abc import Sequence
from typing import final

import numpy as np

from dvkernels.communicators import accumulation
from dvkernels.communicators.workers.mpi.pipeline import PiecePipeline
from dvkernels.communicators.workers.mpi.point_to_point import (
    Finish,
    PersistentRequest,
    PointToPoint,
)
from dvkernels.communicators.workers.shm.staging import PIECE_NBYTES, Staging
from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels.cpu import direct
from dvkernels.reduce_op import Reduction
from dvkernels.schedules.cost_model import Routing

__all__: list[str] = []

_MAX_GATHERS = 64


@final
class MpiCollectives:
    """One worker's side of the collectives between hosts, over one channel.

    ``p2p`` is used by this object only; ``hosts`` has the number of each worker's host. All workers
    call the same methods, with arrays of the same sizes.
    """

    def __init__(
        self, p2p: PointToPoint, staging: Staging, hosts: Sequence[int], routing: Routing
    ) -> None:
        self._p2p, self._size, self._routing = p2p, p2p.size, routing
        self._num_hosts = len({*hosts})
        self._pipeline = PiecePipeline(p2p, staging, hosts)
        # By the bytes per worker: this worker's buffer, those of all, and the all-gather.
        self._gathers: dict[int, tuple[HostArray, HostArray, PersistentRequest]] = {}

    def all_reduce(
        self, target: HostArray, source: HostArray, op: Reduction, finish: Finish
    ) -> None:
        """Write the reduction of all sources to the target: flat arrays of one dtype."""
        if not source.size:
            return
        how = accumulation.of(op, source.dtype, self._size)
        algorithm = self._routing.algorithm_for(
            self._size, self._num_hosts, source.nbytes, source.size * how.wide.itemsize
        )
        if algorithm == "gather":
            self._gather_and_reduce(target, source, op, finish)
            return
        if algorithm == "exchange" and self._num_hosts == self._size:
            # One level: the kernels round and divide.
            how = accumulation.Accumulation(op, source.dtype, 1)
        pipeline = self._pipeline
        all_reduce_piece = pipeline.ring if algorithm == "ring" else pipeline.exchange
        step = PIECE_NBYTES // how.wide.itemsize
        pieces = (
            all_reduce_piece(
                k, target[start : start + step], source[start : start + step], how, finish
            )
            for k, start in enumerate(range(0, source.size, step))
        )
        pipeline.run(pieces, finish)

    def all_gather(self, targets: Sequence[HostArray], finish: Finish) -> None:
        """All-gather bytes: ``targets[rank]`` holds this worker's, the others are written."""
        step = max(1, PIECE_NBYTES // self._size)
        longest = max(map(len, targets))
        pieces = (
            self._pipeline.gather(k, [each[start : start + step] for each in targets], finish)
            for k, start in enumerate(range(0, longest, step))
        )
        self._pipeline.run(pieces, finish)

    def broadcast(self, target: HostArray, root: int, finish: Finish) -> None:
        """Write the root's bytes, which its target holds, to every target."""
        pieces = (
            self._pipeline.scatter_gather(k, target[start : start + PIECE_NBYTES], root, finish)
            for k, start in enumerate(range(0, len(target), PIECE_NBYTES))
        )
        self._pipeline.run(pieces, finish)

    def _gather_and_reduce(
        self, target: HostArray, source: HostArray, op: Reduction, finish: Finish
    ) -> None:
        """All-reduce a short array: gather the arrays of all workers, and reduce them here."""
        own, gathered, request = self._gather_request(source.nbytes)
        own[:] = source.view(np.uint8)
        request.Start()
        finish(request.Test)
        direct.reduce([each.view(source.dtype) for each in gathered], op, out=target)

    def _gather_request(self, nbytes: int) -> tuple[HostArray, HostArray, PersistentRequest]:
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
