"""MPI transport between workers of several hosts: control rounds, data, out-of-band messages.

All MPI calls are non-blocking and polled: a deadline or an out-of-band message from another worker
ends the wait, so no call waits for a worker that will never arrive.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from mpi4py import MPI

from dvkernels.communicators.workers.consistency import (
    ConsistencyCheck,
    FailureState,
    Fingerprint,
    Vote,
)
from dvkernels.communicators.workers.ended import GAVE_UP, LOST, AbortableTransport
from dvkernels.communicators.workers.mpi.collectives import MpiCollectives
from dvkernels.communicators.workers.mpi.control_rounds import ControlRounds
from dvkernels.communicators.workers.mpi.mpi_point_to_point import MpiPointToPoint
from dvkernels.communicators.workers.mpi.request import Finish, Request
from dvkernels.communicators.workers.shm.segment import NUM_CHANNELS
from dvkernels.communicators.workers.shm.staging import Staging
from dvkernels.communicators.workers.shm.symmetric_memory import SymmetricMemory
from dvkernels.reduce_op import Reduction
from dvkernels.schedules.cost_model import Routing

__all__: list[str] = []

_TESTS_PER_CHECK = 100  # about 50 us of MPI tests
# How long to poll without pausing: for workers that may be late, and for data that all workers have
# agreed to exchange, so that only a lost or stopped worker can delay them.
_SPINNING_SECONDS, _BUSY_SECONDS = 1e-3, 2.0
_NAP_SECONDS, _LONGEST_NAP_SECONDS = 20e-6, 1e-3
_REPORT_SECONDS = 1.0  # after which a waiting worker reports its round to the others
_LOST_ROUNDS = [-1, -1]  # the last rounds of a worker that MPI has lost
_PRESENT: tuple[list[int], str] = [], ""
_CATCH_UP = 0  # the vote in a round in which a worker calls nothing
_LEFT, _WAITS = 3, 4  # tags, beside the kinds of an end; _WAITS + channel


class _OutOfBandMessages:
    """Out-of-band messages between workers: rounds waited in, departures, and the abort.

    Used by two threads: each message is received by one of them, and recorded here.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._others = [other for other in range(comm.size) if other != comm.rank]
        self._pending_sends: list[tuple[Any, Any]] = []  # requests and their payloads
        self.ended: tuple[int, str] | None = None
        self.left: dict[int, tuple[list[int], str]] = {}  # by worker: its last rounds, and why
        self.waits: dict[tuple[int, int], int] = {}  # by channel and worker: the round it waits in
        self.rounds = [0] * NUM_CHANNELS  # by channel: the latest round of this worker

    def send(self, tag: int, text: str) -> None:
        """Send a message to all other workers, without waiting."""
        payload = np.frombuffer(text.encode(errors="replace"), np.uint8)
        self._pending_sends = [
            pending for pending in self._pending_sends if not _is_over(pending[0])
        ]
        for other in self._others:
            with contextlib.suppress(MPI.Exception):  # a lost worker receives nothing
                self._pending_sends.append(
                    (self._comm.Isend([payload, MPI.BYTE], other, tag), payload)
                )

    def poll(self) -> None:
        """Receive and record all messages that have arrived."""
        for other in self._others:
            if self.left.get(other, _PRESENT)[0] is not _LOST_ROUNDS:
                try:
                    self._receive_from(other)
                except MPI.Exception as error:  # from an MPI with fault tolerance (ULFM)
                    self.left[other] = _LOST_ROUNDS, f"MPI has lost it: {error}"

    def _receive_from(self, other: int) -> None:
        status = MPI.Status()
        while (message := self._comm.Improbe(other, MPI.ANY_TAG, status)) is not None:
            payload = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            message.Recv([payload, MPI.BYTE])
            text, tag = payload.tobytes().decode(errors="replace"), status.Get_tag()
            if tag in (LOST, GAVE_UP):
                self.ended = self.ended or (tag, text)
            elif tag == _LEFT:
                rounds, _, why = text.partition(";")
                self.left[other] = [int(number) for number in rounds.split()], why
            else:
                self.waits[tag - _WAITS, other] = int(text)

    def is_blocked(self, worker: int) -> bool:
        """Return whether a worker reported to wait in a channel's current or previous round.

        In the previous one it may wait for data, while this worker has its own and is in the next.
        """
        own = enumerate(self.rounds)
        return any(self.waits.get((channel, worker), -2) >= number - 1 for channel, number in own)

    def end(self, kind: int, text: str) -> None:
        """Abort the group on all workers."""
        if self.ended is None:
            self.ended = kind, text
            self.send(kind, text)

    def why_ended(self) -> tuple[int, str] | None:
        """Return kind and text of the abort that is known; None if none is."""
        return self.ended


