"""Run a command with everything that it starts, pass on signals, and leave nothing behind."""

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

from dvkernels.checkpoint.preemption import PREEMPTED
from dvkernels.cluster import launcher_environment, procfs
from dvkernels.cluster.position import Position
from dvkernels.errors import ClusterError, LaunchError
from dvkernels.launcher.exit_records import ExitRecords
from dvkernels.launcher.leftovers import Leftovers

__all__ = ["TIMED_OUT", "CommandEnd", "run", "workers_below"]

TIMED_OUT = 124  # as the command `timeout` has it

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Success, what a wrong option gives, what a worker says that was told to stop and has saved (by a
# batch system that may have told the workers alone, and is about to take their machines), what
# Ctrl-C and an orderly end from outside give, and that nobody reads the output any more.
_FINAL = (
    0,
    2,
    PREEMPTED,
    128 + signal.SIGINT,
    128 + signal.SIGTERM,
    128 + signal.SIGPIPE,
)
_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_FOR_LAST_WORDS = 1.0
_SECONDS_TO_END = 2.0

# Of prctl, on Linux.
_SET_PARENT_DEATH_SIGNAL = 1
_SET_CHILD_SUBREAPER = 36


class CommandEnd(NamedTuple):
    """How a command ended.

    Attributes
    ----------
    status : int
        That of the first worker that said it failed, or else the launcher's; 128 and the signal's
        number if a signal ended it, or the workers after one was passed on to them; 124 if it ran
        out of time; 1 if all seems well, but for workers that have not said so.
    may_be_restarted : bool
        Whether it failed by itself: not soon after a signal was passed on, and not as one whose
        workers were told to stop.
    silent : str
        Which workers have not said how they ended, where that is why the status is 1.
    """

    status: int
    may_be_restarted: bool
    silent: str = ""


def run(
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    forwarded: frozenset[signal.Signals],
    ended_by: signal.Signals,
    timeout_seconds: float,
    grace_seconds: float,
    sent: Callable[[int, signal.Signals], bool] | None = None,
    failures: frozenset[int] = frozenset(),
    given: int | None = None,
    is_fed_by_launcher: bool = False,
) -> CommandEnd:
    """Run a launcher until it has ended and nothing that it started is left.

    Parameters
    ----------
    command : sequence of str
        What is run.
    environ : mapping
        Its variables.
    forwarded : frozenset of Signals
        The signals that it hands on to the workers; others go to the workers of this host
        directly.
    ended_by : Signals
        What it gets if this process is killed.
    timeout_seconds : float
        How long it may run; may be infinite.
    grace_seconds : float
        How long the workers may go on after they were interrupted, or after the time ran out.
    sent : callable, optional
        Given the launcher's process and a signal that it does not hand on, brings that to the
        workers wherever they are, and returns whether it could. Where it could not, and without
        it, the workers of this host get the signal.
    failures : frozenset of int
        Statuses after which the job may be restarted, though they say elsewhere that it was ended.
    given : int, optional
        The descriptor of the first worker's input; it has none if not given.
    is_fed_by_launcher : bool
        Whether the launcher hands that on; else the worker gets it from here.

    Raises
    ------
    LaunchError
        It cannot be started.
    """
    before = set(procfs.descendants_of(os.getpid()))

    def left() -> set[int]:
        return set(procfs.descendants_of(os.getpid())) - before

    _adopt_orphans()
    deliver = functools.partial(_deliver, forwarded=forwarded, sent=sent)
    pending: list[signal.Signals] = []
    deadline = time.monotonic() + timeout_seconds
    interrupted_by: signal.Signals | None = None
    told_at = -math.inf
    timed_out = False
    with (
        _signals_to(pending),
        contextlib.closing(ExitRecords(None if is_fed_by_launcher else given)) as ledger,
        contextlib.closing(Leftovers(left)) as leftovers,
    ):

        def attend(seconds: float) -> None:
            """Spend some time on what comes from the job."""
            ledger.serve(seconds, leftovers.news)
            leftovers.note()

        launched_with = given if is_fed_by_launcher else None
        launcher = _start(command, {**environ, **ledger.environ}, ended_by, launched_with)
        try:
            while launcher.poll() is None:
                attend(_SECONDS_BETWEEN_LOOKS)
                while pending:
                    received, told_at = pending.pop(0), time.monotonic()
                    deliver(received, launcher.pid)
                    if received in _ENDING:  # the second one leaves no time
                        grace = grace_seconds if interrupted_by is None else 0.0
                        deadline = min(deadline, told_at + grace)
                        interrupted_by = received
                if time.monotonic() > deadline:
                    if timed_out or interrupted_by is not None:
                        break
                    timed_out = True
                    deliver(signal.SIGTERM, launcher.pid)
                    deadline = time.monotonic() + grace_seconds
        finally:
            _end(launcher, ended_by, left, attend)
            leftovers.remove(launcher.pid)
    if timed_out:
        return CommandEnd(TIMED_OUT, may_be_restarted=False)
    status = launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode
    status = _agreed(status, ledger.first_failure, failures)
    silent = "" if status else ledger.silent()
    if interrupted_by is not None:
        was_killed = bool(silent) or status in _killed_by(interrupted_by)
        return CommandEnd(128 + interrupted_by if was_killed else status, may_be_restarted=False)
    is_told = time.monotonic() - told_at < grace_seconds or not {*pending}.isdisjoint(_ENDING)
    if silent:
        return CommandEnd(1, may_be_restarted=not is_told, silent=silent)
    failed = status in failures or status not in _FINAL
    return CommandEnd(status, may_be_restarted=failed and not is_told)


def _agreed(status: int, said: int | None, failures: frozenset[int]) -> int:
    """Return the status of a launcher, or what the first worker said that did not end well.

    One that says it was told to stop may have been told so by the launcher, which had lost another
    one: then the launcher's word counts.
    """
    if said is None or (status and not {status, said}.isdisjoint({*failures, PREEMPTED})):
        return status
    return said


def _killed_by(number: signal.Signals) -> set[int]:
    """Return the statuses of a job that a signal has ended, or at last this process.

    Hydra tells of some workers that one has ended, and others the other, as the bits of both. Any
    other status is the workers' own word.
    """
    signals = (number, signal.SIGTERM, signal.SIGKILL, number | signal.SIGKILL)
    return {status for by in signals for status in (by, 128 + by)}


def workers_below(pid: int) -> list[int]:
    """Return the workers of this host that a launcher has started, itself or through others."""
    return [
        process
        for process in procfs.descendants_of(pid)
        if (place := _place_of(process)) is not None
        and place != _place_of(procfs.parent_of(process))
    ]


def _place_of(pid: int) -> tuple[str, Position] | None:
    """Return what a process was told of its place in a job, None if nothing."""
    with contextlib.suppress(ClusterError):
        return launcher_environment.find(procfs.environment_of(pid) or {})
    return None


def _start(
    command: Sequence[str],
    environ: Mapping[str, str],
    ended_by: signal.Signals,
    given: int | None,
) -> subprocess.Popen[bytes]:
    def die_with_parent() -> None:
        _prctl(_SET_PARENT_DEATH_SIGNAL, ended_by)

    try:
        # A session of its own: Ctrl-C is ours to pass on.
        return subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL if given is None else given,
            start_new_session=True,
            preexec_fn=die_with_parent,  # there is no other thread here
        )
    except OSError as error:
        raise LaunchError(f"{command[0]} cannot be started: {error}") from None


