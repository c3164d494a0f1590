"""Processes that apply one function to elements, each for a thread of the program's own.

They are spawned, never forked: a child forked from a process with OpenMP threads may end or hang.
Signals are the program's to handle: where one is sent to a whole group or job, the processes do
nothing about it, and end with the program, however that ends.
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
from dvkernels.data.outcome import Outcome, outcome_of
from dvkernels.errors import DatasetError, WorkerLostError
from dvkernels.threads.thread import Latch
from dvkernels.user_errors import annotate, in_words

__all__ = ["WorkerProcess", "serve"]

_LOOK_SECONDS = 0.1  # how often who waits for an answer looks whether it is still wanted
_SIGN_SECONDS = 1.0  # after which a process that goes on says so
_PARENT_SECONDS = 1.0  # how often a process looks whether the program still exists
_END_SECONDS = 2.0  # that a process has to end what it does once nobody waits for it

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SIGN_OF_LIFE = b""

# The path first, so that the library is found where the program found it.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; import dvkernels.data.worker_process as p; p.serve()"
)


class Heartbeat(Protocol):
    """Where a sign of life is noted."""

    heard_at: float


class _SentError(NamedTuple):
    """An error on its way between processes."""

    pickled: bytes  # empty: it does not survive the way
    words: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> _SentError:
        words = in_words(error)
        try:
            trace = "".join(traceback.format_exception(error, chain=False)).rstrip()
        except Exception:
            trace = words
        try:
            pickled = pickle.dumps(error)
            back = pickle.loads(pickled)
        except Exception:
            return cls(b"", words, trace)
        survives = type(back) is type(error) and in_words(back) == words
        return cls(pickled if survives else b"", words, trace)

    def received(self) -> Any:
        """Return the error as it was; if it cannot be had, one that says what it was."""
        try:
            error = pickle.loads(self.pickled)
        except Exception:
            return RuntimeError(f"{self.words}\nin a worker process:\n{self.trace}")
        annotate(error, f"in a worker process:\n{self.trace}")
        return error


class WorkerProcess:
    """A process that applies a function; started by its first elements, and anew once lost.

    It serves one thread, which it makes deaf to signals, so that the process is from its birth.
    """

    def __init__(self, name: str, pickled: bytes, board: Heartbeat) -> None:
        self._name = name
        self._pickled = pickled
        self._board = board
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def __call__(self, elements: Sequence[Any], stop: Latch) -> Iterator[Outcome]:
        """Yield what the function makes of elements, all of which go there at once."""
        # A view of a buffer that is let go of here, and not when the traceback of an error is.
        with self._pickle_elements(elements) as request:
            if self._connection is None:
                self._start(stop)
            answer = self._ask(request, stop)
        if isinstance(answer, _SentError):
            raise answer.received()
        for value, sent in answer:
            yield Outcome(value, None if sent is None else sent.received())

    def end(self) -> None:
        """End the process: by itself if it does so soon."""
        connection, self._connection = self._connection, None
        process, self._process = self._process, None
        if connection is not None:
            connection.close()
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
            process.kill()
            process.wait()

    def _pickle_elements(self, elements: Sequence[Any]) -> Any:
        try:
            return ForkingPickler.dumps(elements)
        except Exception as error:
            raise DatasetError(
                f"map: expected elements that can be sent to a worker process for {self._name}; "
                f"got some that cannot be pickled ({in_words(error)}); use workers='threads'"
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
                f"map: expected to start a worker process; got {in_words(error)}; free memory, "
                "processes or open files, or use workers='threads'"
            ) from error
        state = multiprocessing.spawn.get_preparation_data("dvkernels-data-map")
        state["authkey"] = bytes(state["authkey"])  # an authentication string refuses to be sent
        answer = self._ask(pickle.dumps((os.getpid(), state, self._pickled)), stop)
        if isinstance(answer, _SentError):
            self.end()
            raise DatasetError(
                f"map: expected a function and a main module that worker processes can import; "
                f"{self._name} gave {answer.words}; define the function in a module, put what the "
                f'program does below if __name__ == "__main__":, or use workers="threads"'
            )

    def _ask(self, request: Any, stop: Latch) -> Any:
        """Return what the process answers; whatever keeps it from that ends it."""
        assert self._connection is not None
        patience = deadlines.timeout_seconds()
        try:
            self._connection.send_bytes(request)
            late = time.monotonic() + patience
            while True:
                if self._connection.poll(_LOOK_SECONDS):
                    received = self._connection.recv_bytes()
                    if received != _SIGN_OF_LIFE:
                        return _loads(received)
                    self._board.heard_at = time.monotonic()
                    late = self._board.heard_at + patience
                elif stop.is_open:
                    raise SystemExit  # the program is over: a thread of the user's ends in silence
                elif time.monotonic() > late:
                    raise WorkerLostError(
                        f"map: a worker process has not answered for {patience:g} s: was it "
                        f"stopped, or does {self._name} not return? The next batch starts a new "
                        f"one; set DVKERNELS_TIMEOUT_SECONDS if an element takes longer"
                    )
        except WorkerLostError:
            assert self._process is not None
            self._process.kill()
            self.end()
            raise
        except (OSError, EOFError):
            raise self._lost() from None
        except BaseException:
            self.end()
            raise

    def _lost(self) -> WorkerLostError:
        process, self._process = self._process, None
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        process.kill()
        status = process.wait()
        self.end()
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
        raise DatasetError(
            f"map: expected results that can be sent between processes; got {in_words(error)}; "
            "return arrays and nests of them, or use workers='threads'"
        ) from error


def serve() -> None:
    """Apply a function to elements until the program wants no more: the life of a process."""
    for number in _SIGNALS:
        signal.signal(number, _do_nothing)  # and not SIG_IGN, which programs started here inherit
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    connection = Connection(os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    with contextlib.suppress(OSError, EOFError):  # the program has gone
        try:
            fn = _prepared(connection.recv_bytes())
        except BaseException as error:
            connection.send(_SentError.of(error))
            return
        connection.send(None)
        while True:
            connection.send_bytes(_applied(fn, connection))


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Leave a signal to the program."""


