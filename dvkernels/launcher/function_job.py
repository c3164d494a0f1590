"""Job of a function: every worker of this host calls it, and the caller gets the results.

The workers are new processes of the caller's interpreter. They need no main guard, because they do
not import the caller's script: cloudpickle sends what is defined there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dvkernels import tracebacks, user_errors
from dvkernels.cluster import launcher_environment
from dvkernels.devices import cpu
from dvkernels.errors import LaunchError, WorkerLostError
from dvkernels.launcher import commands, leaked_shm, notebook_line, shared_pickle
from dvkernels.launcher.prefix_output import LinePrefixer
from dvkernels.threads import shielded

__all__ = ["launch"]

T = TypeVar("T")

_SCRIPT = Path(__file__).with_name("function_worker.py")
_NBYTES = 1 << 16  # of one read of a worker's output
_POLL_SECONDS = 0.05
_MOMENT_SECONDS = 0.002  # after the end of its output a process ends
# After a failure the other workers get a moment to find out themselves, then an interrupt, which
# lets them clean up; what is left is killed.
_SECONDS_TO_NOTICE = 1.0
_SECONDS_TO_CLEAN_UP = 3.0


@tracebacks.boundary
def launch(
    fn: Callable[..., T],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    workers: int | None = None,
) -> list[T]:
    """Call a function in several processes of this host, and return their results in order.

    Inside the function ``MultiWorkerMirroredStrategy()`` connects the processes, without MPI.
    Scripts need no main guard; notebook cells and the interactive interpreter work as well. What
    the processes print appears line by line, each line with the number of its worker.

    Parameters
    ----------
    fn : callable
        Called once in each process. It and all that it refers to are sent by cloudpickle: what the
        calling script or notebook defines by value, what can be imported by name.
    args, kwargs : sequence, mapping
        Its arguments, the same for all workers. Arrays of 64 KiB and more are written to shared
        memory once, however many workers there are; a worker that writes to one gets a copy of the
        pages that it writes to, so nobody else sees it.
    workers : int, optional
        Number of processes; the number of usable cores if not given. Each may use its share of the
        cores for BLAS, OpenMP and the kernels.

    Returns
    -------
    list
        What the function has returned in worker 0, 1, ....

    Raises
    ------
    Exception
        The first exception that left the function in any worker, with the worker's traceback as a
        note. The other workers are interrupted, and killed after 3 seconds.
    WorkerLostError
        A worker was killed, or ended without a result.
    LaunchError
        A worker cannot be started, the call cannot be pickled, or the function called
        ``sys.exit``.

    Notes
    -----
    On every way out, Ctrl-C included, all processes have ended. If this process is killed, they end
    within a second. A start takes about as long as importing the package. Not on Windows.

    Examples
    --------
    >>> import numpy as np
    >>> import dvkernels as dv
    >>> def total(numbers):
    ...     with dv.MultiWorkerMirroredStrategy() as strategy:
    ...         rank = strategy.cluster_resolver.task_id
    ...         part = strategy.run(lambda: numbers[rank::2].sum())
    ...         return float(strategy.reduce("sum", part))
    >>> dv.launch(total, (np.arange(10.0),), workers=2)
    [45.0, 45.0]
    """
    num_workers = _checked(fn, args, kwargs, workers)
    with contextlib.ExitStack() as files:
        call = _open(files)
        try:
            shared_pickle.write(call, (fn, tuple(args), dict(kwargs or {})))
        except Exception as error:
            raise LaunchError(
                f"launch: the function and its arguments cannot be pickled: "
                f"{user_errors.describe(error)}; create inside the function what cannot be sent"
            ) from error
        results = [_open(files) for _ in range(num_workers)]
        job = _FunctionJob()
        try:
            # An interrupt would lose a process that has just been started.
            group = files.enter_context(leaked_shm.host_group(num_workers))
            start = functools.partial(job.start, call, results, group)
            shielded.uninterrupted(start, is_atomic=True)
            job.wait()
        finally:
            job.end()
        return _values(job.workers)


def _checked(fn: Any, args: Any, kwargs: Any, workers: Any) -> int:
    """Return the number of workers; raise unless the arguments are right."""
    if not callable(fn):
        raise LaunchError(f"launch: expected a function; got {user_errors.brief(fn)}")
    if not isinstance(args, (tuple, list)):
        raise LaunchError(
            f"launch: args: expected a tuple of arguments; got {user_errors.brief(args)}; write "
            f"args=(value,)"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise LaunchError(
            f"launch: kwargs: expected a mapping of names; got {user_errors.brief(kwargs)}"
        )
    if workers is None:
        workers = cpu.usable_cores()
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise LaunchError(
            f"launch: workers: expected a number of processes from 1; got "
            f"{user_errors.brief(workers)}"
        )
    if os.name != "posix":
        raise LaunchError("launch: functions are launched on Linux and macOS only")
    return workers


def _open(files: contextlib.ExitStack) -> int:
    fd = shared_pickle.new_file()
    files.callback(os.close, fd)
    return fd


class _FunctionWorker:
    """Worker process, and how it ended: ``result`` or ``error``."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], result_fd: int) -> None:
        self.rank, self._process, self._result_fd = rank, process, result_fd
        self.is_ended, self._is_asked_to_end = False, False
        self.result: Any = None
        self.error: BaseException | None = None
        self.failed_at = 0.0  # on the monotonic clock, which all processes share

    def look(self) -> bool:
        """Return whether the process has ended; then kill what it has left, and reap it."""
        if not self.is_ended:
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if os.waitid(os.P_PID, self._process.pid, options) is not None:
                self._kill_group()  # before the number of its group can be used again
                self._process.wait()
                self._read_outcome()
                self.is_ended = True
        return self.is_ended

    def interrupt(self) -> None:
        """Send the process an interrupt, so that it can clean up."""
        self._is_asked_to_end = True
        os.kill(self._process.pid, signal.SIGINT)  # it is not reaped yet

    def kill(self) -> None:
        """Kill the process, and those that it has started."""
        self._is_asked_to_end = True
        self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read_outcome(self) -> None:
        try:
            is_error, value, text, self.failed_at = shared_pickle.read(self._result_fd)
        except EOFError:
            if not self._is_asked_to_end:
                self.error = _lost(self.rank, self._process.returncode)
            return
        if not is_error:
            self.result = value
        elif not self._is_asked_to_end or not isinstance(value, KeyboardInterrupt):
            self.error = _raised(self.rank, value, text)


