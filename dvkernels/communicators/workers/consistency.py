"""Whether all workers ask for the same: compared before anything of it is carried out.

Workers meet in rounds, one after another. To a round each brings a number that stands for what it
asks for; only if all are equal it is carried out. A worker whose step has failed brings a number
that equals none, so that the others learn of it where they would wait in vain, and all are in step
again. So failures need no messages of their own, and leave nothing unfinished behind.
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
from dvkernels.errors import CollectiveMismatchError, CollectiveTimeoutError
from dvkernels.replicas.rendezvous import StepEnded, user_line
from dvkernels.user_errors import in_words, rests_on

__all__: list[str] = []

_MOST_SAID = 300  # characters of what a worker asks for, in messages
_REMEMBERED = 16  # errors that the others know of


class Fingerprint(NamedTuple):
    """What a worker asks for: in words, and as a number that equals no other's."""

    text: str
    number: int  # positive


class Vote(NamedTuple):
    """What a worker brought to a round."""

    number: int
    nbytes: int


@functools.lru_cache(maxsize=1024)
def asked(verb: str, *terms: Any) -> Fingerprint:
    """Return what a verb with these terms asks for; equal terms print alike on all workers."""
    text = f"{verb}({', '.join(str(term) for term in terms)})"
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return Fingerprint(text[:_MOST_SAID], int.from_bytes(digest) >> 1 | 1)


class ControlChannel(Protocol):
    """Carries the rounds."""

    rank: int
    size: int
    timeout_seconds: float

    def come(self, number: int, nbytes: int, text: str = "") -> None:
        """Come to the next round, without waiting. What has a text may be slow."""

    def is_complete(self) -> bool:
        """Tell, without waiting, whether all have come to the round that this worker is in."""

    def await_all(self, asked_for: Fingerprint) -> list[Vote]:
        """Return what each worker brought to the round, when all have come.

        Raises ``CollectiveTimeoutError`` and ``WorkerLostError``, after which no round ever ends.
        """

    def text_of(self, worker: int) -> str:
        """Return the text that a worker brought to the latest round."""


class FailureState:
    """How many failures a worker has taken note of: one count for all the wires of a group.

    All workers that have come to the same round of a wire have counted the same.

    Attributes
    ----------
    generation : int
        The number of failures. What began before the latest of them has ended with it.
    agreements : list of ConsistencyCheck
        Of this worker, one for each wire.
    """

    __slots__ = ("_known", "_telling", "agreements", "generation")

    def __init__(self) -> None:
        self.generation = 0
        self.agreements: list[ConsistencyCheck] = []
        self._known: deque[BaseException] = deque(maxlen=_REMEMBERED)
        self._telling = threading.RLock()  # of whom announces: each failure is counted once

    def note(self, error: BaseException) -> BaseException:
        """Remember, and return, an error that the others know of."""
        self._known.append(error)
        return error

    def is_known(self, error: BaseException) -> bool:
        """Tell whether the others know of an error, or of one that it was raised because of."""
        return rests_on(error, tuple(self._known))

    def announce(self, error: BaseException, rank: int) -> None:
        """Tell the others over every wire that the step of this worker has failed."""
        try:
            self._telling.acquire(timeout=deadlines.timeout_seconds())
            if not self.is_known(error):
                self.fail(f"worker {rank} raised {in_words(self.note(error))}", self.agreements)
        finally:
            try:  # noqa: SIM105 - entering a context manager would let an interrupt in first
                self._telling.release()
            except RuntimeError:  # not ours
                pass

    def fail(self, text: str, agreements: Iterable[ConsistencyCheck]) -> None:
        """Count a failure, and tell of it over some wires."""
        generation, self.generation = self.generation, self.generation + 1
        for agreement in agreements:
            agreement.announce(generation, text)


# The number of the rounds in which workers that disagree tell who did what.
_TELL = asked("tell who asked for what")


