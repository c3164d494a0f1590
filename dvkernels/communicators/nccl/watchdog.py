"""Watchdog of the NCCL calls that are under way."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol, final

from dvkernels.communicators.workers import wait
from dvkernels.devices import driver
from dvkernels.errors import CollectiveTimeoutError, DeviceError, WorkerLostError
from dvkernels.threads import thread
from dvkernels.threads.claim import Claim
from dvkernels.user_errors import describe

__all__: list[str] = []


class Guard(Protocol):
    """Owner of the supervised calls."""

    def check(self, waited_seconds: float) -> None:
        """Raise if a call will never complete, after a wait for the oldest one."""

    def end(self, error: BaseException) -> None:
        """Abort all calls. Called once, perhaps on the watchdog's thread."""


class _PendingLaunch:
    """Call that has been launched, or is being launched."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.is_given = False  # enqueued on the GPUs; before that a host thread is busy with it
        self.events: list[Any] = []  # the call is complete when they have occurred

    def is_over(self) -> bool:
        return self.is_given and all(event.done for event in self.events)


@final
class Watchdog:
    """Thread that aborts all calls if the oldest one does not complete in time.

    The thread polls twenty times a second while calls are pending, and ends with them. It is not a
    daemon thread: a process that exits waits for its calls, at most until they are aborted.
    ``device`` is any GPU of the calls.
    """

    def __init__(self, timeout_seconds: float, device: int) -> None:
        self._seconds, self._device = timeout_seconds, device
        self._calls: deque[_PendingLaunch] = deque()
        self._vacancy = Claim()  # taken by the one thread that polls
        self._abort_reason: dict[int, BaseException] = {}  # why all calls were aborted, as item 0

    @contextlib.contextmanager
    def watch(self, text: str, guard: Guard) -> Iterator[list[Any]]:
        """Supervise the call made inside, until all events put into the list have occurred.

        ``text`` names the call in errors; ``guard`` is the same for all calls, and kept alive while
        one is pending. Raises ``CollectiveTimeoutError`` or ``WorkerLostError`` if the calls have
        been aborted, before or during this one.
        """
        call = self._begin(text, guard)
        try:
            yield call.events
        except BaseException as error:
            text = f"{text} was left half-way: {describe(error)}"
            self._give_up(WorkerLostError(text), guard)
            if isinstance(error, Exception):
                raise self._abort_error() from error
            raise
        call.is_given = True

    def _begin(self, text: str, guard: Guard) -> _PendingLaunch:
        call = _PendingLaunch(text)
        self._calls.append(call)
        if self._abort_reason:
            raise self._abort_error()
        if self._vacancy.is_free:  # several callers may see it; one of their threads stays
            poller = thread.Thread(target=self._serve, args=[guard], name="dvkernels-watch")
            thread.start([poller])
        return call

    def _abort_error(self) -> BaseException:
        """Return a new copy of the reason: it is raised more than once."""
        why = self._abort_reason[0]
        return type(why)(str(why))

    def _serve(self, guard: Guard) -> None:
        with contextlib.suppress(DeviceError):  # the poll will meet it again
            driver.leave_captures_alone(self._device)  # which a query of an event would end
        is_needed = True
        while is_needed:
            if not self._vacancy.take():
                return  # another thread polls
            self._poll_calls(guard)
            self._vacancy.give_back()
            # A call may have begun while this thread was ending.
            is_needed = bool(self._calls) and not self._abort_reason

    def _poll_calls(self, guard: Guard) -> None:
        try:
            while (oldest := self._oldest()) is not None:
                is_settled = functools.partial(self._is_settled, oldest)
                if not wait.until(is_settled, wait.GPU_CALL, self._seconds, guard.check):
                    raise CollectiveTimeoutError(
                        f"{oldest.text} was launched on the GPUs, and did not complete within "
                        f"{self._seconds:g} s: another worker may be lost, or its GPU busy with "
                        f"other things; give timeout_seconds if they need longer"
                    )
        except (CollectiveTimeoutError, WorkerLostError) as error:
            self._give_up(error, guard)
        except Exception as error:  # of the GPU, whose context is unusable from now on
            failure = WorkerLostError(f"the GPUs of a worker have failed: {describe(error)}")
            self._give_up(failure, guard)

    def _oldest(self) -> _PendingLaunch | None:
        """Return the oldest pending call; None if there is nothing to poll any more."""
        while self._calls and not self._abort_reason:
            if not self._calls[0].is_over():
                return self._calls[0]
            self._calls.popleft()  # only this thread removes calls
        return None

    def _is_settled(self, call: _PendingLaunch) -> bool:
        return bool(self._abort_reason) or call.is_over()

    def _give_up(self, error: BaseException, guard: Guard) -> None:
        if self._abort_reason.setdefault(0, error) is error:
            guard.end(error)
