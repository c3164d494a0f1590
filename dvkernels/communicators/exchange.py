"""Arrays on their way between hosts, in pieces that follow each other closely.

A short array is gathered, and every worker reduces all of them. A long one is reduced by hosts
first, and then in parts: who sends what to whom says ``schedules/hosts.py``, and which of the two
is quicker ``schedules/cost.py``. Every worker gets the same bits either way. The order of the
additions: short, that of the workers; long, that of the workers within each host, then that of the
hosts by their first workers.

MPI carries bytes only, and the kernels do the arithmetic: the reductions of MPI know no half types,
do not define NaN in a minimum, and need not give all ranks the same bits. No message is longer than
a piece, so counts stay small however long the array.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, final

import numpy as np
from mpi4py import MPI

from dvkernels.communicators import levels
from dvkernels.communicators.host import PIECE_NBYTES, Host
from dvkernels.communicators.request import Finish
from dvkernels.kernels.cpu import direct
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import cost, hosts, partition

__all__: list[str] = []

_TO_REDUCE, _RESULT = 1, 2  # tags
_MOST_GATHERS = 64
_LINE = 64
_STAGES = 4  # of a piece, after it has been brought
_OVER = object()


_Piece = Iterator[None]


@final
class Exchange:
    """One worker's side of moving arrays between all workers, on one channel.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Of the workers, for the use of this alone.
    host : Host
        What this worker shares with the others of its host.
    placed : sequence of int
        The number of each worker's host.

    Notes
    -----
    Each method takes ``finish``, which returns when a request is done, or raises. All workers call
    the same, with arrays of the same sizes.
    """

    def __init__(self, comm: Any, host: Host, placed: Sequence[int]) -> None:
        self._comm, self._host = comm, host
        self._rank, self._size = comm.rank, comm.size
        self._roles = hosts.roles(placed, comm.rank)
        self._others = [door for door in self._roles.doors if door != comm.rank]
        self._is_flat = len({*placed}) == comm.size
        self._scratch = [_Scratch(), _Scratch()]
        self._gathers: dict[int, tuple[Any, Any, Any]] = {}  # by the bytes of a worker
        # Of the pieces under way. Where a collective fails they stay: a message that comes late
        # must not be written to memory that has become another's.
        self._posted: list[list[Any]] = [[] for _ in range(_STAGES)]

    # -- verbs ------------------------------------------------------------------------------------

    def all_reduce(self, target: Any, source: Any, op: Reduction, finish: Finish) -> None:
        """Leave the reduction of all sources in the target: flat, of one dtype."""
        if not source.size:
            return
        num_hosts = len(self._roles.doors)
        if cost.between_hosts(cost.NETWORK, self._size, num_hosts, source.nbytes) == "gather":
            self._reduce_all(target, source, op, finish)
            return
        if self._is_flat:  # one level: the kernels round and divide
            how = levels.Levels(op, source.dtype, 1)
        else:
            how = levels.of(op, source.dtype, self._size)
        step = PIECE_NBYTES // how.wide.itemsize
        pieces = (
            self._reduced(
                k, target[start : start + step], source[start : start + step], how, finish
            )
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
            request = self._comm.Allgather_init([own, MPI.BYTE], [held, MPI.BYTE])
            found = self._gathers[nbytes] = own, held, request
        return found

    # -- pieces -----------------------------------------------------------------------------------

    def _run(self, pieces: Iterable[_Piece], finish: Finish) -> None:
        """Carry pieces through their stages, a new one at each meeting, so that they overlap.

        after meeting    0         1         2          3          4
        piece 0       reduces   adds up   receives    takes
        piece 1                 reduces   adds up   receives    takes

        Each is brought before the meeting after which it is reduced. The newest goes first: what it
        sends travels while the others are seen to.
        """
        coming = iter(pieces)
        under_way: list[_Piece] = []
        while True:
            piece = next(coming, None)
            if piece is not None:
                next(piece)
                under_way.insert(0, piece)
            if not under_way:
                self._posted = [[] for _ in range(_STAGES)]
                return
            self._host.come()
            finish(_Meeting(self._host, self._comm))
            under_way = [one for one in under_way if next(one, _OVER) is not _OVER]

    def _reduced(
        self, number: int, target: Any, source: Any, how: levels.Levels, finish: Finish
    ) -> _Piece:
        rank, comm = self._rank, self._comm
        parts = [slice(*bounds) for bounds in partition.parts(source.size, self._size)]
        targets = [target[part] for part in parts]
        brought = self._host.bring(number, source, how.wide)
        yield
        scratch = self._scratch[number & 1]
        scratch.clear()
        mine = parts[rank].stop - parts[rank].start
        doors = self._roles.doors
        received = {door: scratch.new(mine, how.wide) for door in self._others}
        requests = self._posted[number % _STAGES] = [
            _receive(comm, received[door], door, _TO_REDUCE) for door in self._others
        ]
        for part in self._roles.carried:
            of_host = self._of_host([each[parts[part]] for each in brought], how, scratch)
            if part != rank:
                requests.append(_send(comm, of_host, part, _TO_REDUCE))
            else:
                received[rank] = of_host
        yield
        finish(_All(requests))
        results = self._host.results(number, targets)
        self._finish_part([received[door] for door in doors], results[rank], how, scratch)
        requests = self._spread(number, results)
        yield
        finish(_All(requests))
        yield
        self._host.take(results, targets)

    def _of_host(self, sources: list[Any], how: levels.Levels, scratch: _Scratch) -> Any:
        """Return what the workers of this host make of a part; of one worker, what it brought."""
        if len(sources) == 1:
            return sources[0]
        total = scratch.new(sources[0].size, how.wide)
        direct.reduce(sources, how.op, out=total)
        return total

    def _finish_part(
        self, sources: list[Any], result: Any, how: levels.Levels, scratch: _Scratch
    ) -> None:
        """Make the hosts' parts one."""
        is_in_place = any(np.may_share_memory(source, result) for source in sources)
        total = result
        if is_in_place or how.wide != result.dtype:
            total = scratch.new(result.size, how.wide)
        direct.reduce(sources, how.op, out=total)
        how.divide(total)
        if total is not result:
            result[...] = total

    def _gathered(self, number: int, targets: Sequence[Any], finish: Finish) -> _Piece:
        yield
        yield
        results = self._host.results(number, targets)
        if results[self._rank] is not targets[self._rank]:
            results[self._rank][...] = targets[self._rank]
        requests = self._spread(number, results)
        yield
        finish(_All(requests))
        yield
        self._host.take(results, targets)

    def _dealt_out(self, number: int, target: Any, root: int, finish: Finish) -> _Piece:
        """Deal a piece out among all workers, each of which then brings its part to all hosts.

        So the root sends 1 + (H - 1)/n of it rather than H - 1 times.
        """
        rank, comm = self._rank, self._comm
        parts = [slice(*bounds) for bounds in partition.parts(target.size, self._size)]
        targets = [target[part] for part in parts]
        results = self._host.results(number, targets)
        yield
        requests = self._posted[number % _STAGES] = []
        if rank == root:
            for worker, part in enumerate(targets):
                if worker != rank:
                    requests.append(_send(comm, part, worker, _TO_REDUCE))
            if results[rank] is not targets[rank]:
                results[rank][...] = targets[rank]
        else:
            requests.append(_receive(comm, results[rank], root, _TO_REDUCE))
        yield
        finish(_All(requests))
        requests = self._spread(number, results)
        yield
        finish(_All(requests))
        yield
        self._host.take(results, targets)

    def _spread(self, number: int, results: Sequence[Any]) -> list[Any]:
        """Send this worker's part to every other host, and receive what it is the door for."""
        comm, rank = self._comm, self._rank
        requests = self._posted[number % _STAGES] = [
            *(_send(comm, results[rank], door, _RESULT) for door in self._others),
            *(
                _receive(comm, results[part], part, _RESULT)
                for part in self._roles.carried
                if part != rank
            ),
        ]
        return requests


class _Meeting:
    """A meeting of the workers of a host, as a request; MPI goes on meanwhile."""

    def __init__(self, host: Host, comm: Any) -> None:
        self._host, self._comm = host, comm

    def Test(self) -> bool:
        """Tell whether all have come."""
        if self._host.is_met():
            return True
        self._comm.Iprobe()  # MPI moves data only while it is asked, and others may wait for ours
        return False


class _All:
    """Several requests of MPI as one."""

    def __init__(self, requests: list[Any]) -> None:
        self._requests = requests

    def Test(self) -> bool:
        """Tell whether all are done."""
        return bool(MPI.Request.Testall(self._requests))


class _Scratch:
    """Memory that is used again for every other piece."""

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


def _send(comm: Any, array: Any, to: int, tag: int) -> Any:
    return comm.Isend([array.view(np.uint8), MPI.BYTE], to, tag)


def _receive(comm: Any, array: Any, source: int, tag: int) -> Any:
    return comm.Irecv([array.view(np.uint8), MPI.BYTE], source, tag)
