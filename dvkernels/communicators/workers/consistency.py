"""Consistency check of collectives: all workers compare fingerprints before data move.

Workers vote in control rounds, one after another. Each vote is the fingerprint of the collective
that a worker calls, which is carried out only if all votes are equal. A worker whose step has
failed votes a negative number instead, which no fingerprint equals: the other workers learn of the
failure where they would wait in vain, and all are in step again. A failure therefore needs no
message of its own and leaves no collective unfinished.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from dvkernels import deadlines
from dvkernels.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    ContextError,
    WorkerLostError,
)
from dvkernels.replicas.diagnostics import StepEnded, user_line
from dvkernels.user_errors import describe, is_caused_by

__all__: list[str] = []

_MAX_TEXT = 300  # characters of a call in error messages
_REMEMBERED = 16  # errors that other workers know of


class Fingerprint(NamedTuple):
    """Fingerprint of a collective call: its text, and a hash of the whole text."""

    text: str
    number: int  # positive


class Vote(NamedTuple):
    """One worker's contribution to a control round: a fingerprint's number and a byte count."""

    number: int
    nbytes: int


@functools.lru_cache(maxsize=1024)
def fingerprint_of(verb: str, *terms: Any) -> Fingerprint:
    """Return the fingerprint of a verb with its terms; equal terms print alike on all workers."""
    text = f"{verb}({', '.join(str(term) for term in terms)})"
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return Fingerprint(text[:_MAX_TEXT], int.from_bytes(digest) >> 1 | 1)


class ControlChannel(Protocol):
    """Transport of the control rounds."""

    rank: int
    size: int
    timeout_seconds: float

    def arrive(self, number: int, nbytes: int, text: str = "") -> None:
        """Vote in the next round, without waiting; a vote with a text may be slow."""

    def is_complete(self) -> bool:
        """Return, without waiting, whether all workers have arrived in the current round."""

    def await_all(self, call: Fingerprint) -> list[Vote]:
        """Wait for the votes of all workers in the current round.

        Raises ``CollectiveTimeoutError`` and ``WorkerLostError``, after which no round ever ends.
        """

    def text_of(self, worker: int) -> str:
        """Return the text of a worker's vote in the latest round."""

    def end(self, error: BaseException) -> None:
        """Abort the group, unless it has ended: every later call on any worker raises ``error``."""


class FailureState:
    """Count of the failures that a worker has learnt of, shared by the channels of its group.

    All workers that have arrived in the same round of a channel have counted the same failures. The
    latest of the ``generation`` failures has ended every collective begun before it.
    """

    __slots__ = ("_announcing", "_known", "checks", "generation")

    def __init__(self) -> None:
        self.generation = 0
        self.checks: list[ConsistencyCheck] = []  # one for each channel
        self._known: deque[BaseException] = deque(maxlen=_REMEMBERED)
        self._announcing = threading.RLock()  # held while announcing: a failure is counted once

    def note(self, error: BaseException) -> BaseException:
        """Remember and return an error that the other workers know of."""
        self._known.append(error)
        return error

    def is_known(self, error: BaseException) -> bool:
        """Return whether the other workers know of an error or of one of its causes."""
        return is_caused_by(error, tuple(self._known))

    def announce(self, error: BaseException, rank: int) -> None:
        """Tell the other workers, over every channel, that this worker's step has failed."""
        try:
            self._announcing.acquire(timeout=deadlines.timeout_seconds())
            if not self.is_known(error):
                self.fail(f"worker {rank} raised {describe(self.note(error))}", self.checks)
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self._announcing.release()
            except RuntimeError:  # not ours
                pass

    def fail(self, text: str, checks: Iterable[ConsistencyCheck]) -> None:
        """Count a failure, and announce it over the channels of ``checks``."""
        generation, self.generation = self.generation, self.generation + 1
        for check in checks:
            check.announce(generation, text)


# The fingerprint of the rounds in which workers that disagree report their calls.
_MISMATCH_REPORT = fingerprint_of("mismatch report")


