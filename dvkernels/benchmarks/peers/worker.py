"""A peer's processes, seen from the benchmark: asked, waited for with a deadline, ended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dvkernels.benchmarks.failures import ContestantLostError

__all__: list[str] = []

_TAIL_BYTES = 2000
_SECONDS_TO_END = 3.0
_LOOK_SECONDS = 0.5  # a process may end while a child of its keeps the pipe open


class Worker:
    """The processes of one peer, in a session of their own, so that Ctrl-C is for us alone."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], timeout: float
    ) -> None:
        self.name = name
        self._timeout = timeout
        self._heard = b""
        self._noise = b""
        self._end: ContestantLostError | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=dict(environment),
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            self._errors.close()
            raise ContestantLostError(f"{name} cannot be started: {error}") from None
        try:
            self.ready = self._answer("to start")
        except BaseException:
            self.close()
            raise

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a command and return the answer, or raise :class:`ContestantLostError`."""
        if self._end is not None:
            raise self._end
        message["deadline"] = self._timeout
        self._send(message)
        return self._answer(f"to {message['do']}")

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
        except OSError:
            raise self._lost("has closed its input") from None

    def _answer(self, task: str) -> dict[str, Any]:
        stream = self._process.stdout
        assert stream is not None
        # Its own alarm goes off first, and prints where it was.
        end = time.monotonic() + self._timeout + 2
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while True:
                line, newline, rest = self._heard.partition(b"\n")
                if newline:
                    self._heard = rest
                    answer = _parsed(line)
                    if answer is not None:
                        return answer
                    self._noise += line + newline  # a launcher's own words
                    continue
                has_ended = self._process.poll() is not None  # what it said last is still there
                found = b""
                if selector.select(0 if has_ended else _LOOK_SECONDS):
                    found = os.read(stream.fileno(), 1 << 16)
                elif not has_ended and time.monotonic() < end:
                    continue
                elif not has_ended:
                    raise self._lost(f"took more than {self._timeout:g} s {task}")
                if not found:
                    raise self._lost(f"ended when asked {task}")
                self._heard += found

    def _lost(self, what: str) -> ContestantLostError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        status = self._process.poll()
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _TAIL_BYTES))
        tail = self._errors.read() + self._left_to_hear()[-_TAIL_BYTES:]
        self.close()
        state = "" if status is None else f" (exit status {status})"
        text = f"{self.name} {what}{state}" + f"\n{tail.decode(errors='replace')}".rstrip()
        self._end = ContestantLostError(text)
        return self._end

    def _left_to_hear(self) -> bytes:
        """Return what came on standard output that was no answer: some launchers complain there."""
        stream = self._process.stdout
        assert stream is not None
        os.set_blocking(stream.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            self._heard += os.read(stream.fileno(), 1 << 16)
        return self._noise + self._heard

    def close(self) -> None:
        """End every process: by asking, by closing its input, by force."""
        process = self._process
        if self._errors.closed:
            return
        with contextlib.suppress(OSError, AssertionError):
            assert process.stdin is not None
            process.stdin.write(b'{"do": "end"}\n')
        family = {process.pid, *_family(process.pid)}
        try:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_END)
            if process.poll() is None:
                process.terminate()  # a launcher ends its ranks
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SECONDS_TO_END)
        finally:
            left = family | set(_family(process.pid))
            for pid in left if process.poll() is None else left - {process.pid}:
                if pid == process.pid or _session(pid) in family:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
            process.wait()
            self._errors.close()


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _status(pid: int | str) -> tuple[int, int] | None:
    """Return the parent and the session of a process that runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(fields[1]), int(fields[3]))


def _session(pid: int) -> int | None:
    status = _status(pid)
    return status[1] if status else None


def _family(root: int) -> Iterator[int]:
    """Yield the processes of the session that ``root`` began, and its descendants."""
    known = {}
    with contextlib.suppress(OSError):
        for entry in os.listdir("/proc"):
            status = _status(entry) if entry.isdigit() else None
            if status:
                known[int(entry)] = status
    family = {root}
    grown = True
    while grown:
        more = {pid for pid, (parent, session) in known.items() if {parent, session} & family}
        grown = not more <= family
        family |= more
    yield from family - {root}
