"""The workers of one host, over memory that they share: one pass, and no message.

Each worker copies a piece of its array into its place, waits for the others, and combines the
pieces of all into its result, or of four and more workers a part of them into one for all;
compiled code (see kernels/cpu/shm_all_reduce.py) does that for all pieces in one call, and comes
back where a worker is late or asks for something else. For n workers of S bytes each worker moves
the lesser of (n + 3) S and (5 + 1/n) S bytes, most of it in the caches: a piece is small. All
combine in the order of workers, so all get the same bits, and those of the kernels within one
process.

Arrays that lie in the workers' window (see symmetric_memory.py) are not copied: each worker
combines a part of all workers' arrays, where they lie, into all of them: 2 S bytes a worker, by all
of its threads. The order is then that of the replicas, as in one process, whichever worker they
belong to.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, final

import numpy as np

from dvkernels.cluster import procfs
from dvkernels.communicators import accumulation
from dvkernels.communicators.workers import wait
from dvkernels.communicators.workers.consistency import (
    ConsistencyCheck,
    FailureState,
    Fingerprint,
    Vote,
    asked,
)
from dvkernels.communicators.workers.shm.segment import NUM_CHANNELS, PLACE_NBYTES, Segment
from dvkernels.communicators.workers.shm.symmetric_memory import SymmetricMemory
from dvkernels.communicators.workers.wait import Finish
from dvkernels.errors import CollectiveTimeoutError, DvKernelsError, WorkerLostError
from dvkernels.kernels.cpu import direct, shm_all_reduce
from dvkernels.kernels.cpu.engine import shm_barrier
from dvkernels.reduce_op import ReduceOp, Reduction

__all__: list[str] = []

# A pause is 20 to 45 ns: about 1.5 ms, as replicas of one process wait for each other. With more
# workers than cores a waiter keeps the one that it waits for from running, so it sleeps at once.
_PAUSES, _PAUSES_OF_MANY = 60_000, 100
_PAUSES_BETWEEN_NAPS = 100
_NAP_SECONDS, _LONGEST_NAP_SECONDS = 50e-6, 1e-3
_LOOK_SECONDS = 0.1  # how often a waiter asks whether those that it waits for still exist
_LOST, _GAVE_UP = 1, 2
_MOST_VIEWS = 256
_LINE = 64
_NO_PIECE, _NOTHING = slice(0), np.empty(0)
# Bytes of a worker from which arrays are reduced where they lie: shorter ones take less time in one
# compiled call (256 KiB of two processes 45 and 30 us, 1 MiB 40 and 85 us; 2 cores of an AMD EPYC).
_LEAST_IN_WINDOW = 512 * 1024
_WHERE = 2  # makes one number another
_REDUCED = asked("all_reduce, the end")

T = TypeVar("T")


@final
class SharedMemoryTransport:
    """Carries arrays between the workers of one host. See ``workers.Transport``.

    Parameters
    ----------
    room : Segment
    timeout_seconds : float
        How long to wait for the other workers.
    is_roomy : bool
        Each worker has a core of its own, so waiting ones may spin.
    window : SymmetricMemory, optional
        Where :meth:`empty` makes arrays.
    """

    def __init__(
        self,
        room: Segment,
        timeout_seconds: float,
        is_roomy: bool,
        window: SymmetricMemory | None = None,
        *,
        channel: int = 0,
        standing: FailureState | None = None,
    ) -> None:
        self.rank, self.size = room.rank, room.size
        self.timeout_seconds = timeout_seconds
        self._room = room
        self.window = window
        self._channel = channel
        self._pauses = _PAUSES if is_roomy else _PAUSES_OF_MANY
        self._lines = room.lines(channel)
        self._places = room.places(channel)
        self._relay = shm_all_reduce.SharedMemoryAllReduce(
            self._lines, self.rank, self._places, self.size, self._pauses
        )
        self._number = 0
        self._last: Fingerprint | None = None
        self._views: dict[Any, list[list[Any]]] = {}
        self._standing = standing or FailureState()
        self._agreement = ConsistencyCheck(self, self._standing, functools.partial(room.end, _LOST))
        if channel + 1 < NUM_CHANNELS:
            # Without the window: when it was opened is not known in the order of the other's calls.
            self._beside: SharedMemoryTransport | None = SharedMemoryTransport(
                room, timeout_seconds, is_roomy, channel=channel + 1, standing=self._standing
            )
        else:
            self._beside = None

    takes_columns = True

    def beside(self) -> SharedMemoryTransport:
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
        """Leave the reduction of all workers' sources in each target: flat, of one dtype."""
        with self._agreement:
            if self._is_reduced_in_window(columns, num_sources, op, wanted, divisor):
                return
            if self._relay.lay_out(columns, num_sources, op):
                self._reduce_on(wanted, divisor)
            elif len(columns) == 1:
                self._reduce_by_kernels(columns[0], num_sources, op, wanted, divisor)
            else:
                self._reduce_packed(columns, num_sources, op, wanted, divisor)

    def _is_reduced_in_window(
        self,
        columns: Sequence[Sequence[Any]],
        num_sources: int,
        op: Reduction,
        wanted: Fingerprint,
        divisor: int,
    ) -> bool:
        """Reduce the arrays where they lie, if they do so in the window, alike on all workers."""
        window = self.window
        if window is None or not window.is_open:
            return False
        if sum(column[0].nbytes for column in columns) < _LEAST_IN_WINDOW:
            return False
        placed = window.place(columns, num_sources)
        where = -1 if placed is None else placed.number
        # Another number than that of a piece, so nobody takes this round for one.
        self._round(Fingerprint(wanted.text, wanted.number ^ _WHERE), where, _nothing)
        if placed is None or any(word.nbytes != where for word in self._words()):
            return False
        window.reduce(placed, ReduceOp.MEAN if divisor > 1 else op)
        self._round(_REDUCED, 0, _nothing)
        self._last = wanted
        return True

    def _reduce_packed(
        self,
        columns: Sequence[Sequence[Any]],
        num_sources: int,
        op: Reduction,
        wanted: Fingerprint,
        divisor: int,
    ) -> None:
        """Do it with one column that holds all of them: others may have them one by one."""
        packed = [np.concatenate(arrays) for arrays in zip(*columns, strict=True)]
        self._reduce_by_kernels(packed, num_sources, op, wanted, divisor)
        ends = itertools.accumulate((column[0].size for column in columns), initial=0)
        for column, (start, stop) in zip(columns, itertools.pairwise(ends), strict=True):
            for target, whole in zip(column[num_sources:], packed[num_sources:], strict=True):
                target[...] = whole[start:stop]

    def _reduce_on(self, wanted: Fingerprint, divisor: int) -> None:
        """Let compiled code go on, from one worker that is late to the next."""
        agreement, way = self._agreement, self._relay
        has_come = not agreement.is_settled
        if has_come:
            self._reach(wanted)
        while True:
            how, self._number = way.run(self._number, wanted.number, divisor, has_arrived=has_come)
            if how == shm_all_reduce.DONE:
                self._last = wanted
                return
            has_come = True
            if self._await(wanted, self._pauses) != shm_barrier.AGREED:
                agreement.judge(self._words(), wanted)
                self._reach(wanted)

    def _reach(self, wanted: Fingerprint) -> None:
        """Come, with the piece at hand, to a round in which all ask for the like."""
        way = self._relay
        self._agreement.reach(wanted, way.nbytes, lambda: way.stage(self._number))

    def _reduce_by_kernels(
        self,
        column: Sequence[Any],
        num_sources: int,
        op: Reduction,
        wanted: Fingerprint,
        divisor: int,
    ) -> None:
        """Do the same, for what compiled code declines: custom reductions."""
        sources, targets = column[:num_sources], column[num_sources:]
        step = PLACE_NBYTES // sources[0].itemsize
        pieces = [slice(k, k + step) for k in range(0, max(1, sources[0].size), step)]
        if not self._relay.is_in_parts(sources[0].nbytes):
            for here in pieces:
                views = self._staged([source[here] for source in sources], op, wanted)
                first, *others = (target[here] for target in targets)
                direct.reduce(views[: self.size], op, out=first)
                accumulation.divide(first, divisor)
                for other in others:
                    other[...] = first
            return
        result = _NOTHING
        for here, before in zip([*pieces, _NO_PIECE], [_NO_PIECE, *pieces], strict=True):
            views = self._staged([source[here] for source in sources], op, wanted)
            for target in targets:
                target[before] = result
            result = views[self.size]
            self._combine_part(views, op, divisor)

    def _combine_part(self, views: Sequence[Any], op: Reduction, divisor: int) -> None:
        """Combine this worker's part of all places into the one behind them."""
        *places, result = views
        per_line = _LINE // result.itemsize
        count = -(-result.size // per_line)
        low, high = (count * k // self.size * per_line for k in (self.rank, self.rank + 1))
        if low < min(high, result.size):
            direct.reduce([place[low:high] for place in places], op, out=result[low:high])
            accumulation.divide(result[low:high], divisor)

    def _staged(self, pieces: Sequence[Any], op: Reduction, wanted: Fingerprint) -> list[Any]:
        """Return the places of a round to which all have brought what their pieces make."""
        views = self._views_of(pieces[0].dtype, pieces[0].size)
        stage = functools.partial(_stage, views, self.rank, pieces, op)
        return views[self._round(wanted, pieces[0].nbytes, stage)]

    def gather(self, source: Any, wanted: Fingerprint) -> list[Any]:
        """Return the bytes of all workers, as many as each has."""
        longest, start = 0, 0
        results: list[Any] = []
        with self._agreement:
            while not results or start < longest:
                piece = source[start : start + PLACE_NBYTES]
                parity = self._round(wanted, source.nbytes, functools.partial(self._put, piece))
                if not results:
                    results = [np.empty(word.nbytes, np.uint8) for word in self._words()]
                    longest = max(len(result) for result in results)
                places = self._places[parity, : self.size]
                for result, place in zip(results, places, strict=True):
                    part = result[start : start + PLACE_NBYTES]
                    part[...] = place[: len(part)]
                start += PLACE_NBYTES
        return results

    def broadcast_into(self, target: Any, root: int, wanted: Fingerprint) -> None:
        """Leave the root's bytes in ``target``, which holds them on the root."""
        with self._agreement:
            for start in range(0, max(1, len(target)), PLACE_NBYTES):
                piece = target[start : start + PLACE_NBYTES]
                mine = piece if self.rank == root else piece[:0]
                parity = self._round(wanted, piece.nbytes, functools.partial(self._put, mine))
                if self.rank != root:
                    piece[...] = self._places[parity, root, : len(piece)]

    def carry(self, move: Callable[[list[int], Finish], T], number: int, wanted: Fingerprint) -> T:
        """Return what ``move`` makes of the numbers of all workers, not below 0."""
        with self._agreement:
            self._round(wanted, number, _nothing)
            look = functools.partial(self._look_at_those_that_move, wanted)
            told = [word.nbytes for word in self._words()]
            try:
                return move(told, functools.partial(wait.finish, look=look))
            except DvKernelsError:
                raise
            except Exception as error:  # of MPI, or of a GPU
                look(0.0)  # which may know whom MPI has lost
                self._end(_LOST, f"worker {self.rank} failed in {wanted.text}: {error}")

    def _put(self, piece: Any, parity: int) -> None:
        self._places[parity, self.rank, : len(piece)] = piece

    def _views_of(self, dtype: Any, size: int) -> list[list[Any]]:
        """Return the beginning of each place as an array, by parity and worker."""
        found = self._views.get((dtype, size))
        if found is None:
            if len(self._views) == _MOST_VIEWS:
                self._views.clear()
            nbytes = size * dtype.itemsize
            found = [[place[:nbytes].view(dtype) for place in half] for half in self._places]
            self._views[dtype, size] = found
        return found

    # -- rounds ----------------------------------------------------------------------------------

    def _round(self, wanted: Fingerprint, nbytes: int, stage: Callable[[int], None]) -> int:
        """Stage, meet, and return the parity of the round in which all brought the like."""
        agreement = self._agreement
        if agreement.is_settled:  # nearly always: in short what reach() does
            stage(self._number + 1 & 1)
            self.come(wanted.number, nbytes)
            if self._await(wanted, self._pauses) == shm_barrier.AGREED:
                self._last = wanted
                return self._number & 1
            agreement.judge(self._words(), wanted)
        agreement.reach(wanted, nbytes, lambda: stage(self._number + 1 & 1))
        self._last = wanted
        return self._number & 1

    def come(self, number: int, nbytes: int, text: str = "") -> None:
        """Come to the next round, without waiting."""
        self._number += 1
        if text:
            self._room.say(self._channel, self._number & 1, text)
        shm_barrier.arrive(self._lines, self.rank, self._number, number, nbytes)

    def is_complete(self) -> bool:
        """Tell, without waiting, whether all have come to the round."""
        outcome = shm_barrier.await_round(self._lines, self.size, self.rank, self._number, 0)
        return bool(outcome in (shm_barrier.AGREED, shm_barrier.MISMATCHED))

    def await_all(self, asked_for: Fingerprint) -> list[Vote]:
        """Return what each worker brought to the round, when all have come."""
        self._await(asked_for, self._pauses)
        return self._words()

    def text_of(self, worker: int) -> str:
        """Return what a worker said in the latest round."""
        return self._room.said(self._channel, self._number & 1, worker)

    def _words(self) -> list[Vote]:
        parity = self._number & 1
        lines = self._room.rounds(self._channel)
        return [Vote(int(line[1 + parity]), int(line[3 + parity])) for line in lines]

    def _await(self, wanted: Fingerprint, num_pauses: int) -> int:
        """Return what a wait for all finds, AGREED or MISMATCHED; raise if it is in vain."""
        given = (self._lines, self.size, self.rank, self._number)
        outcome = int(shm_barrier.await_round(*given, num_pauses))
        if outcome == shm_barrier.LATE:
            began = time.monotonic()
            look = began + _LOOK_SECONDS
            nap = _NAP_SECONDS
            while outcome == shm_barrier.LATE:
                time.sleep(nap)
                nap = min(2 * nap, _LONGEST_NAP_SECONDS)
                outcome = int(shm_barrier.await_round(*given, _PAUSES_BETWEEN_NAPS))
                now = time.monotonic()
                if outcome == shm_barrier.LATE and now > look:
                    self._look_for_the_absent(wanted, now - began)
                    look = now + _LOOK_SECONDS
        if outcome == shm_barrier.ENDED:
            raise self._why_ended()
        return outcome

    def _look_for_the_absent(self, wanted: Fingerprint, waited_seconds: float) -> None:
        """End the group if one of those that are waited for will never come, or not in time."""
        room = self._room
        lines = room.rounds(self._channel)
        absent = [w for w in range(self.size) if lines[w, 0] < self._number]
        for worker in absent:
            why = room.why_left(worker)
            if why is None and not room.is_alive(worker):
                why = f"process {room.process_of(worker)} is gone without a word: was it killed?"
            if why is not None:
                self._end(_LOST, f"worker {worker} is lost while {wanted.text} waits for it: {why}")
        if waited_seconds > self.timeout_seconds:
            last = "before any collective" if self._last is None else f"in {self._last.text}"
            seen = "; ".join(self._whereabouts(worker, last) for worker in absent)
            self._end(
                _GAVE_UP,
                f"worker {self.rank} waited {self.timeout_seconds:g} s in vain for workers "
                f"{absent} to call {wanted.text}: {seen}; give timeout_seconds if they need longer",
            )

    def _look_at_those_that_move(self, wanted: Fingerprint, waited_seconds: float) -> None:
        """End the group if another that has come cannot move its data any more, or not in time.

        One that has left may have done its part: MPI brings the rest of it.
        """
        room = self._room
        if self.has_ended:
            raise self._why_ended()
        others = [worker for worker in range(self.size) if worker != self.rank]
        for worker in others:
            if room.why_left(worker) is None and not room.is_alive(worker):
                process = room.process_of(worker)
                why = f"process {process} is gone without a word: was it killed?"
                self._end(_LOST, f"worker {worker} is lost while {wanted.text} waits for it: {why}")
        if waited_seconds > self.timeout_seconds:
            stopped = [w for w in others if procfs.state_of(room.process_of(w)) in ("T", "t")]
            late = stopped or others
            seen = "; ".join(self._whereabouts(worker, f"in {wanted.text}") for worker in late)
            self._end(
                _GAVE_UP,
                f"worker {self.rank} waited {self.timeout_seconds:g} s in vain for workers {late} "
                f"to move their data in {wanted.text}: {seen}; give timeout_seconds if they need "
                f"longer",
            )

    def _whereabouts(self, worker: int, last: str) -> str:
        process = self._room.process_of(worker)
        doing = {"T": "stopped", "t": "stopped by a debugger"}.get(
            procfs.state_of(process), "alive"
        )
        return f"worker {worker}, process {process}, is {doing} and was last seen {last}"

    # -- the end ---------------------------------------------------------------------------------

    def end(self, error: BaseException) -> None:
        """End the group, unless it has ended."""
        if not self.has_ended:
            kind = _GAVE_UP if isinstance(error, CollectiveTimeoutError) else _LOST
            self._room.end(kind, str(error))

    def _end(self, kind: int, text: str) -> NoReturn:
        self._room.end(kind, text)
        raise self._why_ended()

    def _why_ended(self) -> BaseException:
        found = self._room.why_ended()
        assert found is not None
        kind, text = found
        error = CollectiveTimeoutError(text) if kind == _GAVE_UP else WorkerLostError(text)
        return self._standing.note(error)

    @property
    def has_ended(self) -> bool:
        """Whether no further round is possible."""
        return self._room.why_ended() is not None

    def announce(self, error: BaseException) -> None:
        """Tell the others, wherever they wait, that this worker's step has failed."""
        if not self.has_ended:
            self._standing.announce(error, self.rank)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is under way that the end of the process would have to wait for."""
        return True

    def leave(self, text: str) -> None:
        """Say that this worker comes to no further round, and why."""
        self._room.leave(text)

    def those_that_stay(self) -> list[int]:
        """Return the workers that exist, and have not left."""
        room = self._room
        others = (worker for worker in range(self.size) if worker != self.rank)
        return [w for w in others if room.why_left(w) is None and room.is_alive(w)]


def _nothing(parity: int) -> None:
    """Stage nothing: the arrays stay where they are."""


def _stage(
    views: Sequence[Sequence[Any]], rank: int, pieces: Sequence[Any], op: Reduction, parity: int
) -> None:
    direct.reduce(pieces, op, out=views[parity][rank])
