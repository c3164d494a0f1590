"""Kill test: a program that is killed at random moments and restarted until it completes."""

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


_POLL_SECONDS = 0.002


def _has_printed_a_step(output: str) -> bool:
    return any(line.startswith("step") for line in output.splitlines())


@dataclass(frozen=True)
class KilledRun:
    """Result of a program that was killed several times.

    Attributes
    ----------
    output : str
        Output of the last start, which completed.
    num_kills : int
        Number of earlier starts, which were killed.
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

    A program that saves its progress, and resumes from it, must end with the same result as without
    the kills.

    Parameters
    ----------
    command : sequence of str
        The program and its arguments, the same for each start.
    most_kills : int
        Largest number of kills; the program may complete before.
    seed : int
        Seed of the random moments.
    is_under_way : callable
        Called with the output of a start so far; returns whether the start has done its first step,
        before which it is not killed. By default: whether a line begins with ``step``.
    longest_seconds : float
        The delay from the first step to the kill is drawn uniformly from 0 to this.
    timeout_seconds : float
        Timeout of a start until its first step, and of the last start until its end.
    env : mapping, optional
        The environment; that of this process if not given.
    after_kill : callable, optional
        Called after each kill with the number of kills so far, to inspect the files left behind.

    Returns
    -------
    KilledRun

    Raises
    ------
    RuntimeError
        A start ended by itself with a nonzero exit code; the message holds its output.
    TimeoutError
        A start took too long. No process is left behind.
    """
    random_delays = random.Random(seed)
    for num_kills in range(most_kills + 1):
        is_last = num_kills == most_kills
        with _started(command, env) as program:
            program.wait_until(is_under_way, timeout_seconds)
            if not is_last:
                time.sleep(random_delays.uniform(0, longest_seconds))
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
    """Running program, with the lines that it has printed to stdout and stderr so far."""

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
        """Wait until the program is under way, or has ended."""
        deadline = time.monotonic() + timeout_seconds
        while self._process.poll() is None and not is_under_way(self.output()):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"not under way in {timeout_seconds:g} s; printed: {self.output()!r}"
                )
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """Kill the program, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def wait(self, timeout_seconds: float) -> int:
        """Wait for the end; return the exit code, or minus the signal that ended the program."""
        try:
            code = self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the program did not end in {timeout_seconds:g} s") from None
        self._reader.join(timeout_seconds)
        return code

    def output(self) -> str:
        """Return the output so far."""
        return "".join(self._lines)

    def close(self) -> None:
        """Kill the program if it still runs, and release its pipe and thread."""
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
