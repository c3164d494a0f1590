"""MPI transport between workers of several hosts: control rounds and data.

All MPI calls are non-blocking and polled: a deadline or an out-of-band message from another worker
ends the wait, so no call waits for a worker that will never arrive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import final

import numpy as np
from mpi4py import MPI

from dvkernels.communicators.workers import wait
from dvkernels.communicators.workers.consistency import FailureState, Fingerprint, Vote
from dvkernels.communicators.workers.message_channel import MessageChannel
from dvkernels.communicators.workers.mpi.collectives import MpiCollectives
from dvkernels.communicators.workers.mpi.control_rounds import ControlRounds
from dvkernels.communicators.workers.mpi.mpi_channel import MpiChannel
from dvkernels.communicators.workers.mpi.mpi_point_to_point import MpiPointToPoint
from dvkernels.communicators.workers.mpi.out_of_band import OutOfBandMessages
from dvkernels.communicators.workers.mpi.point_to_point import Finish
from dvkernels.communicators.workers.shm.segment import NUM_CHANNELS
from dvkernels.communicators.workers.shm.staging import Staging
from dvkernels.communicators.workers.shm.symmetric_memory import Columns
from dvkernels.communicators.workers.transport import LOST, Transport
from dvkernels.devices.array_spec import HostArray
from dvkernels.reduce_op import Reduction
from dvkernels.schedules.cost_model import Routing

__all__: list[str] = []

_REPORT_SECONDS = 1.0  # after which a waiting worker reports its round to the others
_CATCH_UP = 0  # the vote in a round in which a worker calls nothing


@final
class MpiTransport(Transport):
    """Transport between the workers of several hosts.

    ``comm`` is duplicated. ``stagings`` are the staging buffers of this host, for each channel.
    """

    _duplicate: MpiTransport | None

    def __init__(
        self,
        comm: MPI.Comm,
        hosts_of_workers: Sequence[int],
        stagings: Sequence[Staging],
        timeout_seconds: float,
        routing: Routing,
        *,
        channel: int = 0,
        failures: FailureState | None = None,
        out_of_band: OutOfBandMessages | None = None,
    ) -> None:
        self._out_of_band = out_of_band or OutOfBandMessages(comm)
        super().__init__(
            comm.rank, comm.size, timeout_seconds, self._out_of_band, channel, failures
        )
        self._comm = comm
        own_comm = comm.Dup()
        own_comm.Set_errhandler(MPI.ERRORS_RETURN)
        p2p = MpiPointToPoint(own_comm)
        self._collectives = MpiCollectives(p2p, stagings[channel], hosts_of_workers, routing)
        self._rounds = ControlRounds(p2p)
        self._reported = 0  # the latest round that this worker has reported to wait in
        if channel + 1 < NUM_CHANNELS:
            self._duplicate = MpiTransport(
                comm,
                hosts_of_workers,
                stagings,
                timeout_seconds,
                routing,
                channel=channel + 1,
                failures=self._failures,
                out_of_band=self._out_of_band,
            )

    def channels(self) -> list[MessageChannel | None]:
        comm = self._comm.Dup()
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        why_gone = self._out_of_band.why_gone
        return [
            None if peer == self.rank else MpiChannel(comm, peer, functools.partial(why_gone, peer))
            for peer in range(self.size)
        ]

    # -- arrays -----------------------------------------------------------------------------------

    def all_reduce_into(
        self, columns: Columns, num_sources: int, op: Reduction, call: Fingerprint, divisor: int = 1
    ) -> None:
        del num_sources, divisor
        ((source, target),) = columns
        with self._consistency:
            self._agree(call, source.nbytes)
            self._collectives.all_reduce(target, source, op, self._finish_for(call))

    def all_gather_bytes(self, source: HostArray, call: Fingerprint) -> list[HostArray]:
        with self._consistency:
            votes = self._agree(call, source.nbytes)
            results: list[HostArray] = [np.empty(vote.nbytes, np.uint8) for vote in votes]
            results[self.rank][...] = source
            self._collectives.all_gather(results, self._finish_for(call))
        return results

    def broadcast_into(self, target: HostArray, root: int, call: Fingerprint) -> None:
        with self._consistency:
            self._agree(call, len(target))
            self._collectives.broadcast(target, root, self._finish_for(call))

    def _finish_for(self, call: Fingerprint) -> Finish:
        return functools.partial(self._finish, call)

    # -- rounds -----------------------------------------------------------------------------------

    def _agree(self, call: Fingerprint, nbytes: int) -> list[Vote]:
        if self._out_of_band.ended is not None:  # no data of a worker that has aborted
            raise self._end_error()
        votes = self._consistency.agree(call, nbytes, _stage_nothing)
        self._last = call
        return votes

    def arrive(self, number: int, nbytes: int, text: str = "") -> None:
        self._number += 1
        self._out_of_band.rounds[self._channel] = self._number
        self._rounds.start(number, nbytes, text)

    def is_complete(self) -> bool:
        return self._rounds.Test()

    def await_all(self, call: Fingerprint) -> list[Vote]:
        self._finish(call, self._rounds.Test, wait.MPI_ROUND)
        return self._rounds.votes()

    def text_of(self, worker: int) -> str:
        return self._rounds.text_of(worker)

    def _finish(
        self,
        call: Fingerprint,
        is_done: Callable[[], bool],
        pace: wait.Pace = wait.MPI_DATA,
    ) -> None:
        """Wait until ``is_done()``; raise if waiting is in vain."""
        try:
            if not wait.until(is_done, pace, self.timeout_seconds, self._check_others, call):
                absent = self._out_of_band.absent(self._channel)
                self._give_up(absent, call, f"they were last seen {self._last_seen}")
        except MPI.Exception as error:
            self._abort(LOST, f"worker {self.rank} lost another in {call.text}: {error}")

    def _check_others(self, waited_seconds: float, call: Fingerprint) -> None:
        """Raise if the others can never arrive; report to them that this worker waits."""
        out_of_band = self._out_of_band
        out_of_band.poll()
        if out_of_band.ended is not None:
            raise self._end_error()
        for worker, (rounds, why) in out_of_band.left.items():
            if rounds[self._channel] < self._number:
                self._lose(worker, call, why)
        is_late = waited_seconds > min(_REPORT_SECONDS, self.timeout_seconds / 4)
        if self._reported < self._number and (is_late or out_of_band.is_awaited(self._channel)):
            self._reported = self._number
            out_of_band.report_wait(self._channel)

    # -- the end ----------------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether the exit of this process need not wait for anything pending.

        When all workers have left, those that are behind catch up to the last round: a failure may
        have been announced there, which no longer concerns them.
        """
        return all([transport._is_caught_up() for transport in (self, self._duplicate or self)])

    def _is_caught_up(self) -> bool:
        if self._out_of_band.ended is not None:
            return True  # nothing will complete any more
        if not self.is_complete():
            return False
        left = self._out_of_band.left.values()
        if len(left) < self.size - 1:
            return not self._consistency.is_announcing
        while self._number < max(rounds[self._channel] for rounds, _ in left):
            self.arrive(_CATCH_UP, 0)
            if not self.is_complete():
                return False
        return True

    def leave(self, text: str) -> None:
        self._out_of_band.leave(text)

    @property
    def has_lost(self) -> bool:  # type: ignore[override]
        """Whether MPI has lost a worker."""
        return self._out_of_band.has_lost

    def remaining_workers(self) -> list[int]:
        return self._out_of_band.remaining()


def _stage_nothing() -> None:
    """Stage nothing: the data follow the round."""
