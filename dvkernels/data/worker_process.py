"""Worker processes of ``map``; each applies one function for one worker thread of the program.

They are spawned, never forked: a child forked from a process with OpenMP threads may crash or
hang. They ignore the signals sent to a process group or job, which the program handles, and they
end with the program, however that ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing.process
import multiprocessing.spawn
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from types import FrameType
from typing import Any, NamedTuple, Protocol

from dvkernels import deadlines
from dvkernels.data.array_nest import Element
from dvkernels.data.error_policy import Outcome, outcome_of
from dvkernels.errors import DatasetError, WorkerLostError
from dvkernels.threads.thread import Latch
from dvkernels.user_errors import annotate, describe

__all__: list[str] = []

_POLL_SECONDS = 0.1  # how often a thread that waits for an answer checks whether it is cancelled
_HEARTBEAT_SECONDS = 1.0  # between two heartbeats of a busy process
_PARENT_SECONDS = 1.0  # how often a process checks whether the program still exists
_EXIT_SECONDS = 2.0  # for a process to exit by itself before it is killed

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_HEARTBEAT = b""

# The path is set first, so that the library is imported from where the program imported it.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; import dvkernels.data.worker_process as p; p.serve()"
)


class Heartbeat(Protocol):
    """Record of the time of the latest heartbeat."""

    last_heartbeat: float


class _PickledError(NamedTuple):
    """Exception in transit between processes."""

    pickled: bytes  # empty if pickling would change the exception
    message: str
    traceback_text: str

    @classmethod
    def of(cls, error: BaseException) -> _PickledError:
        message = describe(error)
        try:
            traceback_text = "".join(traceback.format_exception(error, chain=False)).rstrip()
        except Exception:
            traceback_text = message
        try:
            pickled = pickle.dumps(error)
            back = pickle.loads(pickled)
        except Exception:
            return cls(b"", message, traceback_text)
        survives = type(back) is type(error) and describe(back) == message
        return cls(pickled if survives else b"", message, traceback_text)

    def unpickled(self) -> Any:
        """Return the original exception, or else a ``RuntimeError`` that describes it."""
        try:
            error = pickle.loads(self.pickled)
        except Exception:
            return RuntimeError(f"{self.message}\nin a worker process:\n{self.traceback_text}")
        annotate(error, f"in a worker process:\n{self.traceback_text}")
        return error


class WorkerProcess:
    """Process that applies a function; started by its first elements, restarted once lost.

    It serves the thread that makes it, and blocks signals in that thread, so that the process
    inherits the blocked mask when it is spawned.
    """

    def __init__(self, name: str, pickled: bytes, board: Heartbeat) -> None:
        self._name = name
        self._pickled = pickled
        self._board = board
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def __call__(self, elements: Sequence[Element], stop: Latch) -> Iterator[Outcome]:
        """Yield the outcomes of the elements, which are sent in one message."""
        # The view of the pickle buffer is released here, not with the traceback of an error.
        with self._pickle_elements(elements) as request:
            if self._connection is None:
                self._start(stop)
            answer = self._request(request, stop)
        if isinstance(answer, _PickledError):
            raise answer.unpickled()
        for value, sent in answer:
            yield Outcome(value, None if sent is None else sent.unpickled())

    def end(self) -> int:
        """End the process, by force if it does not exit by itself soon; return its status."""
        connection, self._connection = self._connection, None
        process, self._process = self._process, None
        if connection is not None:
            connection.close()
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_EXIT_SECONDS)
        process.kill()
        return process.wait()

    def _pickle_elements(self, elements: Sequence[Element]) -> Any:
        try:
            return ForkingPickler.dumps(elements)
        except Exception as error:
            raise DatasetError(
                f"map: expected elements that can be sent to a worker process for {self._name}; "
                f"got some that cannot be pickled ({describe(error)}); use workers='threads'"
            ) from error

    def _start(self, stop: Latch) -> None:
        if getattr(multiprocessing.process.current_process(), "_inheriting", False):
            raise DatasetError("the main module starts worker processes while they import it")
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        command = [multiprocessing.spawn.get_executable(), *flags, "-c", _PROGRAM, *sys.path]
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                self._connection = Connection(ours.detach())
                self._process = subprocess.Popen(command, stdin=theirs.fileno())
        except (OSError, MemoryError) as error:
            self.end()
            raise DatasetError(
                f"map: expected to start a worker process; got {describe(error)}; free memory, "
                "processes or open files, or use workers='threads'"
            ) from error
        state = multiprocessing.spawn.get_preparation_data("dvkernels-data-map")
        state["authkey"] = bytes(state["authkey"])  # an authentication string refuses to be sent
        answer = self._request(pickle.dumps((os.getpid(), state, self._pickled)), stop)
        if isinstance(answer, _PickledError):
            self.end()
            raise DatasetError(
                f"map: expected a function and a main module that worker processes can import; "
                f"{self._name} gave {answer.message}; define the function in a module, put what "
                f'the program does below if __name__ == "__main__":, or use workers="threads"'
            )

    def _request(self, request: Any, stop: Latch) -> Any:
        """Return the answer of the process; on any failure the process is ended."""
        assert self._connection is not None
        timeout = deadlines.timeout_seconds()
        try:
            self._connection.send_bytes(request)
            deadline = time.monotonic() + timeout
            while True:
                if self._connection.poll(_POLL_SECONDS):
                    received = self._connection.recv_bytes()
                    if received != _HEARTBEAT:
                        return _loads(received)
                    self._board.last_heartbeat = time.monotonic()
                    deadline = self._board.last_heartbeat + timeout
                elif stop.is_open:
                    raise SystemExit  # the program ends: a thread of the user's ends silently
                elif time.monotonic() > deadline:
                    raise WorkerLostError(
                        f"map: a worker process has not answered for {timeout:g} s: was it "
                        f"stopped, or does {self._name} not return? The next batch starts a new "
                        f"one; set DVKERNELS_TIMEOUT_SECONDS if an element takes longer"
                    )
        except WorkerLostError:
            assert self._process is not None
            self._process.kill()
            self.end()
            raise
        except (OSError, EOFError):
            raise self._lost_error() from None
        except BaseException:
            self.end()
            raise

    def _lost_error(self) -> WorkerLostError:
        status = self.end()
        how = f"with status {status}: does the function end it?"
        if status < 0:
            how = f"by signal {-status}: was it killed, perhaps for its memory?"
        return WorkerLostError(
            f"map: a worker process for {self._name} ended before it answered, {how} The next "
            "batch starts a new one"
        )


def _loads(received: bytes) -> Any:
    try:
        return pickle.loads(received)
    except Exception as error:
        raise _unsent("results", describe(error)) from error


def _unsent(what: str, got: str) -> DatasetError:
    return DatasetError(
        f"map: expected {what} that can be sent between processes; got {got}; return arrays and "
        "nests of them, or use workers='threads'"
    )


def serve() -> None:
    """Run the main loop of a worker process: apply the function until the program closes."""
    for number in _SIGNALS:
        signal.signal(number, _do_nothing)  # not SIG_IGN, which child processes would inherit
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    connection = Connection(os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    with contextlib.suppress(OSError, EOFError):  # the program has gone
        try:
            fn = _receive_function(connection.recv_bytes())
        except BaseException as error:
            connection.send(_PickledError.of(error))
            return
        connection.send(None)
        while True:
            connection.send_bytes(_answer_request(fn, connection))


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Ignore a signal, which the program handles."""


