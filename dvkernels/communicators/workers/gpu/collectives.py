"""Collectives between GPUs of different workers, by CUDA-aware MPI.

A short array is all-gathered by the algorithm of Bruck et al. (``schedules/bruck.py``), and every
worker reduces all arrays. A long array goes in pipelined pieces by reduce-scatter + all-gather
(Thakur, Rabenseifner, Gropp 2005), a broadcast by scatter + all-gather (van de Geijn), both with
direct messages; ``mpi/collectives.py`` has the references. All workers get the same bits either
way, reduced in rank order. MPI only transfers bytes, point to point: Open MPI supports GPU memory
neither in non-blocking nor in persistent collectives, and the kernels do the arithmetic as they do
within one process.

MPI ignores streams. It reads memory when it is called, and writes before its request completes,
whatever runs on the GPU. The host therefore waits for the GPU before MPI reads the result of a
kernel, or writes to memory that a kernel may still use, and waits for MPI before it launches a
kernel that reads received data.

Every worker counts as a host of its own: two GPUs of one host send their arrays one by one to a
third on another host, where they could send their sum.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

import numpy as np

from dvkernels.communicators.workers.pipeline import Piece, run_pipeline
from dvkernels.communicators.workers.wait import AllRequests, Finish
from dvkernels.devices import cuda
from dvkernels.errors import CollectiveTimeoutError
from dvkernels.reduce_op import Reduction
from dvkernels.schedules import bruck, cost_model

__all__ = ["GpuCollectives"]

# Bytes of a piece; a message is one worker's part of a piece. Chosen, not measured: no GPU with a
# CUDA-aware MPI has been at hand. From some hundred KiB per message on, MPIs map the memory of
# another GPU (CUDA IPC), or let the network read it (GPUDirect RDMA).
PIECE_NBYTES = 4 * 1024 * 1024
_TO_REDUCE, _RESULT = 1, 2  # tags
_NUM_SCRATCH_SLOTS = 3  # a piece needs its slot for three turns: receive, reduce, wait
_LINE = 256  # alignment of parts in bytes: what a warp reads at once
_VECTOR = 16  # alignment of short arrays: what a thread reads at once
_NAP_SECONDS, _SPINNING_SECONDS = 50e-6, 1e-3

# Memory that MPI may still write to, never freed: after a collective has failed half-way, a late
# message must not be written to memory that has been reused.
_abandoned: list[Any] = []


@final
class GpuCollectives:
    """One worker's side of the collectives between one GPU of each worker.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Of the workers, used only by objects that one thread calls in turn.
    arrays : ArrayLibrary
    reduce : callable
        The kernel: ``reduce(arrays, op, out=out)`` on the current stream; ``out`` may be one of the
        arrays.
    device : int
        The GPU of this worker and of all arrays; current while a method is called.
    timeout_seconds : float
        How long to wait for the GPU.

    Notes
    -----
    A collective has two halves. ``prepare_…`` (or :meth:`complete`) comes before the vote of the
    workers: it allocates all memory, so raises if there is too little, and waits for the GPU. The
    other half moves the data; it takes ``finish``, which waits for a request, or raises. All
    workers call the same methods, with arrays of the same sizes.
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
        self._peers = [worker for worker in range(self._size) if worker != self._rank]
        self._device, self._seconds = device, timeout_seconds
        self._scratch = arrays.empty(device, (0,), np.dtype(np.uint8))
        self._width = 0  # bytes of a receive buffer: the longest part of a piece
        self._scratch_read: Any = None  # event: the GPU has read the scratch
        self._posted: list[list[Any]] = [[] for _ in range(_NUM_SCRATCH_SLOTS + 1)]

    # -- collectives ------------------------------------------------------------------------------

    def prepare_all_reduce(self, source: Any) -> None:
        """Allocate scratch memory, and wait for the source."""
        if self._is_short(source):
            self._reserve(self._size * _round_up(source.nbytes, _VECTOR))
            if source.size:
                self._arrays.copy(self._slot(0, source), source, self._stream())
        else:
            step = min(source.size, PIECE_NBYTES // source.itemsize)
            self._width = _round_up(-(-step // self._size) * source.itemsize, _LINE)
            self._reserve(_NUM_SCRATCH_SLOTS * len(self._peers) * self._width)
        self.complete()

    def all_reduce(self, target: Any, source: Any, op: Reduction, finish: Finish) -> None:
        """Write the reduction of all sources to the target: contiguous and of shape (n,).

        The target may be the source. A short result follows in the order of the current stream; a
        long one is complete when this returns.
        """
        with self._keep_memory_on_error(target, source):
            if self._is_short(source):
                self._gather_and_reduce(target, source, op, finish)
                return
            step = PIECE_NBYTES // source.itemsize
            self._run(
                self._reduce_scatter_all_gather(
                    k, target[start : start + step], source[start : start + step], op, finish
                )
                for k, start in enumerate(range(0, source.size, step))
            )

    def all_gather(self, result: Any, starts: Sequence[int], finish: Finish) -> None:
        """All-gather bytes: those of worker w are ``result[starts[w]:starts[w + 1]]``.

        ``result`` holds this worker's bytes, and the GPU has completed it.
        """
        targets = [result[start:stop] for start, stop in itertools.pairwise(starts)]
        step = max(1, PIECE_NBYTES // self._size)
        with self._keep_memory_on_error(result):
            self._run(
                self._all_gather_parts(k, [each[start : start + step] for each in targets], finish)
                for k, start in enumerate(range(0, max(map(len, targets)), step))
            )

    def broadcast(self, result: Any, root: int, finish: Finish) -> None:
        """Write the root's bytes to every ``result``, which the GPU has completed."""
        with self._keep_memory_on_error(result):
            self._run(
                self._scatter_all_gather(k, result[start : start + PIECE_NBYTES], root, finish)
                for k, start in enumerate(range(0, len(result), PIECE_NBYTES))
            )

    def complete(self) -> None:
        """Wait until the GPU has completed the work of the current stream.

        Raises
        ------
        CollectiveTimeoutError
            The GPU exceeds the timeout of the workers.
        """
        self._wait_for(self._record_event())

    # -- short arrays -----------------------------------------------------------------------------

    def _is_short(self, source: Any) -> bool:
        algorithm = cost_model.between_hosts(
            cost_model.NETWORK, self._size, self._size, source.nbytes
        )
        return source.size == 0 or algorithm == "gather"

    def _gather_and_reduce(self, target: Any, source: Any, op: Reduction, finish: Finish) -> None:
        if not source.size:
            return
        rank, size, nbytes = self._rank, self._size, _round_up(source.nbytes, _VECTOR)
        for num_held, num_sent in bruck.all_gather(size):
            target_rank, source_rank = (rank - num_held) % size, (rank + num_held) % size
            own = self._scratch[: num_sent * nbytes]
            incoming = self._scratch[num_held * nbytes : (num_held + num_sent) * nbytes]
            requests = self._posted[0] = [
                self._receive(incoming, source_rank, _TO_REDUCE),
                self._send(own, target_rank, _TO_REDUCE),
            ]
            finish(AllRequests(requests))
        slots = (bruck.slot(rank, owner, size) for owner in range(size))
        self._reduce([self._slot(slot, source) for slot in slots], op, out=target)
        self._scratch_read = self._record_event()

    def _slot(self, slot: int, like: Any) -> Any:
        start = slot * _round_up(like.nbytes, _VECTOR)
        return self._scratch[start : start + like.nbytes].view(like.dtype)

    # -- pieces -----------------------------------------------------------------------------------

    def _run(self, pieces: Iterable[Piece]) -> None:
        """Run the pieces through their stages, starting one at each turn.

        turn       0         1         2            3            4
        piece 0    receive   reduce    all-gather   complete
        piece 1              receive   reduce       all-gather   complete
        """
        run_pipeline(pieces, _no_barrier)

    def _reduce_scatter_all_gather(
        self, number: int, target: Any, source: Any, op: Reduction, finish: Finish
    ) -> Piece:
        parts = self._parts(source)
        mine = parts[self._rank]
        received = self._receive_buffers(number, source[mine])
        requests = self._post(
            number,
            [self._receive(received[other], other, _TO_REDUCE) for other in self._peers],
            [self._send(source[parts[other]], other, _TO_REDUCE) for other in self._peers],
        )
        yield
        finish(requests)
        if mine.start < mine.stop:
            received[self._rank] = source[mine]
            in_order = [received[worker] for worker in range(self._size)]
            self._reduce(in_order, op, out=target[mine])
        reduced = self._record_event()
        yield
        self._wait_for(reduced)
        yield from self._all_gather_parts(number, [target[part] for part in parts], finish)

    def _scatter_all_gather(self, number: int, result: Any, root: int, finish: Finish) -> Piece:
        """Broadcast a piece: scatter its parts to all workers, which then all-gather them.

        The root sends less than two pieces, however many workers there are.
        """
        parts = [result[part] for part in self._parts(result)]
        if self._rank == root:
            sends = [self._send(parts[other], other, _TO_REDUCE) for other in self._peers]
            requests = self._post(number, [], sends)
        else:
            requests = self._post(number, [self._receive(parts[self._rank], root, _TO_REDUCE)], [])
        yield
        finish(requests)
        yield from self._all_gather_parts(number, parts, finish, holder=root)

    def _all_gather_parts(
        self, number: int, targets: Sequence[Any], finish: Finish, holder: int | None = None
    ) -> Piece:
        """Exchange the workers' parts; ``holder`` (a broadcast's root) already has all of them."""
        incoming = [] if holder == self._rank else self._peers
        outgoing = [other for other in self._peers if other != holder]
        requests = self._post(
            number,
            [self._receive(targets[other], other, _RESULT) for other in incoming],
            [self._send(targets[self._rank], other, _RESULT) for other in outgoing],
        )
        yield
        finish(requests)

    def _parts(self, array: Any) -> list[slice]:
        """Return the part of each worker: whole lines, except for the last part."""
        width = _round_up(-(-array.size // self._size) * array.itemsize, _LINE) // array.itemsize
        ends = [min(k * width, array.size) for k in range(self._size + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]

    def _receive_buffers(self, number: int, like: Any) -> dict[int, Any]:
        """Return the receive buffers of a piece, by source worker."""
        first = number % _NUM_SCRATCH_SLOTS * len(self._peers)
        starts = [(first + k) * self._width for k in range(len(self._peers))]
        return {
            other: self._scratch[start : start + like.nbytes].view(like.dtype)
            for other, start in zip(self._peers, starts, strict=True)
        }

    # -- MPI --------------------------------------------------------------------------------------

    def _post(self, number: int, receives: list[Any], sends: list[Any]) -> AllRequests:
        requests = self._posted[number % len(self._posted)] = [*receives, *sends]
        return AllRequests(requests)

    def _send(self, array: Any, target_rank: int, tag: int) -> Any:
        if not array.size:
            return _EMPTY_MESSAGE
        return self._comm.Isend(self._arrays.bytes_of(array), target_rank, tag)

    def _receive(self, array: Any, source: int, tag: int) -> Any:
        if not array.size:
            return _EMPTY_MESSAGE
        return self._comm.Irecv(self._arrays.bytes_of(array), source, tag)

    @contextlib.contextmanager
    def _keep_memory_on_error(self, *arrays: Any) -> Iterator[None]:
        try:
            yield
        except BaseException:
            _abandoned.append((self, arrays))  # keeps the scratch and the posted requests alive
            raise

    # -- the GPU ----------------------------------------------------------------------------------

    def _reserve(self, nbytes: int) -> None:
        """Make the scratch memory at least so large, once no kernel reads it any more."""
        if self._scratch_read is not None:
            self._wait_for(self._scratch_read)
            self._scratch_read = None
        if nbytes > len(self._scratch):
            self._scratch = self._arrays.empty(self._device, (nbytes,), np.dtype(np.uint8))

    def _stream(self) -> Any:
        return self._arrays.current(self._device)

    def _record_event(self) -> Any:
        event = self._arrays.event(self._device)
        event.record(self._stream())
        return event

    def _wait_for(self, event: Any) -> None:
        began = time.monotonic()
        while not event.done:
            waited = time.monotonic() - began
            if waited > self._seconds:
                raise CollectiveTimeoutError(
                    f"worker {self._rank} waited {self._seconds:g} s in vain for its "
                    f"cuda:{self._device} to complete its work: is it busy with other things, "
                    f"or has it failed? Give timeout_seconds if it needs longer"
                )
            time.sleep(0 if waited < _SPINNING_SECONDS else _NAP_SECONDS)


def _no_barrier(_: Piece | None) -> None:
    """Do nothing: pieces need no host barrier, because GPUs share no staging buffers."""


class _EmptyMessage:
    """Request of an empty message, which is not sent."""

    def Test(self) -> bool:
        """Return True."""
        return True


_EMPTY_MESSAGE = _EmptyMessage()


def _round_up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