def _lost(rank: int, status: int) -> WorkerLostError:
    if status < 0:
        end = f"was killed by {signal.Signals(-status).name}"
        remedy = "; is there too little memory?" if status == -signal.SIGKILL else ""
    else:
        end, remedy = f"ended with status {status}", ": it may have called os._exit"
    return WorkerLostError(f"launch: worker {rank} {end} before the function returned{remedy}")


def _raised(rank: int, error: BaseException | None, text: str) -> BaseException:
    """Return the error of a worker, with its traceback as a note."""
    if isinstance(error, SystemExit):
        error = LaunchError(f"launch: the function called sys.exit({error.code!r}); return instead")
    elif error is None:
        error = LaunchError("launch: the function raised an exception that cannot be pickled")
    user_errors.annotate(error, f"In worker {rank}:\n{text.rstrip()}")
    return error


class _FunctionJob:
    """Workers that call one function."""

    def __init__(self) -> None:
        self.workers: list[_FunctionWorker] = []
        self._selector = selectors.DefaultSelector()
        self._line = notebook_line.NotebookLine()

    def start(self, call_fd: int, result_fds: Sequence[int], group: Mapping[str, str]) -> None:
        """Start a worker for each result, with the environment of a host group."""
        num_threads = max(1, cpu.usable_cores() // len(result_fds))
        environ = {**os.environ, **commands.environment(num_threads, os.environ), **group}
        folders = json.dumps([str(folder) for folder in sys.path])
        for rank, result_fd in enumerate(result_fds):
            try:
                process = subprocess.Popen(
                    [sys.executable, str(_SCRIPT), str(call_fd), str(result_fd), folders],
                    env={**environ, launcher_environment.RANK: str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(call_fd, result_fd),
                    start_new_session=True,  # the terminal's Ctrl-C reaches the caller only
                )
            except OSError as error:
                raise LaunchError(f"launch: worker {rank} cannot be started: {error}") from error
            self.workers.append(_FunctionWorker(rank, process, result_fd))
            for pipe, target in ((process.stdout, "stdout"), (process.stderr, "stderr")):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
                prefixer = LinePrefixer(f"[{rank}] ".encode())
                self._selector.register(pipe, selectors.EVENT_READ, (prefixer, target))

    def wait(self) -> None:
        """Pass on what the workers print until all have ended, or one has failed."""
        while not self._are_ended():
            if any(worker.error is not None for worker in self.workers):
                self._relay_until_ended(_SECONDS_TO_NOTICE)
                return
            self._relay()
            self._line.show(sum(worker.is_ended for worker in self.workers), len(self.workers))

    def end(self) -> None:
        """End all workers that still run, and pass on the last of what they have printed."""
        try:
            for worker in self.workers:
                if not worker.look():
                    worker.interrupt()
            self._relay_until_ended(_SECONDS_TO_CLEAN_UP)
        finally:  # also if they are interrupted once more, while they clean up
            shielded.uninterrupted(self._kill, is_atomic=True)
            self._line.clear()

    def _kill(self) -> None:
        for worker in self.workers:
            if not worker.look():
                worker.kill()
        while not self._are_ended():
            time.sleep(_MOMENT_SECONDS)
        for key in [*self._selector.get_map().values()]:
            if self._pass_on(key):  # a process that left the group may hold the other end open
                self._close(key)
        self._selector.close()

    def _are_ended(self) -> bool:
        return all([worker.look() for worker in self.workers])

    def _relay_until_ended(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._are_ended() and time.monotonic() < deadline:
            self._relay()

    def _relay(self) -> None:
        """Wait a moment for output, and pass it on."""
        pipes = self._selector.get_map()
        # At the end of its output a worker is about to end.
        is_ending = len(pipes) < 2 * sum(not worker.is_ended for worker in self.workers)
        ready = self._selector.select(_MOMENT_SECONDS if is_ending else _POLL_SECONDS)
        found = {key.fd for key, _ in ready}
        for key in [*pipes.values()]:
            if key.fd in found or key.data[0].rest:
                self._pass_on(key)

    def _pass_on(self, key: selectors.SelectorKey) -> bool:
        """Write the lines that a pipe holds, and close it at its end; return whether it is open."""
        prefixer, target = key.data
        while True:
            try:
                text = os.read(key.fd, _NBYTES)
            except BlockingIOError:
                _write(target, prefixer.lines(None))
                return True
            if not text:
                self._close(key)
                return False
            _write(target, prefixer.lines(text))

    def _close(self, key: selectors.SelectorKey) -> None:
        prefixer, target = key.data
        _write(target, prefixer.lines(b""))
        self._selector.unregister(key.fileobj)
        key.fileobj.close()  # type: ignore[union-attr]


def _write(target: str, lines: Iterator[bytes]) -> None:
    """Write lines to the caller's present ``sys.stdout`` or ``sys.stderr``, unless it is closed."""
    text, stream = b"".join(lines), getattr(sys, target)
    if text and stream is not None:
        with contextlib.suppress(ValueError, OSError):
            stream.write(text.decode(errors="replace"))
            stream.flush()


def _values(workers: Sequence[_FunctionWorker]) -> list[Any]:
    """Return the results in order, or raise the first error."""
    failed = [worker for worker in workers if worker.error is not None]
    if failed:
        first = min(failed, key=lambda worker: worker.failed_at)  # a lost worker has failed at 0
        assert first.error is not None
        raise first.error
    return [worker.result for worker in workers]