def _receive_function(received: bytes) -> Callable[[Element], Element]:
    """Import the main module of the program as ``multiprocessing`` does; return the function."""
    parent, state, pickled = pickle.loads(received)
    threading.Thread(target=_exit_with_parent, args=[parent], daemon=True).start()
    process = multiprocessing.process.current_process()
    process._inheriting = True  # type: ignore[attr-defined]  # forbids starting processes
    try:
        multiprocessing.spawn.prepare(state)
        fn: Callable[[Element], Element] = pickle.loads(pickled)
    finally:
        del process._inheriting  # type: ignore[attr-defined]
    return fn


def _exit_with_parent(parent: int) -> None:
    """End this process once its parent is gone, even while the function runs."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


def _answer_request(fn: Callable[[Element], Element], connection: Connection) -> Any:
    """Apply ``fn`` to the elements of the next request; return the pickled answer."""
    received = connection.recv_bytes()
    answers: list[tuple[Any, _PickledError | None]] = []
    sent_at = time.monotonic()
    try:
        for element in pickle.loads(received):
            value, error = outcome_of(fn, element)
            answers.append((value, None if error is None else _PickledError.of(error)))
            if time.monotonic() - sent_at > _HEARTBEAT_SECONDS:
                connection.send_bytes(_HEARTBEAT)
                sent_at = time.monotonic()
    except BaseException as error:  # SystemExit of the function; elements that do not load
        return ForkingPickler.dumps(_PickledError.of(error))
    try:
        return ForkingPickler.dumps(answers)
    except Exception:
        return ForkingPickler.dumps([_picklable(*answer) for answer in answers])


def _picklable(value: Any, error: _PickledError | None) -> tuple[Any, _PickledError | None]:
    try:
        ForkingPickler.dumps(value)
    except Exception as failure:
        got = f"a {type(value).__name__}, which cannot be pickled ({describe(failure)})"
        return None, _PickledError.of(_unsent("a result", got))
    return value, error