def _prepared(received: bytes) -> Callable[[Any], Any]:
    """Become like the program, as far as its function needs it; return the function."""
    parent, state, pickled = pickle.loads(received)
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    process = multiprocessing.process.current_process()
    process._inheriting = True  # type: ignore[attr-defined]  # what no process may be started in
    try:
        multiprocessing.spawn.prepare(state)
        fn: Callable[[Any], Any] = pickle.loads(pickled)
    finally:
        del process._inheriting  # type: ignore[attr-defined]
    return fn


def _end_with(parent: int) -> None:
    """End this process when the program is gone: a killed one cannot say so."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


def _applied(fn: Callable[[Any], Any], connection: Connection) -> Any:
    """Return the answer to a request for some elements."""
    received = connection.recv_bytes()
    answers: list[tuple[Any, _SentError | None]] = []
    said_at = time.monotonic()
    try:
        for element in pickle.loads(received):
            value, error = outcome_of(fn, element)
            answers.append((value, None if error is None else _SentError.of(error)))
            if time.monotonic() - said_at > _SIGN_SECONDS:
                connection.send_bytes(_SIGN_OF_LIFE)
                said_at = time.monotonic()
    except BaseException as error:  # SystemExit of the function; elements that do not load
        return _pickled(_SentError.of(error))
    try:
        return _pickled(answers)
    except Exception:
        return _pickled([_sendable(*answer) for answer in answers])


def _sendable(value: Any, error: _SentError | None) -> tuple[Any, _SentError | None]:
    try:
        ForkingPickler.dumps(value)
    except Exception as failure:
        unsent = DatasetError(
            f"map: expected a result that can be sent between processes; got a "
            f"{type(value).__name__}, which cannot be pickled ({in_words(failure)}); return "
            "arrays and nests of them, or use workers='threads'"
        )
        return None, _SentError.of(unsent)
    return value, error


def _pickled(answer: object) -> Any:
    return ForkingPickler.dumps(answer)
