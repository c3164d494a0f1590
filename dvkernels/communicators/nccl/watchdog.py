"""Calls that GPUs carry out some time later, looked after without waiting for any of them."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol, final

from dvkernels.errors import CollectiveTimeoutError, WorkerLostError
from dvkernels.threads import thread
from dvkernels.user_errors import in_words

__all__: list[str] = []

_LOOK_SECONDS = 0.05


class Guard(Protocol):
    """What carries out the calls."""

    def ask(self) -> None:
        """Raise if a call will never end."""

    def end(self, error: BaseException) -> None:
        """Give up all calls. Called once, perhaps in a thread of the watch."""


class _PendingLaunch:
    """A call that is under way."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.is_given = False  # to the GPUs: until then a thread of the host is busy with it
        self.events: list[Any] = []  # when they have happened, it is over

    def is_over(self) -> bool:
        return self.is_given and all(event.done for event in self.events)


@final
class Watchdog:
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
        self._calls: deque[_PendingLaunch] = deque()
        self._vacancy = [None]  # taken by the one thread that looks, on that thread
        self._ends: dict[int, BaseException] = {}  # the reason, as item 0

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

    def _begun(self, text: str, guard: Guard) -> _PendingLaunch:
        call = _PendingLaunch(text)
        self._calls.append(call)
        if self._ends:
            raise self._ended()
        if self._vacancy:  # several may see it: of their threads one stays
            looker = thread.Thread(target=self._look, args=[guard], name="dvkernels-watch")
            thread.start([looker])
        return call

    def _ended(self) -> BaseException:
        """Return the reason anew: it is raised more than once."""
        why = self._ends[0]
        return type(why)(str(why))

    def _look(self, guard: Guard) -> None:
        is_needed = True
        while is_needed:
            try:
                self._vacancy.pop()
            except IndexError:
                return  # another thread looks
            self._look_after(guard)
            self._vacancy.append(None)
            is_needed = bool(self._calls) and not self._ends  # it came while this was ending

    def _look_after(self, guard: Guard) -> None:
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

    def _oldest(self) -> _PendingLaunch | None:
        """Return the oldest call that is under way; None if nobody need look any more."""
        while self._calls and not self._ends:
            if not self._calls[0].is_over():
                return self._calls[0]
            self._calls.popleft()  # by this thread only
        return None

    def _give_up(self, error: BaseException, guard: Guard) -> None:
        if self._ends.setdefault(0, error) is error:
            guard.end(error)
