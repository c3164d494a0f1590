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
from collections.abc import Callable
from typing import final

import numpy as np

from dvkernels.cluster import procfs
from dvkernels.communicators.workers import wait
from dvkernels.communicators.workers.consistency import (
    FailureState,
    Fingerprint,
    Vote,
    fingerprint_of,
)
from dvkernels.communicators.workers.message_channel import MessageChannel
from dvkernels.communicators.workers.shm import ring_channel
from dvkernels.communicators.workers.shm.kernel_reduction import KernelReduction
from dvkernels.communicators.workers.shm.segment import BUFFER_NBYTES, NUM_CHANNELS, Segment
from dvkernels.communicators.workers.shm.symmetric_memory import Columns, SymmetricMemory
from dvkernels.communicators.workers.transport import Transport
from dvkernels.devices.array_spec import HostArray
from dvkernels.kernels.cpu import shm_all_reduce
from dvkernels.kernels.cpu.engine import shm_barrier
from dvkernels.reduce_op import ReduceOp, Reduction

__all__: list[str] = []

# Bytes per worker from which arrays are reduced in place: shorter ones take less time in one
# compiled call (256 KiB of two processes 45 and 30 us, 1 MiB 40 and 85 us; 2 cores of an AMD EPYC).
_MIN_IN_PLACE_NBYTES = 512 * 1024
_IN_PLACE = 2  # xor makes it the fingerprint of another call
_IN_PLACE_DONE = fingerprint_of("all_reduce, the end")