def _is_over(request: Any) -> bool:
    try:
        return bool(request.Test())
    except MPI.Exception:
        return True


@final
class MpiTransport(AbortableTransport):
    """Transport between the workers of several hosts; see ``group.Transport``.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Of the workers; duplicated.
    hosts_of_workers : sequence of int
        The host number of each worker.
    stagings : sequence of Staging
        The staging buffers of this host, for each channel.
    timeout_seconds : float
        How long to wait for the other workers.
    routing : Routing
        Chooses the algorithm of a reduction; the same on all workers.
    """

    def __init__(
        self,
        comm: Any,
        hosts_of_workers: Sequence[int],
        stagings: Sequence[Staging],
        timeout_seconds: float,
        routing: Routing,
        *,
        channel: int = 0,
        failures: FailureState | None = None,
        out_of_band: _OutOfBandMessages | None = None,
    ) -> None:
        self._out_of_band = out_of_band or _OutOfBandMessages(comm)
        super().__init__(comm.rank, self._out_of_band, failures or FailureState())
        self.size = comm.size
        self.timeout_seconds = timeout_seconds
        self._comm = comm.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        p2p = MpiPointToPoint(self._comm)
        self._collectives = MpiCollectives(p2p, stagings[channel], hosts_of_workers, routing)
        self._rounds = ControlRounds(p2p)
        self._channel = channel
        self._number = 0
        self._last: Fingerprint | None = None
        end = functools.partial(self._out_of_band.end, LOST)
        self._consistency = ConsistencyCheck(self, self._failures, end)
        if channel == 0:
            self._duplicate: MpiTransport | None = MpiTransport(
                comm,
                hosts_of_workers,
                stagings,
                timeout_seconds,
                routing,
                channel=1,
                failures=self._failures,
                out_of_band=self._out_of_band,
            )
        else:
            self._duplicate = None

    takes_columns = False
    symmetric_memory: SymmetricMemory | None = None

    def duplicate(self) -> MpiTransport:
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
        """Write the reduction of all workers' sources to the target: flat arrays of one dtype."""
        del num_sources, divisor
        ((source, target),) = columns
        with self._consistency:
            self._agree(fingerprint, source.nbytes)
            self._collectives.all_reduce(target, source, op, self._finish_for(fingerprint))

    def all_gather_bytes(self, source: Any, fingerprint: Fingerprint) -> list[Any]:
        """Return the bytes of all workers, whose numbers may differ."""
        with self._consistency:
            votes = self._agree(fingerprint, source.nbytes)
            results = [np.empty(vote.nbytes, np.uint8) for vote in votes]
            results[self.rank][...] = source
            self._collectives.all_gather(results, self._finish_for(fingerprint))
        return results

    def broadcast_into(self, target: Any, root: int, fingerprint: Fingerprint) -> None:
        """Write the root's bytes, which its ``target`` holds, to every ``target``."""
        with self._consistency:
            self._agree(fingerprint, len(target))
            self._collectives.broadcast(target, root, self._finish_for(fingerprint))

    def _finish_for(self, fingerprint: Fingerprint) -> Finish:
        return functools.partial(self._finish, fingerprint=fingerprint)

    # -- rounds -----------------------------------------------------------------------------------

    def _agree(self, fingerprint: Fingerprint, nbytes: int) -> list[Vote]:
        if self._out_of_band.ended is not None:  # no data of a worker that has aborted
            raise self.end_error()
        votes = self._consistency.agree(fingerprint, nbytes, _stage_nothing)
        self._last = fingerprint
        return votes

    def arrive(self, number: int, nbytes: int, text: str = "") -> None:
        """Vote in the next round, without waiting."""
        self._number += 1
        self._out_of_band.rounds[self._channel] = self._number
        self._rounds.start(number, nbytes, text)

    def is_complete(self) -> bool:
        """Return, without waiting, whether all workers have arrived in the round."""
        return self._rounds.Test()

    def await_all(self, fingerprint: Fingerprint) -> list[Vote]:
        """Wait for the votes of all workers in the round."""
        self._finish(self._rounds, fingerprint, _SPINNING_SECONDS)
        return self._rounds.votes()

    def text_of(self, worker: int) -> str:
        """Return a worker's text of the latest round."""
        return self._rounds.text_of(worker)

    def _finish(
        self, request: Request, fingerprint: Fingerprint, busy_seconds: float = _BUSY_SECONDS
    ) -> None:
        """Wait for a request; raise if waiting is in vain.

        MPI moves data only inside of its calls, so polling must not pause while data flow: 64 MiB
        took 1.3 s with naps of a millisecond.
        """
        try:
            began = time.monotonic()
            busy_until = began + min(busy_seconds, self.timeout_seconds)
            while True:
                for _ in range(_TESTS_PER_CHECK):
                    if request.Test():
                        return
                if time.monotonic() > busy_until:
                    break
                time.sleep(0)  # others may need this core
            self._wait(request, fingerprint, began)
        except MPI.Exception as error:
            self.abort(LOST, f"worker {self.rank} lost another in {fingerprint.text}: {error}")

    def _wait(self, request: Request, fingerprint: Fingerprint, began: float) -> None:
        out_of_band = self._out_of_band
        has_reported, nap = False, _NAP_SECONDS
        while not request.Test():
            out_of_band.poll()
            if out_of_band.ended is not None:
                raise self.end_error()
            for worker, (rounds, why) in out_of_band.left.items():
                if rounds[self._channel] < self._number:
                    text = f"worker {worker} is lost while {fingerprint.text} waits for it: {why}"
                    self.abort(LOST, text)
            waited = time.monotonic() - began
            where = self._number
            others_wait = any(self._has_arrived(worker) for worker in range(self.size))
            is_due = others_wait or waited > min(_REPORT_SECONDS, self.timeout_seconds / 4)
            if is_due and not has_reported:
                out_of_band.send(_WAITS + self._channel, str(where))
                has_reported = True
            if waited > self.timeout_seconds:
                self._give_up(fingerprint)
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP_SECONDS)

    def _has_arrived(self, worker: int) -> bool:
        """Return whether a worker has reported to wait in this round or a later one."""
        return self._out_of_band.waits.get((self._channel, worker), 0) >= self._number

    def _give_up(self, fingerprint: Fingerprint) -> None:
        others = (worker for worker in range(self.size) if worker != self.rank)
        absent = [worker for worker in others if not self._has_arrived(worker)]
        # A worker that waits in the previous collective, or over the other channel, is absent too,
        # but because of a third worker, which stopped half-way.
        absent = [worker for worker in absent if not self._out_of_band.is_blocked(worker)] or absent
        last = "before any collective" if self._last is None else f"in {self._last.text}"
        self.abort(
            GAVE_UP,
            f"worker {self.rank} waited {self.timeout_seconds:g} s in vain for workers {absent} "
            f"to call {fingerprint.text}: they were last seen {last}; give timeout_seconds if they "
            f"need longer",
        )

    # -- the end ----------------------------------------------------------------------------------

    @property
    def has_ended(self) -> bool:
        """Whether the group has been aborted."""
        self._out_of_band.poll()
        return self._out_of_band.ended is not None

    @property
    def is_settled(self) -> bool:
        """Whether the exit of this process need not wait for anything pending.

        When all workers have left, those that are behind catch up to the last round: a failure may
        have been announced there, which no longer concerns them.
        """
        return all(
            [transport._is_caught_up(self._out_of_band) for transport in (self, self.duplicate())]
        )

    def _is_caught_up(self, out_of_band: _OutOfBandMessages) -> bool:
        if out_of_band.ended is not None:
            return True  # nothing will complete any more
        if not self.is_complete():
            return False
        if len(out_of_band.left) < self.size - 1:
            return not self._consistency.is_announcing
        while self._number < max(
            (rounds[self._channel] for rounds, _ in out_of_band.left.values())
        ):
            self.arrive(_CATCH_UP, 0)
            if not self.is_complete():
                return False
        return True

    def leave(self, text: str) -> None:
        """Tell the other workers that this one arrives in no further round, and why."""
        self._out_of_band.send(_LEFT, f"{self._number} {self.duplicate()._number};{text}")

    def remaining_workers(self) -> list[int]:
        """Return the other workers that have not left."""
        self._out_of_band.poll()
        return [w for w in range(self.size) if w != self.rank and w not in self._out_of_band.left]


def _stage_nothing() -> None:
    """Stage nothing: the data follow the round."""
