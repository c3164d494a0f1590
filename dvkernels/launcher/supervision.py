"""Supervision of a launcher: forwarding of signals, deadlines, and the end of all processes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import NamedTuple

from dvkernels.cluster import launcher_environment, procfs
from dvkernels.cluster.position import Position
from dvkernels.errors import PREEMPTED, ClusterError, LaunchError
from dvkernels.launcher.exit_records import ExitRecords
from dvkernels.launcher.leaked_shm import Leftovers

__all__ = ["TIMED_OUT", "CommandEnd", "run", "workers_below"]

TIMED_OUT = 124  # as the command `timeout` has it

_HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Statuses after which a job is not restarted.
_FINAL_STATUSES = (
    0,
    2,  # a wrong option
    PREEMPTED,  # saved on request of a batch system, which is about to take the machines
    128 + signal.SIGINT,
    128 + signal.SIGTERM,
    128 + signal.SIGPIPE,  # the reader of the output has gone
)
_POLL_SECONDS = 0.1
_SECONDS_FOR_LAST_OUTPUT = 1.0
_SECONDS_TO_END = 2.0

# Of prctl, on Linux.
_SET_PARENT_DEATH_SIGNAL = 1
_SET_CHILD_SUBREAPER = 36


class CommandEnd(NamedTuple):
    """End of a launcher and its workers.

    Attributes
    ----------
    status : int
        Exit status of the first worker that reported a failure, or else the launcher's. 128 plus
        the signal's number if a signal ended the launcher, or the workers after it was forwarded.
        124 after a timeout. 1 if the launcher reports success, but some workers sent no report.
    may_be_restarted : bool
        Whether the job failed by itself: not soon after a forwarded signal, and not with the
        status of a job that was asked to stop.
    silent : str
        Which workers have not reported their end, where that is why the status is 1.
    """

    status: int
    may_be_restarted: bool
    silent: str = ""


def run(
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    forwarded_signals: frozenset[signal.Signals],
    end_signal: signal.Signals,
    timeout_seconds: float,
    grace_seconds: float,
    send_signal: Callable[[int, signal.Signals], bool] | None = None,
    failure_statuses: frozenset[int] = frozenset(),
    input_fd: int | None = None,
    launcher_forwards_input: bool = False,
) -> CommandEnd:
    """Run a launcher until it has ended and no process that it started is left.

    Parameters
    ----------
    command : sequence of str
        The launcher's command line.
    environ : mapping
        Its environment variables.
    forwarded_signals : frozenset of Signals
        The signals that the launcher forwards to the workers. Others are sent to the workers of
        this host directly.
    end_signal : Signals
        The signal that ends the launcher; the kernel sends it if this process is killed.
    timeout_seconds : float
        How long the launcher may run; may be infinite.
    grace_seconds : float
        How long the workers may go on after an interrupt or the timeout.
    send_signal : callable, optional
        Given the launcher's pid and a signal that it does not forward, sends the signal to the
        workers of all hosts and returns whether that succeeded. If not, and by default, the
        workers of this host get the signal.
    failure_statuses : frozenset of int
        Further statuses after which the job may be restarted, although other launchers use them
        for a job that was asked to stop.
    input_fd : int, optional
        Descriptor of the first worker's input. Default: no input.
    launcher_forwards_input : bool
        Whether the launcher reads that descriptor and forwards the input. Otherwise the first
        worker gets the descriptor itself.

    Raises
    ------
    LaunchError
        The launcher cannot be started.
    """
    existing = set(procfs.descendants_of(os.getpid()))

    def started_processes() -> set[int]:
        return set(procfs.descendants_of(os.getpid())) - existing

    _adopt_orphans()
    deliver = functools.partial(
        _deliver, forwarded_signals=forwarded_signals, send_signal=send_signal
    )
    pending: list[signal.Signals] = []
    deadline = time.monotonic() + timeout_seconds
    interrupted_by: signal.Signals | None = None
    delivered_at = -math.inf
    timed_out = False
    with (
        _signals_to(pending),
        contextlib.closing(ExitRecords(None if launcher_forwards_input else input_fd)) as records,
        contextlib.closing(Leftovers(started_processes)) as leftovers,
    ):

        def serve(seconds: float) -> None:
            """Receive the workers' reports, and note the files that they create."""
            records.serve(seconds, leftovers.wakeup_fd)
            leftovers.note()

        launcher = _start(
            command,
            {**environ, **records.environ},
            end_signal,
            input_fd if launcher_forwards_input else None,
        )
        try:
            while launcher.poll() is None:
                serve(_POLL_SECONDS)
                while pending:
                    received, delivered_at = pending.pop(0), time.monotonic()
                    deliver(received, launcher.pid)
                    if received in _ENDING_SIGNALS:  # the second one leaves no grace
                        grace = grace_seconds if interrupted_by is None else 0.0
                        deadline = min(deadline, delivered_at + grace)
                        interrupted_by = received
                if time.monotonic() > deadline:
                    if timed_out or interrupted_by is not None:
                        break
                    timed_out = True
                    deliver(signal.SIGTERM, launcher.pid)
                    deadline = time.monotonic() + grace_seconds
        finally:
            _end(launcher, end_signal, started_processes, serve)
            leftovers.remove(launcher.pid)
    if timed_out:
        return CommandEnd(TIMED_OUT, may_be_restarted=False)
    status = launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode
    status = _job_status(status, records.first_failure, failure_statuses)
    silent = "" if status else records.silent()
    if interrupted_by is not None:
        was_killed = bool(silent) or status in _killed_statuses(interrupted_by)
        return CommandEnd(128 + interrupted_by if was_killed else status, may_be_restarted=False)
    was_signalled = time.monotonic() - delivered_at < grace_seconds or not {*pending}.isdisjoint(
        _ENDING_SIGNALS
    )
    if silent:
        return CommandEnd(1, may_be_restarted=not was_signalled, silent=silent)
    failed = status in failure_statuses or status not in _FINAL_STATUSES
    return CommandEnd(status, may_be_restarted=failed and not was_signalled)


