"""Arrays on their way between GPUs of workers, by an MPI that takes the memory of GPUs.

A short array goes to all workers, and each reduces all of them. A long one goes in pieces: each
worker reduces a part for all of them, and pieces overlap. Every worker gets the same bits either
way, added up in the order of the workers. MPI carries bytes, from one worker to another only: Open
MPI takes memory of GPUs neither in its non-blocking collectives nor in persistent ones, and the
kernels do the arithmetic as they do within one process.

MPI knows nothing of streams. It reads when it is called, and writes before its request is done,
whatever is under way on the GPU. So the host waits for the GPU before it lets MPI read a result of
its kernels, or write to memory that they may still be using, and for MPI before it launches a
kernel that reads what has come.

Every worker counts as a host of its own: two GPUs of one host send to a third, of another, one
after the other, where they could send their sum.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

import numpy as np

from dvkernels.communicators.workers.pipeline import Piece, carry
from dvkernels.communicators.workers.wait import AllRequests, Finish
from dvkernels.devices import cuda
from dvkernels.errors import CollectiveTimeoutError
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import bruck, cost_model

__all__ = ["GpuCollectives"]

# What one piece holds at most; a message is a part of it, one for each worker. Chosen, not
# measured: no GPU with such an MPI has been at hand. Messages of some hundred KiB are what MPIs
# map memory of another GPU for, or let the network read it by itself.
PIECE_NBYTES = 4 * 1024 * 1024
_TO_REDUCE, _RESULT = 1, 2  # tags
_NUM_SCRATCHES = 3  # a piece is reduced, and that awaited, two turns after it began to come
_LINE = 256  # parts begin at multiples of so many bytes: what one warp reads at once
_VECTOR = 16  # and short arrays at what one thread does
_NAP_SECONDS, _SPINNING_SECONDS = 50e-6, 1e-3

# What MPI may still write to. Where a collective fails half-way its group has ended, and a message
# that comes late must not be written to memory that has become another's: it is never freed.
_half_way: list[Any] = []


@final
class GpuCollectives:
    """One worker's side of moving arrays between a GPU of each worker.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Of the workers, for the use of this and of others that one thread calls in turn.
    arrays : ArrayLibrary
    reduce : callable
        Given arrays, a reduction and ``out``, leaves what they reduce to in ``out``, which may be
        one of them, in the order of the current stream.
    device : int
        The GPU of this worker. Current while a method is called, as all arrays lie on it.
    timeout_seconds : float
        How long to wait for the GPU.

    Notes
    -----
    Each verb has two halves. ``prepare_…`` makes all room that is needed, so raises where there is
    none, and returns when the GPU has done what it was given: both before the workers agree. The
    other, which moves the data, takes ``finish``, which returns when a request is done, or raises.
    All workers call the same, with arrays of the same sizes.
    """

    def __init__(
        self,
        comm: Any,
        arrays: cuda.ArrayLibrary,
        reduce: Callable[..., Any],
        device: int,
        timeout_seconds: float,
    ) -> None:
        self._comm, self._arrays, self._reduce = comm, arrays, reduce
        self._rank, self._size = comm.rank, comm.size
        self._others = [worker for worker in range(self._size) if worker != self._rank]
        self._device, self._seconds = device, timeout_seconds
        self._scratch = arrays.empty(device, (0,), np.dtype(np.uint8))
        self._width = 0  # of what comes of a piece from one worker, in bytes: that of the longest
        self._read: Any = None  # when the GPU has read the scratch
        self._posted: list[list[Any]] = [[] for _ in range(_NUM_SCRATCHES + 1)]

    # -- verbs ------------------------------------------------------------------------------------

    def prepare_all_reduce(self, source: Any) -> None:
        """Make room, and wait for the source."""
        if self._is_short(source):
            self._make_room(self._size * _rounded(source.nbytes, _VECTOR))
            if source.size:
                self._arrays.copy(self._slot(0, source), source, self._stream())
        else:
            step = min(source.size, PIECE_NBYTES // source.itemsize)
            self._width = _rounded(-(-step // self._size) * source.itemsize, _LINE)
            self._make_room(_NUM_SCRATCHES * len(self._others) * self._width)
        self.complete()

    def all_reduce(self, target: Any, source: Any, op: Reduction, finish: Finish) -> None:
        """Leave the reduction of all sources in the target, which may be the source: flat, dense.

        What is short is in the target in the order of the current stream, what is long when this
        returns.
        """
        with self._kept(target, source):
            if self._is_short(source):
                self._reduce_all(target, source, op, finish)
                return
            step = PIECE_NBYTES // source.itemsize
            self._run(
                self._reduced(
                    k, target[start : start + step], source[start : start + step], op, finish
                )
                for k, start in enumerate(range(0, source.size, step))
            )

    def all_gather(self, result: Any, starts: Sequence[int], finish: Finish) -> None:
        """Bring the bytes of each worker to all: flat, from ``starts[w]`` to ``starts[w + 1]``.

        The result holds this worker's own, and has been waited for.
        """
        targets = [result[start:stop] for start, stop in itertools.pairwise(starts)]
        step = max(1, PIECE_NBYTES // self._size)
        with self._kept(result):
            self._run(
                self._spread(k, [each[start : start + step] for each in targets], finish)
                for k, start in enumerate(range(0, max(map(len, targets)), step))
            )

    def broadcast(self, result: Any, root: int, finish: Finish) -> None:
        """Bring the root's bytes to all: flat. Its result holds them; all have been waited for."""
        with self._kept(result):
            self._run(
                self._dealt_out(k, result[start : start + PIECE_NBYTES], root, finish)
                for k, start in enumerate(range(0, len(result), PIECE_NBYTES))
            )

    def complete(self) -> None:
        """Return when the GPU has done what the current stream was given.

        Raises
        ------
        CollectiveTimeoutError
            It has not, in the time that workers wait for each other.
        """
        self._await(self._recorded())

    # -- short arrays -----------------------------------------------------------------------------

    def _is_short(self, source: Any) -> bool:
        way = cost_model.between_hosts(cost_model.NETWORK, self._size, self._size, source.nbytes)
        return source.size == 0 or way == "gather"

    def _reduce_all(self, target: Any, source: Any, op: Reduction, finish: Finish) -> None:
        if not source.size:
            return
        rank, size, nbytes = self._rank, self._size, _rounded(source.nbytes, _VECTOR)
        for held, sent in bruck.all_gather(size):
            to, coming_from = (rank - held) % size, (rank + held) % size
            own = self._scratch[: sent * nbytes]
            coming = self._scratch[held * nbytes : (held + sent) * nbytes]
            requests = self._posted[0] = [
                self._receive(coming, coming_from, _TO_REDUCE),
                self._send(own, to, _TO_REDUCE),
            ]
            finish(AllRequests(requests))
        places = (bruck.slot(rank, owner, size) for owner in range(size))
        self._reduce([self._slot(place, source) for place in places], op, out=target)
        self._read = self._recorded()

    def _slot(self, place: int, like: Any) -> Any:
        start = place * _rounded(like.nbytes, _VECTOR)
        return self._scratch[start : start + like.nbytes].view(like.dtype)

    # -- pieces -----------------------------------------------------------------------------------

    def _run(self, pieces: Iterable[Piece]) -> None:
        """Carry pieces through their stages, a new one at each turn, so that they overlap.

        turn       0       1         2         3        4
        piece 0    comes   reduced   spread    is there
        piece 1            comes     reduced   spread   is there
        """
        carry(pieces, _meet_nobody)

    def _reduced(
        self, number: int, target: Any, source: Any, op: Reduction, finish: Finish
    ) -> Piece:
        parts = self._parts(source)
        mine = parts[self._rank]
        received = self._received(number, source[mine])
        requests = self._post(
            number,
            [self._receive(received[other], other, _TO_REDUCE) for other in self._others],
            [self._send(source[parts[other]], other, _TO_REDUCE) for other in self._others],
        )
        yield
        finish(requests)
        if mine.start < mine.stop:
            received[self._rank] = source[mine]
            in_order = [received[worker] for worker in range(self._size)]
            self._reduce(in_order, op, out=target[mine])
        reduced = self._recorded()
        yield
        self._await(reduced)
        yield from self._spread(number, [target[part] for part in parts], finish)

    def _dealt_out(self, number: int, result: Any, root: int, finish: Finish) -> Piece:
        """Deal a piece out among all workers, each of which then brings its part to all.

        So the root sends less than two of it, however many workers there are.
        """
        parts = [result[part] for part in self._parts(result)]
        if self._rank == root:
            sent = [self._send(parts[other], other, _TO_REDUCE) for other in self._others]
            requests = self._post(number, [], sent)
        else:
            requests = self._post(number, [self._receive(parts[self._rank], root, _TO_REDUCE)], [])
        yield
        finish(requests)
        yield from self._spread(number, parts, finish, all_there=root)

    def _spread(
        self, number: int, targets: Sequence[Any], finish: Finish, all_there: int | None = None
    ) -> Piece:
        """Bring this worker's target to all others, and theirs here; one may have all of them."""
        coming = [] if all_there == self._rank else self._others
        going = [other for other in self._others if other != all_there]
        requests = self._post(
            number,
            [self._receive(targets[other], other, _RESULT) for other in coming],
            [self._send(targets[self._rank], other, _RESULT) for other in going],
        )
        yield
        finish(requests)

    def _parts(self, array: Any) -> list[slice]:
        """Return the part of each worker: of whole lines but for the last, which may be short."""
        width = _rounded(-(-array.size // self._size) * array.itemsize, _LINE) // array.itemsize
        ends = [min(k * width, array.size) for k in range(self._size + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]

    def _received(self, number: int, like: Any) -> dict[int, Any]:
        """Return where what comes of a piece is kept until it is reduced."""
        first = number % _NUM_SCRATCHES * len(self._others)
        starts = [(first + k) * self._width for k in range(len(self._others))]
        return {
            other: self._scratch[start : start + like.nbytes].view(like.dtype)
            for other, start in zip(self._others, starts, strict=True)
        }

    # -- MPI --------------------------------------------------------------------------------------

    def _post(self, number: int, receives: list[Any], sends: list[Any]) -> AllRequests:
        requests = self._posted[number % len(self._posted)] = [*receives, *sends]
        return AllRequests(requests)

    def _send(self, array: Any, to: int, tag: int) -> Any:
        if not array.size:
            return _NOTHING
        return self._comm.Isend(self._arrays.bytes_of(array), to, tag)

    def _receive(self, array: Any, source: int, tag: int) -> Any:
        if not array.size:
            return _NOTHING
        return self._comm.Irecv(self._arrays.bytes_of(array), source, tag)

    @contextlib.contextmanager
    def _kept(self, *arrays: Any) -> Iterator[None]:
        try:
            yield
        except BaseException:
            _half_way.append((self, arrays))  # and with it the scratch, and what was posted
            raise

    # -- the GPU ----------------------------------------------------------------------------------

    def _make_room(self, nbytes: int) -> None:
        """Make the scratch hold so many bytes, when nobody reads it any more."""
        if self._read is not None:
            self._await(self._read)
            self._read = None
        if nbytes > len(self._scratch):
            self._scratch = self._arrays.empty(self._device, (nbytes,), np.dtype(np.uint8))

    def _stream(self) -> Any:
        return self._arrays.current(self._device)

    def _recorded(self) -> Any:
        event = self._arrays.event(self._device)
        event.record(self._stream())
        return event

    def _await(self, event: Any) -> None:
        began = time.monotonic()
        while not event.done:
            waited = time.monotonic() - began
            if waited > self._seconds:
                raise CollectiveTimeoutError(
                    f"worker {self._rank} waited {self._seconds:g} s in vain for its "
                    f"cuda:{self._device} to do what it was given: is it busy with other things, "
                    f"or has it failed? Give timeout_seconds if it needs longer"
                )
            time.sleep(0 if waited < _SPINNING_SECONDS else _NAP_SECONDS)


def _meet_nobody(_: Piece | None) -> None:
    """Go on at once: a GPU shares nothing with another worker's."""


class _Nothing:
    """The request of a message of no bytes, which is not sent."""

    def Test(self) -> bool:
        """Return True."""
        return True


_NOTHING = _Nothing()


def _rounded(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
