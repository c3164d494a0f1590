"""Workers of several hosts, over the messages of MPI: their rounds, and words beside them.

All calls are non-blocking and looked after: a deadline ends them, and words from others that come
beside them, so nothing waits for a worker that will not come.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, final

import numpy as np
from mpi4py import MPI

from dvkernels.communicators.workers.consistency import (
    ConsistencyCheck,
    FailureState,
    Fingerprint,
    Vote,
)
from dvkernels.communicators.workers.mpi.collectives import MpiCollectives
from dvkernels.communicators.workers.mpi.control_rounds import ControlRounds
from dvkernels.communicators.workers.mpi.mpi_point_to_point import MpiPointToPoint
from dvkernels.communicators.workers.shm.segment import NUM_CHANNELS
from dvkernels.communicators.workers.shm.staging import Staging
from dvkernels.communicators.workers.shm.symmetric_memory import SymmetricMemory
from dvkernels.communicators.workers.wait import Finish, Request
from dvkernels.errors import CollectiveTimeoutError, WorkerLostError
from dvkernels.reduce_op import Reduction
from dvkernels.schedules.cost_model import Routing

__all__: list[str] = []

_TESTS_PER_LOOK = 100  # about 50 us of asking MPI
# How long to ask without pausing: for workers that may be anywhere, and for data that all of them
# have agreed to exchange, so that only a worker that is lost or stopped can hold them up.
_SPINNING_SECONDS, _FLOWING_SECONDS = 1e-3, 2.0
_NAP_SECONDS, _LONGEST_NAP_SECONDS = 20e-6, 1e-3
_SAY_SECONDS = 1.0  # after which a waiter tells the others where it waits
_NEVER = [-1, -1]  # the last rounds of a worker that MPI has lost
_THERE: tuple[list[int], str] = [], ""
_LEVEL = 0  # the number that a worker brings to a round in which it asks for nothing
_LOST, _GAVE_UP, _LEFT, _WAITS = 1, 2, 3, 4  # tags; _WAITS + channel

T = TypeVar("T")


class _Post:
    """Words between workers beside the collectives: who waits where, who left, why all ended.

    Used by two threads: each word is received by one of them, and kept here.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._others = [other for other in range(comm.size) if other != comm.rank]
        self._sent: list[tuple[Any, Any]] = []  # requests, and what they read
        self.ended: tuple[int, str] | None = None
        self.left: dict[int, tuple[list[int], str]] = {}  # the last rounds, and why
        self.waits: dict[tuple[int, int], int] = {}  # by channel and worker: in which round
        self.rounds = [0] * NUM_CHANNELS  # to which this worker has come

    def send(self, tag: int, text: str) -> None:
        """Send a word to all others, without waiting."""
        held = np.frombuffer(text.encode(errors="replace"), np.uint8)
        self._sent = [one for one in self._sent if not _is_over(one[0])]
        for other in self._others:
            with contextlib.suppress(MPI.Exception):  # who is lost hears nothing
                self._sent.append((self._comm.Isend([held, MPI.BYTE], other, tag), held))

    def listen(self) -> None:
        """Take note of what has come."""
        for other in self._others:
            if self.left.get(other, _THERE)[0] is not _NEVER:
                try:
                    self._listen_to(other)
                except MPI.Exception as error:  # of an MPI that survives its processes (ULFM)
                    self.left[other] = _NEVER, f"MPI has lost it: {error}"

    def _listen_to(self, other: int) -> None:
        status = MPI.Status()
        while (message := self._comm.Improbe(other, MPI.ANY_TAG, status)) is not None:
            held = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            message.Recv([held, MPI.BYTE])
            text, tag = held.tobytes().decode(errors="replace"), status.Get_tag()
            if tag in (_LOST, _GAVE_UP):
                self.ended = self.ended or (tag, text)
            elif tag == _LEFT:
                rounds, _, why = text.partition(";")
                self.left[other] = [int(number) for number in rounds.split()], why
            else:
                self.waits[tag - _WAITS, other] = int(text)

    def is_held_up(self, worker: int) -> bool:
        """Tell whether a worker has said that it waits, in a channel's latest round or the last.

        It may wait for the data of that, while this worker has its own and is in the next.
        """
        own = enumerate(self.rounds)
        return any(self.waits.get((channel, worker), -2) >= number - 1 for channel, number in own)

    def end(self, kind: int, text: str) -> None:
        """End the group for all."""
        if self.ended is None:
            self.ended = kind, text
            self.send(kind, text)


def _is_over(request: Any) -> bool:
    try:
        return bool(request.Test())
    except MPI.Exception:
        return True


