"""Exit records: each worker of this host reports to ``launch`` its start and its exit status.

The launcher's exit status is not enough: MPICH returns 0 where a worker vanished and the others
were killed half-way. The first worker also receives the standard input of ``launch`` as a file
descriptor, because MPICH kills a job that reads slower than MPICH forwards.

Reports are lines over an abstract Unix socket of Linux, which has no file that could be left
behind. Workers of other hosts cannot reach it and send no reports.
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

__all__ = ["VARIABLE", "ExitRecord", "ExitRecords", "record_of"]

VARIABLE = "DVKERNELS_LEDGER"

_STARTED, _ENDED, _REPLACED = "here", "ended", "replaced"
_NBYTES = 64  # longer than any line
_SECONDS_FOR_A_LINE = 1.0  # workers send it as soon as they are connected
_CREDENTIALS = struct.Struct("3i")  # process, user, group
# launch no longer listens, or the timeout variable is malformed, which is reported elsewhere.
_IGNORED = contextlib.suppress(OSError, ValueError)


@final
class ExitRecords:
    """Receiver of the exit records, in ``launch``.

    Parameters
    ----------
    input_fd : int or None
        File descriptor that the first worker gets as its standard input; None for no input.

    Attributes
    ----------
    environ : dict
        Environment variables by which workers find this receiver.
    """

    def __init__(self, input_fd: int | None) -> None:
        self._input_fd = input_fd
        self._started: dict[int, int] = {}  # worker -> number of workers on this host
        self._replaced: set[int] = set()
        self._ended: dict[int, int] = {}  # worker -> exit status, in order of arrival
        self.environ: dict[str, str] = {}
        self._listener: socket.socket | None = None
        if sys.platform == "linux":
            name = f"dvkernels-{os.getpid()}-{secrets.token_hex(8)}"
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(f"\0{name}")
            self._listener.listen(socket.SOMAXCONN)
            self._listener.setblocking(False)
            self.environ[VARIABLE] = name

    def serve(self, seconds: float, wakeup_fd: int) -> None:
        """Wait for reports of workers, and record all that have arrived.

        Parameters
        ----------
        seconds : float
            The longest wait. It ends earlier with the first report.
        wakeup_fd : int
            The wait also ends when this descriptor is readable; -1 for none.
        """
        awaited = [fd for fd in (self._listener, wakeup_fd) if fd is not None and fd != -1]
        select.select(awaited, [], [], seconds)
        if self._listener is None:
            return
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            with connection, contextlib.suppress(OSError, ValueError):
                self._receive(connection)

    def _receive(self, connection: socket.socket) -> None:
        size = _CREDENTIALS.size
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        if _CREDENTIALS.unpack(found)[1] != os.geteuid():
            return  # any user of this host may connect
        connection.settimeout(_SECONDS_FOR_A_LINE)
        match connection.recv(_NBYTES).decode("ascii").split():
            case [event, worker, num_local] if event == _STARTED:
                self._started[int(worker)] = int(num_local)
                if int(worker) == 0 and self._input_fd is not None:
                    socket.send_fds(connection, [b"input"], [self._input_fd])
            case [event, worker] if event == _REPLACED:
                self._replaced.add(int(worker))
            case [event, worker, status] if event == _ENDED:
                self._ended.setdefault(int(worker), int(status))

    @property
    def first_failure(self) -> int | None:
        """The first status other than 0 that a worker reported."""
        return next((status for status in self._ended.values() if status), None)

    def silent(self) -> str:
        """Return which workers of this host have not reported their end; empty if all have.

        The number of workers on this host is the launcher's, as reported by the workers.
        """
        # A program that replaced a worker's by exec sends no reports.
        silent = sorted(self._started.keys() - self._ended.keys() - self._replaced)
        missing = max(self._started.values(), default=0) - len(self._started)
        parts = [", ".join(map(str, silent))] if silent else []
        return " and ".join(parts + [f"{missing} that never started"] * (missing > 0))

    def close(self) -> None:
        """Close the socket."""
        if self._listener is not None:
            self._listener.close()


def record_of(environ: Mapping[str, str]) -> ExitRecord:
    """Return the exit record of this process; one that reports nothing if it is no worker."""
    with contextlib.suppress(ClusterError):
        found = launcher_environment.find(environ)
        if found is not None and found[1].worker_id is not None:
            position = found[1]
            return ExitRecord(
                environ.get(VARIABLE), position.worker_id or 0, position.num_local_workers or 0
            )
    return ExitRecord(None, 0, 0)


@final
class ExitRecord:
    """Sender of one worker's exit record. Reports are lost where ``launch`` does not listen.

    Parameters
    ----------
    name : str or None
        Name of the socket of ``launch``; None if ``launch`` did not start this process.
    worker : int
        The worker's number.
    num_local : int
        Number of workers on this host; 0 if unknown.
    """

    def __init__(self, name: str | None, worker: int, num_local: int) -> None:
        self._name, self.worker, self._num_local = name, worker, num_local
        self._process = os.getpid()

    def report_start(self) -> int | None:
        """Report the start of this worker; return the descriptor of its input, if it gets one."""
        with _IGNORED, self._send(_STARTED, self._num_local) as connection:
            if self.worker != 0:
                return None
            return next(iter(socket.recv_fds(connection, _NBYTES, 1)[1]), None)
        return None

    def report_exit(self, status: int) -> None:
        """Report the exit status of this worker; only the first report counts."""
        with _IGNORED:
            self._send(_ENDED, status).close()

    def report_exec(self) -> None:
        """Report that another program is about to replace this one, and will send no reports."""
        with _IGNORED:
            self._send(_REPLACED).close()

    def _send(self, event: str, *values: int) -> socket.socket:
        """Send one line; return the connection. ``launch`` need not have read the line yet."""
        if self._name is None or os.getpid() != self._process:
            raise ConnectionError("launch does not listen to this process")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(deadlines.timeout_seconds())
            connection.connect(f"\0{self._name}")
            connection.send(" ".join([event, str(self.worker), *map(str, values)]).encode())
        except BaseException:
            connection.close()
            raise
        return connection