def _deliver(
    received: signal.Signals,
    pid: int,
    *,
    forwarded: frozenset[signal.Signals],
    sent: Callable[[int, signal.Signals], bool] | None,
) -> None:
    """Bring a signal to all workers through the launcher, or else to those of this host."""
    if received is signal.SIGHUP:  # the terminal is gone, which workers are to take as an end
        received = signal.SIGTERM
    if received not in forwarded and sent is not None and sent(pid, received):
        return
    for process in [pid] if received in forwarded else workers_below(pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, received)


def _end(
    launcher: subprocess.Popen[bytes],
    ended_by: signal.Signals,
    left: Callable[[], set[int]],
    attend: Callable[[float], None],
) -> None:
    """End the launcher if it still runs, and then whatever is left below this process."""
    if launcher.poll() is None:
        launcher.send_signal(ended_by)
        deadline = time.monotonic() + _SECONDS_TO_END
        while launcher.poll() is None and time.monotonic() < deadline:
            attend(_SECONDS_BETWEEN_LOOKS)
    # Relays pass on the last words of workers, and end by themselves.
    for sent, seconds in (
        (None, _SECONDS_FOR_LAST_WORDS),
        (signal.SIGTERM, _SECONDS_TO_END),
        (signal.SIGKILL, _SECONDS_TO_END),
    ):
        deadline = time.monotonic() + seconds
        while found := left():
            if sent is not None:
                for process in found:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(process, sent)
            if time.monotonic() > deadline:
                break
            attend(_SECONDS_BETWEEN_LOOKS / 5)
    launcher.wait()
    attend(0.0)  # what was said at the end


@contextlib.contextmanager
def _signals_to(pending: list[signal.Signals]) -> Iterator[None]:
    """Collect the signals that are passed on, instead of being ended by them."""

    def collect(number: int, frame: FrameType | None) -> None:
        pending.append(signal.Signals(number))

    previous = {number: signal.signal(number, collect) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _adopt_orphans() -> None:
    """Become the parent of all below whose own parent ends, so that they are found."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, argument: int) -> None:
    """Ask Linux for something about this process; elsewhere there is no such thing."""
    if sys.platform == "linux":
        _LIBC.prctl(option, argument, 0, 0, 0)


_LIBC = ctypes.CDLL(None)