class ConsistencyCheck:
    """One worker's side of the control rounds over one channel; surrounds each collective.

    A worker that leaves a collective half-way, because of an error that no other worker knows of,
    aborts the group.
    """

    def __init__(self, channel: ControlChannel, failures: FailureState) -> None:
        self._channel = channel
        self._failures = failures
        failures.checks.append(self)
        self._unannounced: deque[tuple[int, str]] = deque()  # generation and text of failures
        # Held by the thread that votes next. An interrupt on the way into a collective leaves the
        # lock with its thread, which then announces that its step has failed, and releases it.
        self._turn = threading.RLock()
        self._began = 0  # the generation in which the current collective began
        self.is_announcing = False  # this worker's latest vote announces a failure
        self.refusal = ""  # why this process makes no call any more

    def __enter__(self) -> None:
        if self.refusal:
            raise ContextError(self.refusal)
        turn = self._turn  # nearly always free: an acquisition with a timeout takes 0.1 us longer
        if not turn.acquire(False) and not turn.acquire(timeout=self._channel.timeout_seconds):
            raise CollectiveTimeoutError(
                f"another thread of worker {self._channel.rank} has been in a collective for "
                f"{self._channel.timeout_seconds:g} s, or was interrupted on its way into one"
            )
        self._began = self._failures.generation

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None and not self._failures.is_known(error):
                text = f"worker {self._channel.rank} left a collective half-way: {describe(error)}"
                self._channel.end(WorkerLostError(text))
        finally:
            self._turn.release()
        if self._unannounced:
            self._announce_now()

    @property
    def is_settled(self) -> bool:
        """Whether this worker has nothing left to announce."""
        return not self.is_announcing and not self._unannounced

    def announce(self, generation: int, text: str) -> None:
        """Announce a failure in the next round, without waiting for the other workers.

        If another thread is in a collective, the announcement follows in the round after it.
        """
        self._unannounced.append((generation, text))
        self._announce_now()

    def _announce_now(self) -> None:
        try:
            if self._turn.acquire(blocking=False):
                if self.is_announcing and self._channel.is_complete():
                    self.is_announcing = False  # all workers know of the previous failure
                if self._unannounced and not self.is_announcing:
                    self._announce_next()
        finally:
            try:
                while True:  # also what an interrupt has left with this thread
                    self._turn.release()
            except RuntimeError:  # not ours, or not any more
                pass

    def _announce_next(self) -> None:
        generation, text = self._unannounced.popleft()
        self.is_announcing = True
        self._channel.arrive(-1 - generation, 0, text)

    def settle(self, fingerprint: Fingerprint) -> None:
        """Wait until the other workers have received every announced failure."""
        while not self.is_settled:
            if self.is_announcing:
                votes = self._channel.await_all(fingerprint)
                self.is_announcing = False
                self._receive_failures(votes)
            if self._unannounced:
                self._announce_next()

    def agree(
        self, fingerprint: Fingerprint, nbytes: int, stage: Callable[[], object]
    ) -> list[Vote]:
        """Vote until all workers vote for the same call, and return their votes.

        ``stage`` copies ``nbytes`` to the staging buffer of the next round, before each vote.
        Raises ``CollectiveMismatchError`` on all workers if they call different collectives, or if
        the step of one has failed.
        """
        while True:
            self.settle(fingerprint)
            stage()
            self._channel.arrive(fingerprint.number, nbytes)
            votes = self._channel.await_all(fingerprint)
            if all(vote.number == fingerprint.number for vote in votes):
                return votes
            self.diagnose(votes, fingerprint)

    def diagnose(self, votes: Sequence[Vote], fingerprint: Fingerprint) -> None:
        """Raise the error that differing votes mean; return if they concern an earlier step."""
        if not self._receive_failures(votes):
            self._raise_mismatch(fingerprint)

    def _receive_failures(self, votes: Sequence[Vote]) -> bool:
        """Return whether a worker announced a failure; raise if it ends the current collective."""
        failures = self._failures
        failed = [(-1 - w.number, worker) for worker, w in enumerate(votes) if w.number < 0]
        news = [(g, worker) for g, worker in failed if g >= self._began]
        if news:
            generation, worker = max(news, key=lambda failure: (failure[0], -failure[1]))
            failures.generation = max(failures.generation, generation + 1)
            text = f"this step has ended because {self._channel.text_of(worker)}"
            raise failures.note(StepEnded(text))
        return bool(failed)

    def _raise_mismatch(self, fingerprint: Fingerprint) -> None:
        text = f"{fingerprint.text} at {user_line(sys._getframe())}"
        self._channel.arrive(_MISMATCH_REPORT.number, 0, text)
        self._channel.await_all(_MISMATCH_REPORT)
        each = "; ".join(
            f"worker {worker} called {self._channel.text_of(worker)}"
            for worker in range(self._channel.size)
        )
        error = CollectiveMismatchError(
            f"the workers disagree: {each}; every worker must call the same collectives in the "
            f"same order, with the same shapes and dtypes"
        )
        # All workers know it over this channel. Over others some may wait for a vote in vain.
        others = [check for check in self._failures.checks if check is not self]
        self._failures.fail(describe(error), others)
        raise self._failures.note(error)
