"""Parent side of a peer's processes: commands and answers through pipes, with a timeout."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from dvkernels.benchmarks.measurement import Answer
from dvkernels.errors import WorkerLostError
from dvkernels.threads.shielded import ShieldedCall
from peers.registry import PEERS, Peer

__all__ = ["Worker", "end_all"]

_TAIL = 800  # characters of stderr that an error quotes


class Worker:
    """Processes of one peer; a context manager that ends them."""

    _process: subprocess.Popen[str]

    def __init__(
        self,
        name: str,
        python: str,
        num_ranks: int,
        timeout_seconds: float = 120.0,
        peers: Mapping[str, Peer] = PEERS,
    ) -> None:
        self.name = name
        self._timeout = timeout_seconds
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stderr = tempfile.TemporaryFile(  # noqa: SIM115 - closed by close()
            "w+", encoding="utf-8", errors="replace"
        )
        peer = peers[name]

        def start() -> None:
            # In a session of its own: the terminal's Ctrl-C does not reach it, and all of its
            # processes can be ended at once.
            self._process = subprocess.Popen(
                peer.command(python, num_ranks),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env=peer.environment(num_ranks),
                start_new_session=True,
            )

        # Another thread starts it, where no interrupt loses it.
        starting = ShieldedCall(start, is_atomic=True)
        try:
            starting.start()
            starting.wait()
            starting.outcome()
        except OSError as error:
            self._stderr.close()
            raise WorkerLostError(f"peer {name} cannot be started: {error}") from error
        except BaseException:
            starting.cancel()
            starting.wait()
            if hasattr(self, "_process"):
                self.close()
            raise
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # closed while it was read
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def ask(self, count: int, dtype: str, iterations: int) -> Answer:
        """Measure all-reduces of ``count`` elements; the answer has the seconds per call."""
        return self.send({"count": count, "dtype": dtype, "iterations": iterations})

    def send(self, command: Mapping[str, Any]) -> Answer:
        """Send a command, and return the answer."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._lost("has ended") from error
        while True:
            try:
                line = self._lines.get(timeout=self._timeout)
            except queue.Empty:
                raise self._lost(f"gave no answer in {self._timeout:g} s") from None
            if line is None:
                raise self._lost("has ended")
            if line.startswith("{"):  # some libraries print greetings
                found: dict[str, Any] = json.loads(line)
                return Answer(**found)

    def _lost(self, event: str) -> WorkerLostError:
        self._stderr.seek(0)
        tail = self._stderr.read()[-_TAIL:].strip()
        return WorkerLostError(f"peer {self.name} {event}; its last output: {tail or '(none)'}")

    def close_pipe(self) -> None:
        """Close the command pipe, which makes the processes exit; do not wait for them."""
        with contextlib.suppress(OSError, ValueError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    def close(self) -> None:
        """End the processes by closing their pipe, or else by signals. Idempotent."""
        process = self._process
        self.close_pipe()
        for number in (None, signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if number is not None:
                    if hasattr(os, "killpg"):
                        os.killpg(process.pid, number)
                    else:
                        process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
                break
        if hasattr(os, "killpg"):  # ranks that outlived their launcher
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.stdout is not None:
            process.stdout.close()
        self._stderr.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def end_all(workers: Sequence[Worker]) -> None:
    """End the processes of several workers."""
    for worker in workers:
        worker.close_pipe()  # first of all workers, so that they exit at the same time
    for worker in workers:
        worker.close()