@final
class MpiTransport:
    """Carries arrays between workers by MPI. See ``workers.Transport``.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Of the workers; duplicated.
    placed : sequence of int
        The number of each worker's host.
    hosts : sequence of Host
        What this worker shares with the others of its host, for each channel.
    timeout_seconds : float
        How long to wait for the other workers.
    routing : Routing
        Which way a reduction goes; the same on all workers.
    """

    def __init__(
        self,
        comm: Any,
        placed: Sequence[int],
        hosts: Sequence[Staging],
        timeout_seconds: float,
        routing: Routing,
        *,
        channel: int = 0,
        standing: FailureState | None = None,
        post: _Post | None = None,
    ) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.timeout_seconds = timeout_seconds
        self._comm = comm.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        traffic = MpiPointToPoint(self._comm)
        self._exchange = MpiCollectives(traffic, hosts[channel], placed, routing)
        self._round = ControlRounds(traffic)
        self._channel = channel
        self._number = 0
        self._last: Fingerprint | None = None
        self._standing = standing or FailureState()
        self._post = post or _Post(comm)
        end = functools.partial(self._post.end, _LOST)
        self._agreement = ConsistencyCheck(self, self._standing, end)
        if channel == 0:
            self._beside: MpiTransport | None = MpiTransport(
                comm,
                placed,
                hosts,
                timeout_seconds,
                routing,
                channel=1,
                standing=self._standing,
                post=self._post,
            )
        else:
            self._beside = None

    takes_columns = False
    window: SymmetricMemory | None = None

    def beside(self) -> MpiTransport:
        """Return the transport for another thread."""
        return self._beside or self

    # -- arrays ----------------------------------------------------------------------------------

    def all_reduce_into(
        self,
        columns: Sequence[Sequence[Any]],
        num_sources: int,
        op: Reduction,
        wanted: Fingerprint,
        divisor: int = 1,
    ) -> None:
        """Leave the reduction of all workers' sources in the target: flat, of one dtype."""
        del num_sources, divisor
        ((source, target),) = columns
        with self._agreement:
            self._agree(wanted, source.nbytes)
            self._exchange.all_reduce(target, source, op, self._finish_for(wanted))

    def gather(self, source: Any, wanted: Fingerprint) -> list[Any]:
        """Return the bytes of all workers, as many as each has."""
        with self._agreement:
            words = self._agree(wanted, source.nbytes)
            results = [np.empty(word.nbytes, np.uint8) for word in words]
            results[self.rank][...] = source
            self._exchange.gather(results, self._finish_for(wanted))
        return results

    def broadcast_into(self, target: Any, root: int, wanted: Fingerprint) -> None:
        """Leave the root's bytes in ``target``, which holds them on the root."""
        with self._agreement:
            self._agree(wanted, len(target))
            self._exchange.broadcast(target, root, self._finish_for(wanted))

    def carry(self, move: Callable[[list[int], Finish], T], number: int, wanted: Fingerprint) -> T:
        """Return what ``move`` makes of the numbers of all workers, not below 0."""
        with self._agreement:
            words = self._agree(wanted, number)
            told = [word.nbytes for word in words]
            try:
                return move(told, self._finish_for(wanted))
            except MPI.Exception as error:  # where it is called, not where it is waited for
                self._end(_LOST, f"worker {self.rank} lost another in {wanted.text}: {error}")

    def _finish_for(self, wanted: Fingerprint) -> Finish:
        return functools.partial(self._finish, wanted=wanted)

    # -- rounds ----------------------------------------------------------------------------------

    def _agree(self, wanted: Fingerprint, nbytes: int) -> list[Vote]:
        if self._post.ended is not None:  # so nothing of a worker that has ended the group gets out
            raise self._why_ended()
        words = self._agreement.reach(wanted, nbytes, _nothing)
        self._last = wanted
        return words

    def come(self, number: int, nbytes: int, text: str = "") -> None:
        """Come to the next round, without waiting."""
        self._number += 1
        self._post.rounds[self._channel] = self._number
        self._round.start(number, nbytes, text)

    def is_complete(self) -> bool:
        """Tell, without waiting, whether all have come to the round."""
        return self._round.Test()

    def await_all(self, asked_for: Fingerprint) -> list[Vote]:
        """Return what each worker brought to the round, when all have come."""
        self._finish(self._round, asked_for, _SPINNING_SECONDS)
        return self._round.words()

    def text_of(self, worker: int) -> str:
        """Return what a worker said in the latest round."""
        return self._round.text_of(worker)

    def _finish(
        self, request: Request, wanted: Fingerprint, busy_seconds: float = _FLOWING_SECONDS
    ) -> None:
        """Return when MPI has carried out a request; raise if it is in vain.

        MPI moves data only while it is asked, so while data flow, asking must not pause: 64 MiB
        took 1.3 s with naps of a millisecond.
        """
        try:
            began = time.monotonic()
            busy_until = began + min(busy_seconds, self.timeout_seconds)
            while True:
                for _ in range(_TESTS_PER_LOOK):
                    if request.Test():
                        return
                if time.monotonic() > busy_until:
                    break
                time.sleep(0)  # others may need this core
            self._wait(request, wanted, began)
        except MPI.Exception as error:
            self._end(_LOST, f"worker {self.rank} lost another in {wanted.text}: {error}")

    def _wait(self, request: Request, wanted: Fingerprint, began: float) -> None:
        post = self._post
        has_said, nap = False, _NAP_SECONDS
        while not request.Test():
            post.listen()
            if post.ended is not None:
                raise self._why_ended()
            for worker, (rounds, why) in post.left.items():
                if rounds[self._channel] < self._number:
                    text = f"worker {worker} is lost while {wanted.text} waits for it: {why}"
                    self._end(_LOST, text)
            waited = time.monotonic() - began
            where = self._number
            others_say = any(self._is_here(worker) for worker in range(self.size))
            is_due = others_say or waited > min(_SAY_SECONDS, self.timeout_seconds / 4)
            if is_due and not has_said:
                post.send(_WAITS + self._channel, str(where))
                has_said = True
            if waited > self.timeout_seconds:
                self._give_up(wanted)
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP_SECONDS)

    def _is_here(self, worker: int) -> bool:
        """Tell whether a worker has said that it waits in this round, or is ahead in the next."""
        return self._post.waits.get((self._channel, worker), 0) >= self._number

    def _give_up(self, wanted: Fingerprint) -> None:
        others = (worker for worker in range(self.size) if worker != self.rank)
        absent = [worker for worker in others if not self._is_here(worker)]
        # One that waits in the collective before this, or over the other channel, is absent too,
        # but because of another, who stopped half-way.
        absent = [worker for worker in absent if not self._post.is_held_up(worker)] or absent
        last = "before any collective" if self._last is None else f"in {self._last.text}"
        self._end(
            _GAVE_UP,
            f"worker {self.rank} waited {self.timeout_seconds:g} s in vain for workers {absent} "
            f"to call {wanted.text}: they were last seen {last}; give timeout_seconds if they "
            f"need longer",
        )

    # -- the end ---------------------------------------------------------------------------------

    def end(self, error: BaseException) -> None:
        """End the group, unless it has ended."""
        if not self.has_ended:
            kind = _GAVE_UP if isinstance(error, CollectiveTimeoutError) else _LOST
            self._post.end(kind, str(error))

    def _end(self, kind: int, text: str) -> NoReturn:
        self._post.end(kind, text)
        raise self._why_ended()

    def _why_ended(self) -> BaseException:
        assert self._post.ended is not None
        kind, text = self._post.ended
        error = CollectiveTimeoutError(text) if kind == _GAVE_UP else WorkerLostError(text)
        return self._standing.note(error)

    @property
    def has_ended(self) -> bool:
        """Whether no further round is possible."""
        self._post.listen()
        return self._post.ended is not None

    @property
    def is_settled(self) -> bool:
        """Whether nothing is under way that the end of the process would have to wait for.

        When all have left, those that came to fewer rounds come to the last one too: a failure
        may have been announced there of which they need not hear any more.
        """
        return all([wire._is_level(self._post) for wire in (self, self.beside())])

    def _is_level(self, post: _Post) -> bool:
        if post.ended is not None:
            return True  # in its own way: nothing will be finished any more
        if not self.is_complete():
            return False
        if len(post.left) < self.size - 1:
            return not self._agreement.is_open
        while self._number < max((rounds[self._channel] for rounds, _ in post.left.values())):
            self.come(_LEVEL, 0)
            if not self.is_complete():
                return False
        return True

    def announce(self, error: BaseException) -> None:
        """Tell the others, wherever they wait, that this worker's step has failed."""
        if not self.has_ended:
            self._standing.announce(error, self.rank)

    def leave(self, text: str) -> None:
        """Say that this worker comes to no further round, and why."""
        self._post.send(_LEFT, f"{self._number} {self.beside()._number};{text}")

    def those_that_stay(self) -> list[int]:
        """Return the workers that have not said that they leave."""
        self._post.listen()
        return [w for w in range(self.size) if w != self.rank and w not in self._post.left]


def _nothing() -> None:
    """Stage nothing: what is carried follows the round."""