@final
class SharedMemoryTransport(Transport):
    """Transport between the workers of one host.

    ``may_spin``: each worker has a core of its own.
    """

    takes_columns = True

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
        super().__init__(segment.rank, segment.size, timeout_seconds, segment, channel, failures)
        self._segment = segment
        self.symmetric_memory = symmetric_memory
        self._pauses = wait.ROUND_SPINS.of(may_spin)
        self._lines = segment.lines(channel)
        self._buffers = segment.buffers(channel)
        self._all_reduce = shm_all_reduce.SharedMemoryAllReduce(
            self._lines, self.rank, self._buffers, self.size, self._pauses
        )
        self._kernels = KernelReduction(self.rank, self.size, self._buffers, self._round)
        if channel + 1 < NUM_CHANNELS:
            # Without symmetric memory: the order of its allocations is that of the first channel.
            self._duplicate = SharedMemoryTransport(
                segment, timeout_seconds, may_spin, channel=channel + 1, failures=self._failures
            )

    def channels(self) -> list[MessageChannel | None]:
        assert self.symmetric_memory is not None
        return [*ring_channel.channels(self._segment, self.symmetric_memory.allocate)]

    # -- arrays -----------------------------------------------------------------------------------

    def all_reduce_into(
        self, columns: Columns, num_sources: int, op: Reduction, call: Fingerprint, divisor: int = 1
    ) -> None:
        with self._consistency:
            if self._all_reduce_in_place(columns, num_sources, op, call, divisor):
                return
            if self._all_reduce.lay_out(columns, num_sources, op):
                self._run_compiled(call, divisor)
                return
            in_parts = self._all_reduce.is_in_parts(sum(column[0].nbytes for column in columns))
            self._kernels.all_reduce(columns, num_sources, op, call, divisor, in_parts)

    def all_reduce_short(
        self,
        source: HostArray,
        target: HostArray,
        op: Reduction,
        call: Fingerprint,
        divisor: int = 1,
    ) -> bool:
        consistency = self._consistency
        with consistency:
            if not consistency.is_settled:
                return False
            outcome = self._all_reduce.run_short(
                [source, target], op, self._number, call.number, divisor
            )
            if outcome == shm_all_reduce.DECLINED:
                return False
            self._number += 1
            if outcome != shm_all_reduce.DONE:
                self._await_all(call)
                self._go_on(call, divisor, has_arrived=True)
            self._last = call
            return True

    def _all_reduce_in_place(
        self, columns: Columns, num_sources: int, op: Reduction, call: Fingerprint, divisor: int
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
        self._round(Fingerprint(call.text, call.number ^ _IN_PLACE), location, _stage_nothing)
        if located is None or any(vote.nbytes != location for vote in self._votes()):
            return False
        symmetric_memory.reduce(located, ReduceOp.MEAN if divisor > 1 else op)
        self._round(_IN_PLACE_DONE, 0, _stage_nothing)
        self._last = call
        return True

    def _run_compiled(self, call: Fingerprint, divisor: int) -> None:
        """Run the compiled all-reduce, again after each wait for a late worker."""
        has_arrived = not self._consistency.is_settled
        if has_arrived:
            self._agree(call)
        self._go_on(call, divisor, has_arrived=has_arrived)

    def _go_on(self, call: Fingerprint, divisor: int, *, has_arrived: bool) -> None:
        while True:
            outcome, self._number = self._all_reduce.run(
                self._number, call.number, divisor, has_arrived=has_arrived
            )
            if outcome == shm_all_reduce.DONE:
                self._last = call
                return
            has_arrived = True
            self._await_all(call)

    def _await_all(self, call: Fingerprint) -> None:
        """Wait, with the current piece staged, until all workers have voted for this call."""
        if self._wait(call) != shm_barrier.AGREED:
            self._consistency.diagnose(self._votes(), call)
            self._agree(call)

    def _agree(self, call: Fingerprint) -> None:
        """Vote, with the current piece staged, until all workers vote for this call."""
        all_reduce = self._all_reduce
        self._consistency.agree(call, all_reduce.nbytes, lambda: all_reduce.stage(self._number))

    def all_gather_bytes(self, source: HostArray, call: Fingerprint) -> list[HostArray]:
        longest, start = 0, 0
        results: list[HostArray] = []
        with self._consistency:
            while not results or start < longest:
                piece = source[start : start + BUFFER_NBYTES]
                parity = self._round(
                    call, source.nbytes, functools.partial(self._stage_bytes, piece)
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

    def broadcast_into(self, target: HostArray, root: int, call: Fingerprint) -> None:
        with self._consistency:
            for start in range(0, max(1, len(target)), BUFFER_NBYTES):
                piece = target[start : start + BUFFER_NBYTES]
                mine = piece if self.rank == root else piece[:0]
                parity = self._round(call, piece.nbytes, functools.partial(self._stage_bytes, mine))
                if self.rank != root:
                    piece[...] = self._buffers[parity, root, : len(piece)]

    def _stage_bytes(self, piece: HostArray, parity: int) -> None:
        self._buffers[parity, self.rank, : len(piece)] = piece

    # -- rounds -----------------------------------------------------------------------------------

    def _round(self, call: Fingerprint, nbytes: int, stage: Callable[[int], None]) -> int:
        """Stage and vote; return the parity of the round in which all workers agreed."""
        consistency = self._consistency
        if consistency.is_settled:  # nearly always: agree() inlined
            stage(self._number + 1 & 1)
            self.arrive(call.number, nbytes)
            if self._wait(call) == shm_barrier.AGREED:
                self._last = call
                return self._number & 1
            consistency.diagnose(self._votes(), call)
        consistency.agree(call, nbytes, lambda: stage(self._number + 1 & 1))
        self._last = call
        return self._number & 1

    def arrive(self, number: int, nbytes: int, text: str = "") -> None:
        self._number += 1
        if text:
            self._segment.publish_text(self._channel, self._number & 1, text)
        shm_barrier.arrive(self._lines, self.rank, self._number, number, nbytes)

    def is_complete(self) -> bool:
        return self._poll(0) in (shm_barrier.AGREED, shm_barrier.MISMATCHED)

    def await_all(self, call: Fingerprint) -> list[Vote]:
        self._wait(call)
        return self._votes()

    def text_of(self, worker: int) -> str:
        return self._segment.published_text(self._channel, self._number & 1, worker)

    def _votes(self) -> list[Vote]:
        lines = self._segment.control_lines(self._channel)
        return [Vote(*shm_barrier.vote_of(line, self._number)) for line in lines]

    def _poll(self, num_pauses: int) -> int:
        """Spin until all workers have arrived; return the outcome."""
        return int(
            shm_barrier.await_round(self._lines, self.size, self.rank, self._number, num_pauses)
        )

    def _wait(self, call: Fingerprint) -> int:
        """Wait for all workers; return AGREED or MISMATCHED, or raise if waiting is in vain."""
        outcome = int(
            shm_barrier.await_round(self._lines, self.size, self.rank, self._number, self._pauses)
        )
        if outcome == shm_barrier.LATE:
            outcome = self._wait_for_late(call)
        if outcome == shm_barrier.ENDED:
            raise self._end_error()
        return outcome

    def _wait_for_late(self, call: Fingerprint) -> int:
        outcome = shm_barrier.LATE

        def has_outcome() -> bool:
            nonlocal outcome
            outcome = self._poll(wait.SPINS_BETWEEN_NAPS)
            return outcome != shm_barrier.LATE

        if not wait.until(has_outcome, wait.ROUND, self.timeout_seconds, self._check_absent, call):
            absent = self._absent()
            seen = "; ".join(self._describe_worker(worker) for worker in absent)
            self._give_up(absent, call, seen)
        return outcome

    def _absent(self) -> list[int]:
        lines = self._segment.control_lines(self._channel)
        return [
            worker for worker in range(self.size) if lines[worker, shm_barrier.EPOCH] < self._number
        ]

    def _check_absent(self, waited_seconds: float, call: Fingerprint) -> None:
        """Abort the group if an absent worker can never arrive."""
        del waited_seconds
        segment = self._segment
        for worker in self._absent():
            why = segment.why_left(worker)
            if why is None and not segment.is_alive(worker):
                why = (
                    f"process {segment.process_of(worker)} has ended without a word: was it killed?"
                )
            if why is not None:
                self._lose(worker, call, why)

    def _describe_worker(self, worker: int) -> str:
        process = self._segment.process_of(worker)
        doing = {"T": "stopped", "t": "stopped by a debugger"}.get(
            procfs.state_of(process), "alive"
        )
        return f"worker {worker}, process {process}, is {doing} and was last seen {self._last_seen}"

    # -- the end ----------------------------------------------------------------------------------

    def leave(self, text: str) -> None:
        self._segment.leave(text)

    @property
    def has_lost(self) -> bool:  # type: ignore[override]
        """Whether a worker has ended and not left in order."""
        segment, workers = self._segment, range(self.size)
        return any(segment.why_left(w) is None and not segment.is_alive(w) for w in workers)

    def remaining_workers(self) -> list[int]:
        segment = self._segment
        others = (worker for worker in range(self.size) if worker != self.rank)
        return [w for w in others if segment.why_left(w) is None and segment.is_alive(w)]


def _stage_nothing(parity: int) -> None:
    """Stage nothing: the round carries no data."""
