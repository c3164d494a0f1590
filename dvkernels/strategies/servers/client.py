"""Client of the servers: sends requests, one message for each server, and waits for the answers."""

from __future__ import annotations

import functools
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, final

from dvkernels import deadlines, pickling
from dvkernels.communicators.workers import wait
from dvkernels.communicators.workers.message_channel import MessageChannel
from dvkernels.errors import CollectiveTimeoutError, ContextError, WorkerLostError
from dvkernels.profiler import tracing
from dvkernels.replicas.step_lock import StepLock
from dvkernels.strategies.servers import message
from dvkernels.strategies.servers.message import References
from dvkernels.threads import shielded

__all__: list[str] = []

_LOOK_SECONDS = 0.1  # how often a request looks whether Ctrl-C came


class _ServerLink:
    """Server as a client sees it."""

    def __init__(self, channel: MessageChannel) -> None:
        self.channel = channel
        self.turn = StepLock()  # of the threads of this process
        self.num_asked = 0
        self.dropped: deque[Any] = deque()  # keys of variables and optimizers that are gone
        self.nbytes = 0  # of the rows that it has, on the coordinator
        self.names: dict[int, str] = {}  # of the variables that are known here, by key


@final
class ServerClient:
    """Requests of one process to all servers; threads take turns for each server.

    Parameters
    ----------
    channels : sequence of MessageChannel
        To the servers.
    timeout_seconds : float
        How long an answer may take [s].
    is_interruptible : bool
        Whether Ctrl-C may reach the main thread of this process.
    """

    references: References  # set when the strategy exists

    def __init__(
        self,
        channels: Sequence[MessageChannel],
        timeout_seconds: float,
        is_interruptible: bool,
    ) -> None:
        self.servers = {channel.peer: _ServerLink(channel) for channel in channels}
        self._timeout_seconds = deadlines.of_strategy(timeout_seconds)
        self._is_interruptible = is_interruptible
        self._pid = os.getpid()
        self.is_closed = False

    def ask(
        self,
        what: str,
        asked: Sequence[tuple[int, tuple[Any, ...]]],
        author: int | None = None,
    ) -> list[Any]:
        """Return the answers to requests, ``(server, request)``; each server gets one message.

        A request is ``(verb, function, key, *arguments)``. They count as those of ``author``, the
        rank of a process, or as this one's.

        Raises
        ------
        CollectiveTimeoutError
            A server does not answer.
        WorkerLostError
            A server is gone; names its variables.
        """
        if self._pid != os.getpid():
            raise ContextError(
                f"{what}: this process was forked from one that talks to the servers; only that "
                f"one can"
            )
        if self.is_closed:
            raise ContextError(f"{what}: its strategy has been closed, and the servers have ended")
        recording = tracing.active
        verb = asked[0][1][0] if asked else ""
        began = 0 if recording is None or verb == "report" else recording.begin(verb)
        answers: list[Any]
        if self._is_interruptible:
            ask = functools.partial(self._ask, what, asked, author)
            answers = shielded.uninterrupted(ask)
        else:
            answers = self._ask(what, asked, author)
        if recording is not None and began:
            about = {"request": what, "servers": sorted({rank for rank, _ in asked})}
            recording.end(verb, "request", began, about)
        return answers

    def name(self, key: int, name: str, blocks: Iterable[Any]) -> None:
        """Keep the name of a variable, of which servers have blocks, for messages."""
        for block in blocks:
            self.servers[block.server].names[key] = name

    def drop(self, key: Any) -> None:
        """Let the servers drop what has this key, with the next message to each."""
        for server in self.servers.values():
            server.names.pop(key, None)
            server.dropped.append(key)

    def why_lost(self) -> str:
        """Return which server is gone, with its variables; "" if all are there."""
        for server in self.servers.values():
            if why := server.channel.why_gone()[0]:
                return f"{_description(server)}: {why}"
        return ""

    def _ask(
        self, what: str, asked: Sequence[tuple[int, tuple[Any, ...]]], author: int | None
    ) -> list[Any]:
        by_server: dict[int, list[int]] = {}
        for position, (rank, _) in enumerate(asked):
            by_server.setdefault(rank, []).append(position)
        answers: list[Any] = [None] * len(asked)
        taken: list[Any] = []
        try:
            for rank in sorted(by_server):
                server = self.servers[rank]
                lock, began = server.turn.lock(), time.monotonic()
                while not lock.acquire(timeout=min(_LOOK_SECONDS, self._timeout_seconds)):
                    _check_interrupt()
                    if time.monotonic() - began >= self._timeout_seconds:
                        raise CollectiveTimeoutError(
                            f"{what} waited {self._timeout_seconds:g} s in vain for another thread "
                            f"that waits for server {rank}"
                        )
                taken.append((server, lock))
            for rank, positions in by_server.items():
                listed = [asked[position][1] for position in positions]
                self._send(self.servers[rank], listed, author)
            servers = [self.servers[rank] for rank in by_server]
            if len(servers) > 1:
                self._flush([server.channel for server in servers])
            # All answers are taken before an error is raised.
            outcomes = [self._outcome(what, server) for server in servers]
        finally:
            for server, lock in taken:
                server.channel.own_unsent()  # the caller's arrays may change from now on
                lock.release()
        for (error, results), positions in zip(outcomes, by_server.values(), strict=True):
            if error is not None:
                raise error
            for position, result in zip(positions, results, strict=True):
                answers[position] = result
        return answers

    def _flush(self, channels: list[MessageChannel]) -> None:
        """Send the messages to several servers at one time, none behind another's answer."""
        num_moved = 0

        def has_moved() -> bool:
            channels[:] = [channel for channel in channels if not channel.flush()]
            return not channels or sum(each.num_moved for each in channels) != num_moved

        def check(_: float) -> None:
            channels[:] = [channel for channel in channels if not channel.why_gone()[0]]
            _check_interrupt()

        pace, is_in_time = channels[0].pace, True
        while channels and is_in_time:
            num_moved = sum(each.num_moved for each in channels)
            is_in_time = wait.until(has_moved, pace, self._timeout_seconds, check)

    def _send(self, server: _ServerLink, listed: list[tuple[Any, ...]], author: int | None) -> None:
        server.num_asked += 1
        dropped = [server.dropped.popleft() for _ in range(len(server.dropped))]
        parts = message.encode((dropped, listed, author), self.references, server.num_asked)
        server.channel.post(parts)

    def _outcome(self, what: str, server: _ServerLink) -> tuple[BaseException | None, list[Any]]:
        channel, began = server.channel, time.monotonic()
        while True:
            left, num_moved = self._timeout_seconds - (time.monotonic() - began), channel.num_moved
            try:
                came = channel.next(what, max(0.0, min(left, _LOOK_SECONDS)))
            except WorkerLostError as error:
                text = f"{what}: {_description(server)} is lost: {server.channel.why_gone()[0]}"
                lost = WorkerLostError(f"{text}; restore a checkpoint in a new job")
                lost.__cause__ = error
                return lost, []
            if came is None and channel.num_moved != num_moved:
                began = time.monotonic()
            elif came is None and left <= _LOOK_SECONDS:
                text = (
                    f"{what}: server {server.channel.peer} has not answered for "
                    f"{self._timeout_seconds:g} s; was it stopped? Give timeout_seconds if its "
                    f"requests take longer. A write may still be carried out: read before you "
                    f"repeat it"
                )
                return CollectiveTimeoutError(text), []
            elif came is not None and pickling.number_of(came) == server.num_asked:
                outcome: tuple[BaseException | None, list[Any]]
                outcome = message.decode(came, self.references)
                return outcome
            # Else it may be the late answer to a request that was given up.
            _check_interrupt()


def _check_interrupt() -> None:
    """Give a request up if Ctrl-C came; its late answer will be skipped."""
    call = shielded.current()
    if call is not None:
        call.check()


def _description(server: _ServerLink) -> str:
    names = sorted(server.names.copy().values())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    held = f"variables {', '.join(map(repr, names[:8]))}{more}" if names else "no variable"
    return f"server {server.channel.peer}, which has {held},"
