"""What the workers of a job tell ``launch``, each for itself: that it is here, and how it ended.

A launcher alone is not believed: MPICH ends with 0 where a worker vanished and the others were
killed half-way. The first worker is also handed the standard input of ``launch`` itself, which the
launcher need not pass on then: MPICH kills a job that does not read as fast as it is fed.

All goes through a socket of Linux without a file, so nothing can be left behind. Workers of other
hosts do not reach it, and say nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import struct
import sys
from collections.abc import Mapping
from typing import final

from dvkernels import deadlines
from dvkernels.cluster import launcher_environment
from dvkernels.errors import ClusterError

__all__ = ["VARIABLE", "ExitRecord", "ExitRecords", "entry_of"]

VARIABLE = "DVKERNELS_LEDGER"

_HERE, _ENDED, _REPLACED = "here", "ended", "replaced"
_NBYTES = 64  # more than any line has
_SECONDS_FOR_A_LINE = 1.0  # it is sent as soon as the connection is there
_CREDENTIALS = struct.Struct("3i")  # process, user, group
# Nobody listens any more, or a variable with a deadline is malformed, which others say better.
_LOST = contextlib.suppress(OSError, ValueError)


@final
class ExitRecords:
    """The end of ``launch``.

    Parameters
    ----------
    given : int or None
        The descriptor of the input for the first worker; None for nothing.
    """

    def __init__(self, given: int | None) -> None:
        self._given = given
        self._here: dict[int, int] = {}  # and how many they say there are on this host
        self._replaced: set[int] = set()
        self._ended: dict[int, int] = {}  # in their order
        self.environ: dict[str, str] = {}
        self._listener: socket.socket | None = None
        if sys.platform == "linux":
            name = f"dvkernels-{os.getpid()}-{secrets.token_hex(8)}"
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(f"\0{name}")
            self._listener.listen(socket.SOMAXCONN)
            self._listener.setblocking(False)
            self.environ[VARIABLE] = name

    def serve(self, seconds: float, other: int) -> None:
        """Take down what workers say, for so long at most.

        Returns earlier when somebody has said something, or the descriptor ``other`` can be read,
        if that is none below 0.
        """
        awaited = [end for end in (self._listener, other) if end is not None and end != -1]
        select.select(awaited, [], [], seconds)
        if self._listener is None:
            return
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            with connection, contextlib.suppress(OSError, ValueError):
                self._take_down(connection)

    def _take_down(self, connection: socket.socket) -> None:
        size = _CREDENTIALS.size
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        if _CREDENTIALS.unpack(found)[1] != os.geteuid():
            return  # anybody of this host may connect
        connection.settimeout(_SECONDS_FOR_A_LINE)
        match connection.recv(_NBYTES).decode("ascii").split():
            case [word, worker, num_local] if word == _HERE:
                self._here[int(worker)] = int(num_local)
                if int(worker) == 0 and self._given is not None:
                    socket.send_fds(connection, [b"input"], [self._given])
            case [word, worker] if word == _REPLACED:
                self._replaced.add(int(worker))
            case [word, worker, status] if word == _ENDED:
                self._ended.setdefault(int(worker), int(status))

    @property
    def first_failure(self) -> int | None:
        """The first status other than 0 that a worker said."""
        return next((status for status in self._ended.values() if status), None)

    def silent(self) -> str:
        """Return which workers of this host have not said how they ended; empty if all have.

        How many there are, the first one that came was told by its launcher.
        """
        # What a worker has replaced itself by knows nothing of this.
        silent = sorted(self._here.keys() - self._ended.keys() - self._replaced)
        missing = max(self._here.values(), default=0) - len(self._here)
        words = [", ".join(map(str, silent))] if silent else []
        return " and ".join(words + [f"{missing} that never began"] * (missing > 0))

    def close(self) -> None:
        """Hear no more."""
        if self._listener is not None:
            self._listener.close()


def entry_of(environ: Mapping[str, str]) -> ExitRecord:
    """Return what this process can say as a worker."""
    with contextlib.suppress(ClusterError):
        found = launcher_environment.find(environ)
        if found is not None and found[1].worker_id is not None:
            place = found[1]
            return ExitRecord(
                environ.get(VARIABLE), place.worker_id or 0, place.num_local_workers or 0
            )
    return ExitRecord(None, 0, 0)


@final
class ExitRecord:
    """The end of a worker. Where nobody listens, what it says is lost.

    Parameters
    ----------
    name : str or None
        What ``launch`` called the socket; None: no launch of ours has started this process.
    worker : int
        The worker's number.
    num_local : int
        How many workers there are on this host; 0 if not told.
    """

    def __init__(self, name: str | None, worker: int, num_local: int) -> None:
        self._name, self.worker, self._num_local = name, worker, num_local
        self._process = os.getpid()

    def arrive(self) -> int | None:
        """Say that this worker is here; return a descriptor of the input that it is given."""
        with _LOST, self._said(_HERE, self._num_local) as connection:
            if self.worker != 0:
                return None
            return next(iter(socket.recv_fds(connection, _NBYTES, 1)[1]), None)
        return None

    def leave(self, status: int) -> None:
        """Say how this worker ends; only the first time counts."""
        with _LOST:
            self._said(_ENDED, status).close()

    def be_replaced(self) -> None:
        """Say that this process is about to run another program, of which nothing will be heard."""
        with _LOST:
            self._said(_REPLACED).close()

    def _said(self, word: str, *more: int) -> socket.socket:
        """Return the connection on which a line was said. ``launch`` need not have read it yet."""
        if self._name is None or os.getpid() != self._process:
            raise ConnectionError("nobody listens to this process")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(deadlines.timeout_seconds())
            connection.connect(f"\0{self._name}")
            connection.send(" ".join([word, str(self.worker), *map(str, more)]).encode())
        except BaseException:
            connection.close()
            raise
        return connection
