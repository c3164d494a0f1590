"""Shared-memory transport between the workers of one host.

Each worker copies a piece of its array to its staging buffer, waits for the other workers, and
reduces the pieces of all workers to its result; from four workers on, each worker reduces only a
part of the pieces, into a result buffer that all workers read (reduce-scatter + all-gather).
Compiled code (kernels/cpu/shm_all_reduce.py) does that for all pieces in one call, and returns to
Python where a worker is late or calls something else. With n workers of S bytes, each worker moves
the lesser of (n + 3) S and (5 + 1/n) S bytes, mostly within the caches, because a piece is small.
All workers reduce in rank order, so all get the same bits, the same as the kernels of one process.

Arrays in symmetric memory (symmetric_memory.py) are not copied: each worker reduces its share of
all workers' arrays in place, 2 S bytes per worker, by all of its threads. The order is then that of
the replicas, as in one process, whichever worker they belong to.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np

from dvkernels.cluster import procfs
from dvkernels.communicators import accumulation
from dvkernels.communicators.workers.consistency import (
    ConsistencyCheck,
    FailureState,
    Fingerprint,
    Vote,
    fingerprint_of,
)
from dvkernels.communicators.workers.ended import GAVE_UP, LOST, AbortableTransport
from dvkernels.communicators.workers.shm.segment import BUFFER_NBYTES, NUM_CHANNELS, Segment
from dvkernels.communicators.workers.shm.symmetric_memory import SymmetricMemory
from dvkernels.kernels.cpu import direct, shm_all_reduce
from dvkernels.kernels.cpu.engine import shm_barrier
from dvkernels.reduce_op import ReduceOp, Reduction

__all__: list[str] = []

# A pause is 20 to 45 ns: spin for about 1.5 ms, like replicas of one process. With more workers
# than cores a spinning worker keeps the awaited one from running, so it sleeps at once.
_PAUSES, _PAUSES_OF_MANY = 60_000, 100
_PAUSES_BETWEEN_NAPS = 100
_NAP_SECONDS, _LONGEST_NAP_SECONDS = 50e-6, 1e-3
_CHECK_SECONDS = 0.1  # how often a waiting worker checks that the others still exist
_MAX_VIEWS = 256
_LINE = 64
_NO_PIECE, _NO_RESULT = slice(0), np.empty(0)
# Bytes per worker from which arrays are reduced in place: shorter ones take less time in one
# compiled call (256 KiB of two processes 45 and 30 us, 1 MiB 40 and 85 us; 2 cores of an AMD EPYC).
_MIN_IN_PLACE_NBYTES = 512 * 1024
_IN_PLACE = 2  # xor makes it the fingerprint of another call
_IN_PLACE_DONE = fingerprint_of("all_reduce, the end")


@final
class SharedMemoryTransport(AbortableTransport):
    """Transport between the workers of one host; see ``group.Transport``.

    Parameters
    ----------
    segment : Segment
    timeout_seconds : float
        How long to wait for the other workers.
    may_spin : bool
        Each worker has a core of its own, so a waiting worker may spin.
    symmetric_memory : SymmetricMemory, optional
        Allocates the arrays that are reduced in place.
    """

    def __init__(
        self,
        segment: Segment,
        timeout_seconds: float,
        may_spin: bool,
        symmetric_memory: SymmetricMemory | None = None,
        *,
        channel: int = 0,
        failures: FailureState | None = None,
    ) -> None:
        super().__init__(segment.rank, segment, failures or FailureState())
        self.size = segment.size
        self.timeout_seconds = timeout_seconds
        self._segment = segment
        self.symmetric_memory = symmetric_memory
        self._channel = channel
        self._pauses = _PAUSES if may_spin else _PAUSES_OF_MANY
        self._lines = segment.lines(channel)
        self._buffers = segment.buffers(channel)
        self._all_reduce = shm_all_reduce.SharedMemoryAllReduce(
            self._lines, self.rank, self._buffers, self.size, self._pauses
        )
        self._number = 0
        self._last: Fingerprint | None = None
        self._views: dict[Any, list[list[Any]]] = {}
        self._consistency = ConsistencyCheck(
            self, self._failures, functools.partial(segment.end, LOST)
        )
        if channel + 1 < NUM_CHANNELS:
            # Without symmetric memory: the order of its allocations is that of the first channel.
            self._duplicate: SharedMemoryTransport | None = SharedMemoryTransport(
                segment, timeout_seconds, may_spin, channel=channel + 1, failures=self._failures
            )
        else:
            self._duplicate = None

    takes_columns = True

    def duplicate(self) -> SharedMemoryTransport:
        """Return the transport for another thread: the second channel."""
        return self._duplicate or self

    # -- arrays -----------------------------------------------------------------------------------

    def all_reduce_into(
        self,
        columns: Sequence[Sequence[Any]],
        num_sources: int,
        op: Reduction,
        fingerprint: Fingerprint,
        divisor: int = 1,
    ) -> None:
        """Write the reduction of all workers' sources to each target: flat arrays of one dtype."""
        with self._consistency:
            if self._all_reduce_in_place(columns, num_sources, op, fingerprint, divisor):
                return
            if self._all_reduce.lay_out(columns, num_sources, op):
                self._run_compiled(fingerprint, divisor)
            elif len(columns) == 1:
                self._run_kernels(columns[0], num_sources, op, fingerprint, divisor)
            else:
                self._run_packed(columns, num_sources, op, fingerprint, divisor)

    def _all_reduce_in_place(
        self,
        columns: Sequence[Sequence[Any]],
        num_sources: int,
        op: Reduction,
        fingerprint: Fingerprint,
        divisor: int,
    ) -> bool:
        """Reduce the arrays in place if they are in symmetric memory on all workers."""
        symmetric_memory = self.symmetric_memory
        if symmetric_memory is None or not symmetric_memory.is_open:
            return False
        if sum(column[0].nbytes for column in columns) < _MIN_IN_PLACE_NBYTES:
            return False
        located = symmetric_memory.locate(columns, num_sources)
        location = -1 if located is None else located.number
        # Another fingerprint than that of a staged piece, so no worker mistakes this round for one.
        self._round(
            Fingerprint(fingerprint.text, fingerprint.number ^ _IN_PLACE), location, _stage_nothing
        )
        if located is None or any(vote.nbytes != location for vote in self._votes()):
            return False
        symmetric_memory.reduce(located, ReduceOp.MEAN if divisor > 1 else op)
        self._round(_IN_PLACE_DONE, 0, _stage_nothing)
        self._last = fingerprint
        return True

    def _run_packed(
        self,
        columns: Sequence[Sequence[Any]],
        num_sources: int,
        op: Reduction,
        fingerprint: Fingerprint,
        divisor: int,
    ) -> None:
        """Reduce all columns as one packed column; other workers may reduce them unpacked."""
        packed = [np.concatenate(arrays) for arrays in zip(*columns, strict=True)]
        self._run_kernels(packed, num_sources, op, fingerprint, divisor)
        ends = itertools.accumulate((column[0].size for column in columns), initial=0)
        for column, (start, stop) in zip(columns, itertools.pairwise(ends), strict=True):
            for target, whole in zip(column[num_sources:], packed[num_sources:], strict=True):
                target[...] = whole[start:stop]

    def _run_compiled(self, fingerprint: Fingerprint, divisor: int) -> None:
        """Run the compiled all-reduce, again after each wait for a late worker."""
        consistency, all_reduce = self._consistency, self._all_reduce
        has_arrived = not consistency.is_settled
        if has_arrived:
            self._agree(fingerprint)
        while True:
            outcome, self._number = all_reduce.run(
                self._number, fingerprint.number, divisor, has_arrived=has_arrived
            )
            if outcome == shm_all_reduce.DONE:
                self._last = fingerprint
                return
            has_arrived = True
            if self._wait(fingerprint, self._pauses) != shm_barrier.AGREED:
                consistency.diagnose(self._votes(), fingerprint)
                self._agree(fingerprint)

    def _agree(self, fingerprint: Fingerprint) -> None:
        """Vote, with the current piece staged, until all workers vote for this call."""
        all_reduce = self._all_reduce
        self._consistency.agree(
            fingerprint, all_reduce.nbytes, lambda: all_reduce.stage(self._number)
        )

    def _run_kernels(
        self,
        column: Sequence[Any],
        num_sources: int,
        op: Reduction,
        fingerprint: Fingerprint,
        divisor: int,
    ) -> None:
        """Reduce by the kernels what the compiled all-reduce declines: custom reductions."""
        sources, targets = column[:num_sources], column[num_sources:]
        step = BUFFER_NBYTES // sources[0].itemsize
        pieces = [slice(k, k + step) for k in range(0, max(1, sources[0].size), step)]
        if not self._all_reduce.is_in_parts(sources[0].nbytes):
            for here in pieces:
                views = self._exchange_staged([source[here] for source in sources], op, fingerprint)
                first, *others = (target[here] for target in targets)
                direct.reduce(views[: self.size], op, out=first)
                accumulation.divide(first, divisor)
                for other in others:
                    other[...] = first
            return
        result = _NO_RESULT
        for here, before in zip([*pieces, _NO_PIECE], [_NO_PIECE, *pieces], strict=True):
            views = self._exchange_staged([source[here] for source in sources], op, fingerprint)
            for target in targets:
                target[before] = result
            result = views[self.size]
            self._combine_part(views, op, divisor)

    def _combine_part(self, views: Sequence[Any], op: Reduction, divisor: int) -> None:
        """Reduce this worker's part of all staging buffers into the result buffer behind them."""
        *buffers, result = views
        per_line = _LINE // result.itemsize
        count = -(-result.size // per_line)
        low, high = (count * k // self.size * per_line for k in (self.rank, self.rank + 1))
        if low < min(high, result.size):
            direct.reduce([buffer[low:high] for buffer in buffers], op, out=result[low:high])
            accumulation.divide(result[low:high], divisor)

    def _exchange_staged(
        self, pieces: Sequence[Any], op: Reduction, fingerprint: Fingerprint
    ) -> list[Any]:
        """Stage the reduction of ``pieces``; return the buffers once all workers have staged."""
        views = self._staged_views(pieces[0].dtype, pieces[0].size)
        stage = functools.partial(_stage_reduction, views, self.rank, pieces, op)
        return views[self._round(fingerprint, pieces[0].nbytes, stage)]

    def all_gather_bytes(self, source: Any, fingerprint: Fingerprint) -> list[Any]:
        """Return the bytes of all workers, whose numbers may differ."""
        longest, start = 0, 0
        results: list[Any] = []
        with self._consistency:
            while not results or start < longest:
                piece = source[start : start + BUFFER_NBYTES]
                parity = self._round(
                    fingerprint, source.nbytes, functools.partial(self._stage_bytes, piece)
                )
                if not results:
                    results = [np.empty(vote.nbytes, np.uint8) for vote in self._votes()]
                    longest = max(len(result) for result in results)
                buffers = self._buffers[parity, : self.size]
                for result, buffer in zip(results, buffers, strict=True):
                    part = result[start : start + BUFFER_NBYTES]
                    part[...] = buffer[: len(part)]
                start += BUFFER_NBYTES
        return results

    def broadcast_into(self, target: Any, root: int, fingerprint: Fingerprint) -> None:
        """Write the root's bytes, which its ``target`` holds, to every ``target``."""
        with self._consistency:
            for start in range(0, max(1, len(target)), BUFFER_NBYTES):
                piece = target[start : start + BUFFER_NBYTES]
                mine = piece if self.rank == root else piece[:0]
                parity = self._round(
                    fingerprint, piece.nbytes, functools.partial(self._stage_bytes, mine)
                )
                if self.rank != root:
                    piece[...] = self._buffers[parity, root, : len(piece)]

    def _stage_bytes(self, piece: Any, parity: int) -> None:
        self._buffers[parity, self.rank, : len(piece)] = piece

    def _staged_views(self, dtype: Any, size: int) -> list[list[Any]]:
        """Return the start of each buffer as an array, by parity and worker."""
        found = self._views.get((dtype, size))
        if found is None:
            if len(self._views) == _MAX_VIEWS:
                self._views.clear()
            nbytes = size * dtype.itemsize
            found = [[buffer[:nbytes].view(dtype) for buffer in half] for half in self._buffers]
            self._views[dtype, size] = found
        return found

    # -- rounds -----------------------------------------------------------------------------------

    def _round(self, fingerprint: Fingerprint, nbytes: int, stage: Callable[[int], None]) -> int:
        """Stage and vote; return the parity of the round in which all workers agreed."""
        consistency = self._consistency
        if consistency.is_settled:  # nearly always: agree() inlined
            stage(self._number + 1 & 1)
            self.arrive(fingerprint.number, nbytes)
            if self._wait(fingerprint, self._pauses) == shm_barrier.AGREED:
                self._last = fingerprint
                return self._number & 1
            consistency.diagnose(self._votes(), fingerprint)
        consistency.agree(fingerprint, nbytes, lambda: stage(self._number + 1 & 1))
        self._last = fingerprint
        return self._number & 1

    def arrive(self, number: int, nbytes: int, text: str = "") -> None:
        """Vote in the next round, without waiting."""
        self._number += 1
        if text:
            self._segment.publish_text(self._channel, self._number & 1, text)
        shm_barrier.arrive(self._lines, self.rank, self._number, number, nbytes)

    def is_complete(self) -> bool:
        """Return, without waiting, whether all workers have arrived in the round."""
        outcome = shm_barrier.await_round(self._lines, self.size, self.rank, self._number, 0)
        return bool(outcome in (shm_barrier.AGREED, shm_barrier.MISMATCHED))

    def await_all(self, fingerprint: Fingerprint) -> list[Vote]:
        """Wait for the votes of all workers in the round."""
        self._wait(fingerprint, self._pauses)
        return self._votes()

    def text_of(self, worker: int) -> str:
        """Return a worker's text of the latest round."""
        return self._segment.published_text(self._channel, self._number & 1, worker)

    def _votes(self) -> list[Vote]:
        lines = self._segment.control_lines(self._channel)
        return [Vote(*shm_barrier.vote_of(line, self._number)) for line in lines]

    def _wait(self, fingerprint: Fingerprint, num_pauses: int) -> int:
        """Wait for all workers; return AGREED or MISMATCHED, or raise if waiting is in vain."""
        round_args = (self._lines, self.size, self.rank, self._number)
        outcome = int(shm_barrier.await_round(*round_args, num_pauses))
        if outcome == shm_barrier.LATE:
            began = time.monotonic()
            next_check = began + _CHECK_SECONDS
            nap = _NAP_SECONDS
            while outcome == shm_barrier.LATE:
                time.sleep(nap)
                nap = min(2 * nap, _LONGEST_NAP_SECONDS)
                outcome = int(shm_barrier.await_round(*round_args, _PAUSES_BETWEEN_NAPS))
                now = time.monotonic()
                if outcome == shm_barrier.LATE and now > next_check:
                    self._check_absent(fingerprint, now - began)
                    next_check = now + _CHECK_SECONDS
        if outcome == shm_barrier.ENDED:
            raise self.end_error()
        return outcome

    def _check_absent(self, fingerprint: Fingerprint, waited_seconds: float) -> None:
        """Abort the group if an absent worker can never arrive, or is beyond the deadline."""
        segment = self._segment
        lines = segment.control_lines(self._channel)
        absent = [w for w in range(self.size) if lines[w, 0] < self._number]
        for worker in absent:
            why = segment.why_left(worker)
            if why is None and not segment.is_alive(worker):
                why = f"process {segment.process_of(worker)} has disappeared: was it killed?"
            if why is not None:
                self.abort(
                    LOST, f"worker {worker} is lost while {fingerprint.text} waits for it: {why}"
                )
        if waited_seconds > self.timeout_seconds:
            last = "before any collective" if self._last is None else f"in {self._last.text}"
            seen = "; ".join(self._describe_worker(worker, last) for worker in absent)
            self.abort(
                GAVE_UP,
                f"worker {self.rank} waited {self.timeout_seconds:g} s in vain for workers "
                f"{absent} to call {fingerprint.text}: {seen}; give timeout_seconds if they need "
                f"longer",
            )

    def _describe_worker(self, worker: int, last: str) -> str:
        process = self._segment.process_of(worker)
        doing = {"T": "stopped", "t": "stopped by a debugger"}.get(
            procfs.state_of(process), "alive"
        )
        return f"worker {worker}, process {process}, is {doing} and was last seen {last}"

    # -- the end ----------------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether the exit of this process need not wait for anything pending."""
        return True

    def leave(self, text: str) -> None:
        """Record that this worker arrives in no further round, and why."""
        self._segment.leave(text)

    def remaining_workers(self) -> list[int]:
        """Return the other workers that exist and have not left."""
        segment = self._segment
        others = (worker for worker in range(self.size) if worker != self.rank)
        return [w for w in others if segment.why_left(w) is None and segment.is_alive(w)]


def _stage_nothing(parity: int) -> None:
    """Stage nothing: the round carries no data."""


def _stage_reduction(
    views: Sequence[Sequence[Any]], rank: int, pieces: Sequence[Any], op: Reduction, parity: int
) -> None:
    direct.reduce(pieces, op, out=views[parity][rank])