def _job_status(status: int, reported: int | None, failure_statuses: frozenset[int]) -> int:
    """Return the status of the first worker that reported a failure, or else the launcher's.

    A worker that reports a request to stop may have got it from a launcher that had lost another
    worker: then the launcher's status counts.
    """
    if reported is None or (
        status and not {status, reported}.isdisjoint({*failure_statuses, PREEMPTED})
    ):
        return status
    return reported


def _killed_statuses(number: signal.Signals) -> set[int]:
    """Return the statuses of a job whose workers a signal has killed, or SIGTERM or SIGKILL later.

    Hydra combines the statuses of all workers bitwise: some ended by the signal, others by SIGKILL.
    Any other status was chosen by the workers.
    """
    signals = (number, signal.SIGTERM, signal.SIGKILL, number | signal.SIGKILL)
    return {status for by in signals for status in (by, 128 + by)}


def workers_below(pid: int) -> list[int]:
    """Return the pids of the workers of this host below a launcher, at any depth."""
    return [
        process
        for process in procfs.descendants_of(pid)
        if (position := _position_of(process)) is not None
        and position != _position_of(procfs.parent_of(process))
    ]


def _position_of(pid: int) -> tuple[str, Position] | None:
    """Return a process's position in a job, from its environment; None if it has none."""
    with contextlib.suppress(ClusterError):
        return launcher_environment.find(procfs.environment_of(pid) or {})
    return None


def _start(
    command: Sequence[str],
    environ: Mapping[str, str],
    end_signal: signal.Signals,
    input_fd: int | None,
) -> subprocess.Popen[bytes]:
    def die_with_parent() -> None:
        _prctl(_SET_PARENT_DEATH_SIGNAL, end_signal)

    try:
        # In a session of its own: the terminal's Ctrl-C reaches only this process, which delivers
        # it.
        return subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL if input_fd is None else input_fd,
            start_new_session=True,
            preexec_fn=die_with_parent,  # this process has no other threads
        )
    except OSError as error:
        raise LaunchError(f"{command[0]} cannot be started: {error}") from None


def _deliver(
    received: signal.Signals,
    pid: int,
    *,
    forwarded_signals: frozenset[signal.Signals],
    send_signal: Callable[[int, signal.Signals], bool] | None,
) -> None:
    """Send a signal to all workers through the launcher, or else to those of this host."""
    if received is signal.SIGHUP:  # the terminal has gone: workers are to stop
        received = signal.SIGTERM
    is_forwarded = received in forwarded_signals
    if not is_forwarded and send_signal is not None and send_signal(pid, received):
        return
    for process in [pid] if is_forwarded else workers_below(pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, received)


def _end(
    launcher: subprocess.Popen[bytes],
    end_signal: signal.Signals,
    started_processes: Callable[[], set[int]],
    serve: Callable[[float], None],
) -> None:
    """End the launcher if it still runs, and then all processes left below this one."""
    if launcher.poll() is None:
        launcher.send_signal(end_signal)
        deadline = time.monotonic() + _SECONDS_TO_END
        while launcher.poll() is None and time.monotonic() < deadline:
            serve(_POLL_SECONDS)
    # Output relays pass on the last lines of workers, and end by themselves.
    for number, seconds in (
        (None, _SECONDS_FOR_LAST_OUTPUT),
        (signal.SIGTERM, _SECONDS_TO_END),
        (signal.SIGKILL, _SECONDS_TO_END),
    ):
        deadline = time.monotonic() + seconds
        while found := started_processes():
            if number is not None:
                for process in found:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(process, number)
            if time.monotonic() > deadline:
                break
            serve(_POLL_SECONDS / 5)
    launcher.wait()
    serve(0.0)  # reports sent at the very end


@contextlib.contextmanager
def _signals_to(pending: list[signal.Signals]) -> Iterator[None]:
    """Append the handled signals to ``pending`` instead of being ended by them."""

    def collect(number: int, frame: FrameType | None) -> None:
        pending.append(signal.Signals(number))

    previous = {number: signal.signal(number, collect) for number in _HANDLED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they are found."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, argument: int) -> None:
    """Call Linux's prctl; do nothing on other systems."""
    if sys.platform == "linux":
        _LIBC.prctl(option, argument, 0, 0, 0)


_LIBC = ctypes.CDLL(None)
