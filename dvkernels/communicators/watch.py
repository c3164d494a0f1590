"""Calls that GPUs carry out some time later, looked after without waiting for any of them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol, final

from dvkernels.errors import CollectiveTimeoutError, WorkerLostError
from dvkernels.user_errors import in_words

__all__: list[str] = []

_LOOK_SECONDS = 0.05


class Guard(Protocol):
    """What carries out the calls."""

    def ask(self) -> None:
        """Raise if a call will never end."""

    def end(self, error: BaseException) -> None:
        """Give up all calls. Called once, perhaps in a thread of the watch."""


class _Call:
    """A call that is under way."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.is_given = False  # to the GPUs: until then a thread of the host is busy with it
        self.events: list[Any] = []  # when they have happened, it is over

    def is_over(self) -> bool:
        return self.is_given and all(event.done for event in self.events)


@final
class Watch:
    """Ends everything if the oldest call that is under way does not end in time.

    Parameters
    ----------
    timeout_seconds : float
        How long a call may take that no other one is before.

    Notes
    -----
    A thread looks twenty times a second while calls are under way, and ends with them. It is no
    daemon: a process that exits waits for its calls, at most until they are given up.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._seconds = timeout_seconds
        self._calls: deque[_Call] = deque()
        self._is_looking = False
        self._why_ended: BaseException | None = None
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def over(self, text: str, guard: Guard) -> Iterator[list[Any]]:
        """Look after the call that is made inside, until the events put into the list happen.

        Parameters
        ----------
        text : str
            What is called, for messages.
        guard : Guard
            The same for all calls; held while any of them is under way.

        Raises
        ------
        CollectiveTimeoutError, WorkerLostError
            All has ended, before or meanwhile.
        """
        call = self._begun(text, guard)
        try:
            yield call.events
        except BaseException as error:
            text = f"{text} was left half-way: {in_words(error)}"
            self._give_up(WorkerLostError(text), guard)
            if isinstance(error, Exception):
                raise self._ended() from error
            raise
        call.is_given = True

    def _begun(self, text: str, guard: Guard) -> _Call:
        call = _Call(text)
        with self._mutex:
            if self._why_ended is not None:
                raise self._ended()
            self._calls.append(call)
            if not self._is_looking:
                self._is_looking = True
                threading.Thread(target=self._look, args=[guard], name="dvkernels-watch").start()
        return call

    def _ended(self) -> BaseException:
        """Return the reason anew: it is raised more than once."""
        assert self._why_ended is not None
        return type(self._why_ended)(str(self._why_ended))

    def _look(self, guard: Guard) -> None:
        latest, since = None, 0.0
        try:
            while (oldest := self._oldest()) is not None:
                now = time.monotonic()
                if oldest is not latest:
                    latest, since = oldest, now
                elif now - since > self._seconds:
                    raise CollectiveTimeoutError(
                        f"{oldest.text} was given to the GPUs, and did not end within "
                        f"{self._seconds:g} s: another worker may be lost, or its GPU busy with "
                        f"other things; give timeout_seconds if they need longer"
                    )
                guard.ask()
                time.sleep(_LOOK_SECONDS)
        except (CollectiveTimeoutError, WorkerLostError) as error:
            self._give_up(error, guard)
        except Exception as error:  # of the GPU, in which nothing works any more
            failure = WorkerLostError(f"the GPUs of a worker have failed: {in_words(error)}")
            self._give_up(failure, guard)

    def _oldest(self) -> _Call | None:
        """Return the oldest call that is under way; if None, nobody looks any more."""
        with self._mutex:
            while self._calls and self._calls[0].is_over():
                self._calls.popleft()
            self._is_looking = bool(self._calls) and self._why_ended is None
            return self._calls[0] if self._is_looking else None

    def _give_up(self, error: BaseException, guard: Guard) -> None:
        with self._mutex:
            if self._why_ended is not None:
                return
            self._why_ended = error
            self._calls.clear()
        guard.end(error)