class ConsistencyCheck:
    """One worker's side of the rounds over one wire.

    Parameters
    ----------
    wire : ControlChannel
    standing : FailureState
        Of this worker; shared by its wires.
    end : callable
        Told in words what stopped a collective half-way, of which no other worker knows.

    Notes
    -----
    A context, to be entered for each collective: it may take several rounds.
    """

    def __init__(
        self, wire: ControlChannel, standing: FailureState, end: Callable[[str], None]
    ) -> None:
        self._wire = wire
        self._standing = standing
        standing.agreements.append(self)
        self._end = end
        self._owed: deque[tuple[int, str]] = deque()  # failures to be announced
        # Of who comes to the next round. An interrupt on the way into a collective leaves it with
        # its thread, which then announces that its step has failed, and gives it back.
        self._turn = threading.RLock()
        self._began = 0  # the generation in which the collective that is under way began
        self.is_open = False  # the latest round is the announcement of a failure

    def __enter__(self) -> None:
        if not self._turn.acquire(timeout=self._wire.timeout_seconds):
            raise CollectiveTimeoutError(
                f"another thread of worker {self._wire.rank} has been in a collective for "
                f"{self._wire.timeout_seconds:g} s, or was interrupted on its way into one"
            )
        self._began = self._standing.generation

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None and not self._standing.is_known(error):
                said = in_words(error)
                self._end(f"worker {self._wire.rank} left a collective half-way: {said}")
        finally:
            self._turn.release()
        if self._owed:
            self._announce_now()

    @property
    def is_settled(self) -> bool:
        """Whether this worker has nothing left to announce."""
        return not self.is_open and not self._owed

    def announce(self, generation: int, text: str) -> None:
        """Tell the others of a failure in the next round, without waiting for them.

        If a collective is under way in another thread, in the round after it.
        """
        self._owed.append((generation, text))
        self._announce_now()

    def _announce_now(self) -> None:
        try:
            if self._turn.acquire(blocking=False):
                if self.is_open and self._wire.is_complete():
                    self.is_open = False  # all have heard of the failure before
                if self._owed and not self.is_open:
                    self._announce_next()
        finally:
            try:
                while True:  # what an interrupt has left with this thread, too
                    self._turn.release()
            except RuntimeError:  # it is not ours, or no more
                pass

    def _announce_next(self) -> None:
        generation, text = self._owed.popleft()
        self.is_open = True
        self._wire.come(-1 - generation, 0, text)

    def settle(self, wanted: Fingerprint) -> None:
        """Wait until the others have heard of every failure that was announced."""
        while not self.is_settled:
            if self.is_open:
                words = self._wire.await_all(wanted)
                self.is_open = False
                self._hear_failures(words)
            if self._owed:
                self._announce_next()

    def reach(self, wanted: Fingerprint, nbytes: int, stage: Callable[[], object]) -> list[Vote]:
        """Return what all brought to a round in which all ask for the same.

        Parameters
        ----------
        wanted : Fingerprint
        nbytes : int
            How many bytes this worker brings.
        stage : callable
            Puts them where the next round reads them; called before each round that it takes.

        Raises
        ------
        CollectiveMismatchError
            Workers ask for different things, or the step of one of them has failed: on all.
        """
        while True:
            self.settle(wanted)
            stage()
            self._wire.come(wanted.number, nbytes)
            words = self._wire.await_all(wanted)
            if all(word.number == wanted.number for word in words):
                return words
            self.judge(words, wanted)

    def judge(self, words: Sequence[Vote], wanted: Fingerprint) -> None:
        """Raise what words that differ mean; return if they are of an earlier step: try again."""
        if not self._hear_failures(words):
            self._tell_apart(wanted)

    def _hear_failures(self, words: Sequence[Vote]) -> bool:
        """Return whether a worker announced a failure; raise if it ends what is under way."""
        standing = self._standing
        failed = [(-1 - w.number, worker) for worker, w in enumerate(words) if w.number < 0]
        news = [(g, worker) for g, worker in failed if g >= self._began]
        if news:
            generation, worker = max(news, key=lambda one: (one[0], -one[1]))
            standing.generation = max(standing.generation, generation + 1)
            text = f"this step has ended because {self._wire.text_of(worker)}"
            raise standing.note(StepEnded(text))
        return bool(failed)

    def _tell_apart(self, wanted: Fingerprint) -> None:
        said = f"{wanted.text} at {user_line(sys._getframe())}"
        self._wire.come(_TELL.number, 0, said)
        self._wire.await_all(_TELL)
        each = "; ".join(
            f"worker {worker} called {self._wire.text_of(worker)}"
            for worker in range(self._wire.size)
        )
        error = CollectiveMismatchError(
            f"the workers disagree: {each}; every worker must call the same collectives in the "
            f"same order, with the same shapes and dtypes"
        )
        # Here all know. Over other wires some may be waiting for what never comes now.
        others = [one for one in self._standing.agreements if one is not self]
        self._standing.fail(in_words(error), others)
        raise self._standing.note(error)
