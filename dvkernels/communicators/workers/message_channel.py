"""Message channel: whole messages between this process and one other, each way in order.

Unlike collectives, messages need no agreement: a process posts one when it likes, and the other
polls. A message arrives completely or, if its sender dies, not at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from dvkernels.communicators.workers import wait
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import WorkerLostError

__all__: list[str] = []


class MessageChannel(ABC):
    """Both ways between this process and ``peer``; one thread uses it at a time.

    Parameters
    ----------
    peer : int
        The rank of the other process.
    place : str
        The other process in words, for messages.
    why_gone : callable
        Returns why the other process will send nothing more, "" if it may, and whether it has left
        in order.
    """

    def __init__(self, peer: int, place: str, why_gone: Callable[[], tuple[str, bool]]) -> None:
        self.peer, self.place = peer, place
        self.pace = wait.MESSAGE
        # Grows while a message moves: who waits for the rest does not nap longer and longer.
        self.num_moved = 0
        self.why_gone = why_gone

    @abstractmethod
    def post(self, parts: Sequence[memoryview]) -> None:
        """Append a message to those that are sent in order; the parts must not change meanwhile."""

    @abstractmethod
    def flush(self) -> bool:
        """Send as much as the other process has room for; return whether all has been sent."""

    @abstractmethod
    def own_unsent(self) -> None:
        """Copy what has not been sent: the parts of messages may change from now on."""

    @abstractmethod
    def receive(self) -> HostArray | None:
        """Return the bytes of the next message, which the caller then owns; None without one."""

    def check(self, what: str = "a message") -> None:
        """Raise ``WorkerLostError`` if the other process is gone."""
        why, _ = self.why_gone()
        if why:
            raise WorkerLostError(f"process {self.peer} is lost, and with it {what}: {why}")

    def next(self, what: str, seconds: float) -> HostArray | None:
        """Wait for a message and return it; None if nothing of one comes in time.

        Raises
        ------
        WorkerLostError
            The other process is gone, and all that it had sent has been received.
        """
        found, seen = None, 0

        def has_moved() -> bool:
            nonlocal found
            if found is None:
                self.flush()
                found = self.receive()
            return found is not None or self.num_moved != seen

        def check(_: float) -> None:
            if self.why_gone()[0] and not has_moved():  # its last words come first
                self.check(what)

        is_in_time = True
        while found is None and is_in_time:
            seen = self.num_moved
            is_in_time = wait.until(has_moved, self.pace, seconds, check)
        return found
