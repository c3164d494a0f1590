"""A program that is killed at random moments, and started again, until it has come to its end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["KilledRun", "run_and_kill"]


_LOOK_SECONDS = 0.002


def _has_printed_a_step(output: str) -> bool:
    return any(line.startswith("step") for line in output.splitlines())


@dataclass(frozen=True)
class KilledRun:
    """What came of a program that was killed again and again.

    Attributes
    ----------
    output : str
        What the last start printed, which came to its end.
    num_kills : int
        How many starts before it were killed.
    """

    output: str
    num_kills: int


def run_and_kill(
    command: Sequence[str],
    *,
    most_kills: int,
    seed: int,
    is_under_way: Callable[[str], bool] = _has_printed_a_step,
    longest_seconds: float = 0.5,
    timeout_seconds: float = 120.0,
    env: Mapping[str, str] | None = None,
    after_kill: Callable[[int], object] | None = None,
) -> KilledRun:
    """Start ``command``, kill it with SIGKILL at a random moment, and start it again.

    A program that saves what it has done, and goes on from there, must end with the result of one
    that nobody killed.

    Parameters
    ----------
    command : sequence of str
        The program and its arguments, the same for each start.
    most_kills : int
        After so many kills it is left alone. It may come to its end before.
    seed : int
        Of the moments.
    is_under_way : callable
        Given what a start has printed, tells whether it has done its first step: it is not killed
        before. Not given, that is a line that begins with ``step``.
    longest_seconds : float
        A kill comes at most so long after that; when, is drawn uniformly.
    timeout_seconds : float
        For one start to get under way, and for the last one to come to its end.
    env : mapping, optional
        The environment; that of this process if not given.
    after_kill : callable, optional
        Called with the number of kills so far after each, to look at what has been left behind.

    Returns
    -------
    KilledRun

    Raises
    ------
    RuntimeError
        A start ended by itself with another exit code than 0; the message holds what it said.
    TimeoutError
        It took too long. No process is left behind.
    """
    moments = random.Random(seed)
    for num_kills in range(most_kills + 1):
        is_last = num_kills == most_kills
        with _started(command, env) as program:
            program.wait_until(is_under_way, timeout_seconds)
            if not is_last:
                time.sleep(moments.uniform(0, longest_seconds))
                program.kill()
            code = program.wait(timeout_seconds)
        if code == 0:
            return KilledRun(program.output(), num_kills)
        if is_last or code != -signal.SIGKILL:
            raise RuntimeError(
                f"start {num_kills + 1} of {command[0]} ended with {code}:\n{program.output()}"
            )
        if after_kill is not None:
            after_kill(num_kills + 1)
    raise AssertionError("the last start is not killed")


class _RunningProgram:
    """A running program and the lines that it has printed so far, both streams together."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None) -> None:
        self._process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=os.name == "posix",
        )  # fmt: skip
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)

    def wait_until(self, is_under_way: Callable[[str], bool], timeout_seconds: float) -> None:
        """Return when it is under way, or has ended."""
        deadline = time.monotonic() + timeout_seconds
        while self._process.poll() is None and not is_under_way(self.output()):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"not under way in {timeout_seconds:g} s; printed: {self.output()!r}"
                )
            time.sleep(_LOOK_SECONDS)

    def kill(self) -> None:
        """Kill it, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def wait(self, timeout_seconds: float) -> int:
        """Return the exit code; minus the signal if one ended it."""
        try:
            code = self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"it did not end in {timeout_seconds:g} s") from None
        self._reader.join(timeout_seconds)
        return code

    def output(self) -> str:
        """Return what it has printed so far."""
        return "".join(self._lines)

    def close(self) -> None:
        """Kill it if need be, and leave nothing behind."""
        self.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def _started(command: Sequence[str], env: Mapping[str, str] | None) -> Iterator[_RunningProgram]:
    program = _RunningProgram(command, env)
    try:
        yield program
    finally:
        program.close()
