"""Arrays on their way between hosts, in pieces that follow each other closely.

There are three ways for a reduction, and all workers get the same bits by each of them:

    gather     every worker gets all arrays and reduces them, in the order of the workers
    exchange   hosts reduce first, in the order of their workers; then each part goes to a worker,
               who adds up those of the hosts, in the order of their first workers, and sends the
               sum back
    ring       hosts reduce first; then each part goes around them, and each adds its own

Who sends what to whom says ``schedules/host_parts.py``, and which way is quickest
``schedules/cost_model.py``.

MPI carries bytes only, and the kernels do the arithmetic: the reductions of MPI know no half types,
do not define NaN in a minimum, and need not give all ranks the same bits. No message is longer than
a piece, so counts stay small however long the array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import numpy as np

from dvkernels.communicators import accumulation
from dvkernels.communicators.workers.mpi.point_to_point import PointToPoint
from dvkernels.communicators.workers.mpi.ring import HostRing
from dvkernels.communicators.workers.pipeline import Piece, carry
from dvkernels.communicators.workers.shm.staging import PIECE_NBYTES, Staging
from dvkernels.communicators.workers.wait import AllRequests, Finish
from dvkernels.kernels.cpu import direct
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import host_parts, partition
from dvkernels.schedules.cost_model import Routing

__all__: list[str] = []

_TO_REDUCE, _RESULT = 1, 2  # tags
_MOST_GATHERS = 64
_LINE = 64
_STAGES = 4  # of a piece, after it has been brought
# For how many stages a piece needs scratch: while sums are brought together, and around a ring.
_TOGETHER, _LONGEST = 2, 3


@final
class MpiCollectives:
    """One worker's side of moving arrays between all workers, on one channel.

    Parameters
    ----------
    traffic : PointToPoint
        Between the workers, for the use of this alone.
    host : Staging
        What this worker shares with the others of its host.
    placed : sequence of int
        The number of each worker's host.
    routing : Routing
        Which way a reduction goes; the same on all workers.

    Notes
    -----
    Each method takes ``finish``, which returns when a request is done, or raises. All workers call
    the same, with arrays of the same sizes.
    """

    def __init__(
        self, traffic: PointToPoint, host: Staging, placed: Sequence[int], routing: Routing
    ) -> None:
        self._traffic, self._host, self._routing = traffic, host, routing
        self._rank, self._size = traffic.rank, traffic.size
        self._roles = host_parts.roles(placed, self._rank)
        self._ring = HostRing(traffic, placed)
        self._others = [door for door in self._roles.gateways if door != self._rank]
        self._is_flat = len({*placed}) == self._size
        self._scratch = [_Scratch() for _ in range(_LONGEST)]
        self._gathers: dict[int, tuple[Any, Any, Any]] = {}  # by the bytes of a worker
        # Of the pieces under way. Where a collective fails they stay: a message that comes late
        # must not be written to memory that has become another's.
        self._posted: list[list[Any]] = [[] for _ in range(_STAGES)]

    # -- verbs ------------------------------------------------------------------------------------

    def all_reduce(self, target: Any, source: Any, op: Reduction, finish: Finish) -> None:
        """Leave the reduction of all sources in the target: flat, of one dtype."""
        if not source.size:
            return
        how = accumulation.of(op, source.dtype, self._size)
        way = self._routing.algorithm_for(
            self._size, len(self._roles.gateways), source.nbytes, source.size * how.wide.itemsize
        )
        if way == "gather":
            self._reduce_all(target, source, op, finish)
            return
        if way == "exchange" and self._is_flat:  # one level: the kernels round and divide
            how = accumulation.Accumulation(op, source.dtype, 1)
        reduced = self._around if way == "ring" else self._in_parts
        step = PIECE_NBYTES // how.wide.itemsize
        pieces = (
            reduced(k, target[start : start + step], source[start : start + step], how, finish)
            for k, start in enumerate(range(0, source.size, step))
        )
        self._run(pieces, finish)

    def gather(self, targets: Sequence[Any], finish: Finish) -> None:
        """Bring the bytes of each worker to all; ``targets[rank]`` holds this worker's."""
        step = max(1, PIECE_NBYTES // self._size)
        longest = max(map(len, targets))
        pieces = (
            self._gathered(k, [each[start : start + step] for each in targets], finish)
            for k, start in enumerate(range(0, longest, step))
        )
        self._run(pieces, finish)

    def broadcast(self, target: Any, root: int, finish: Finish) -> None:
        """Bring the root's bytes, which its target holds, to all."""
        pieces = (
            self._dealt_out(k, target[start : start + PIECE_NBYTES], root, finish)
            for k, start in enumerate(range(0, len(target), PIECE_NBYTES))
        )
        self._run(pieces, finish)

    # -- short arrays -----------------------------------------------------------------------------

    def _reduce_all(self, target: Any, source: Any, op: Reduction, finish: Finish) -> None:
        own, held, request = self._gather_of(source.nbytes)
        own[:] = source.view(np.uint8)
        request.Start()
        finish(request)
        direct.reduce([each.view(source.dtype) for each in held], op, out=target)

    def _gather_of(self, nbytes: int) -> tuple[Any, Any, Any]:
        """Return a gather of so many bytes that MPI has set up: an iteration repeats its sizes."""
        found = self._gathers.get(nbytes)
        if found is None:
            if len(self._gathers) == _MOST_GATHERS:
                _, _, request = self._gathers.pop(next(iter(self._gathers)))
                request.Free()
            own, held = np.empty(nbytes, np.uint8), np.empty((self._size, nbytes), np.uint8)
            request = self._traffic.gather(own, held)
            found = self._gathers[nbytes] = own, held, request
        return found

    # -- pieces -----------------------------------------------------------------------------------

    def _run(self, pieces: Iterable[Piece], finish: Finish) -> None:
        """Carry pieces through their stages, a new one at each meeting, so that they overlap.

        after meeting    0         1         2          3          4
        piece 0       reduces   adds up   receives    takes
        piece 1                 reduces   adds up   receives    takes

        Each is brought before the meeting after which it is reduced. In a ring, "adds up" and
        "receives" go on whenever something is waited for.
        """

        def meet(piece: Piece | None) -> None:
            if piece is not None:
                next(piece)
            self._host.come()
            finish(_HostBarrier(self._host, self._move))

        carry(pieces, meet)
        self._posted = [[] for _ in range(_STAGES)]

    def _move(self) -> None:
        """Let data move while others of this host are waited for: who has it may wait for ours."""
        self._ring.move()
        self._traffic.move()

    def _in_parts(
        self, number: int, target: Any, source: Any, how: accumulation.Accumulation, finish: Finish
    ) -> Piece:
        rank, traffic = self._rank, self._traffic
        parts = [slice(*bounds) for bounds in partition.parts(source.size, self._size)]
        targets = [target[part] for part in parts]
        brought = self._host.bring(number, source, how.wide)
        yield
        scratch = self._cleared(number % _TOGETHER)
        received = {door: scratch.new(targets[rank].size, how.wide) for door in self._others}
        requests = self._posted[number % _STAGES] = [
            traffic.receive(received[door], door, _TO_REDUCE) for door in self._others
        ]
        for part in self._roles.parts:
            of_host = self._of_host([each[parts[part]] for each in brought], how, scratch)
            if part != rank:
                requests.append(traffic.send(of_host, part, _TO_REDUCE))
            else:
                received[rank] = of_host
        yield
        finish(AllRequests(requests))
        results = self._host.results(number, targets)
        in_order = [received[door] for door in self._roles.gateways]
        self._finish_part(in_order, results[rank], how, scratch)
        requests = self._spread(number, results)
        yield
        finish(AllRequests(requests))
        yield
        self._host.take(results, targets)

    def _around(
        self, number: int, target: Any, source: Any, how: accumulation.Accumulation, finish: Finish
    ) -> Piece:
        parts = [slice(*bounds) for bounds in partition.parts(source.size, self._size)]
        targets = [target[part] for part in parts]
        brought = self._host.bring(number, source, how.wide)
        yield
        scratch = self._cleared(number % _LONGEST)
        of_host = {
            part: self._of_host([each[parts[part]] for each in brought], how, scratch)
            for part in self._roles.parts
        }
        results = self._host.results(number, targets)
        lap = self._ring.start(number, of_host, results, how, scratch.new)
        yield
        yield
        finish(lap)
        yield
        self._host.take(results, targets)

    def _cleared(self, place: int) -> _Scratch:
        scratch = self._scratch[place]
        scratch.clear()
        return scratch

    def _of_host(
        self, sources: list[Any], how: accumulation.Accumulation, scratch: _Scratch
    ) -> Any:
        """Return what the workers of this host make of a part; of one worker, what it brought."""
        if len(sources) == 1:
            return sources[0]
        total = scratch.new(sources[0].size, how.wide)
        direct.reduce(sources, how.op, out=total)
        return total

    def _finish_part(
        self, sources: list[Any], result: Any, how: accumulation.Accumulation, scratch: _Scratch
    ) -> None:
        """Make the hosts' parts one."""
        is_in_place = any(np.may_share_memory(source, result) for source in sources)
        total = result
        if is_in_place or how.wide != result.dtype:
            total = scratch.new(result.size, how.wide)
        direct.reduce(sources, how.op, out=total)
        how.divide(total)
        if total is not result:
            accumulation.write(total, result)

    def _gathered(self, number: int, targets: Sequence[Any], finish: Finish) -> Piece:
        yield
        yield
        results = self._host.results(number, targets)
        if results[self._rank] is not targets[self._rank]:
            results[self._rank][...] = targets[self._rank]
        requests = self._spread(number, results)
        yield
        finish(AllRequests(requests))
        yield
        self._host.take(results, targets)

    def _dealt_out(self, number: int, target: Any, root: int, finish: Finish) -> Piece:
        """Deal a piece out among all workers, each of which then brings its part to all hosts.

        So the root sends 1 + (H - 1)/n of it rather than H - 1 times.
        """
        rank, traffic = self._rank, self._traffic
        parts = [slice(*bounds) for bounds in partition.parts(target.size, self._size)]
        targets = [target[part] for part in parts]
        results = self._host.results(number, targets)
        yield
        requests = self._posted[number % _STAGES] = []
        if rank == root:
            for worker, part in enumerate(targets):
                if worker != rank:
                    requests.append(traffic.send(part, worker, _TO_REDUCE))
            if results[rank] is not targets[rank]:
                results[rank][...] = targets[rank]
        else:
            requests.append(traffic.receive(results[rank], root, _TO_REDUCE))
        yield
        finish(AllRequests(requests))
        requests = self._spread(number, results)
        yield
        finish(AllRequests(requests))
        yield
        self._host.take(results, targets)

    def _spread(self, number: int, results: Sequence[Any]) -> list[Any]:
        """Send this worker's part to every other host, and receive what it is the door for."""
        traffic, rank = self._traffic, self._rank
        requests = self._posted[number % _STAGES] = [
            *(traffic.send(results[rank], door, _RESULT) for door in self._others),
            *(
                traffic.receive(results[part], part, _RESULT)
                for part in self._roles.parts
                if part != rank
            ),
        ]
        return requests


class _HostBarrier:
    """A meeting of the workers of a host, as a request; data move meanwhile."""

    def __init__(self, host: Staging, move: Callable[[], None]) -> None:
        self._host, self._move = host, move

    def Test(self) -> bool:
        """Tell whether all have come."""
        if self._host.is_met():
            return True
        self._move()
        return False


class _Scratch:
    """Memory that is used again for another piece."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def clear(self) -> None:
        """Forget what was made."""
        self._used = 0

    def new(self, size: int, dtype: Any) -> Any:
        """Return an array whose content is not set."""
        start = -(-self._used // _LINE) * _LINE
        self._used = start + size * dtype.itemsize
        if self._used > len(self._memory):
            self._memory = np.empty(2 * self._used, np.uint8)  # others keep theirs
        return self._memory[start : self._used].view(dtype)
