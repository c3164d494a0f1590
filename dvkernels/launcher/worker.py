"""Runner of a program as a worker: if one worker of a job fails, all of them end.

``python -m dvkernels.launcher.worker (script.py | -m module) [arguments]``. Without it a worker
that raised waits in ``MPI_Finalize`` for the others, which wait for it in a collective. The worker
reports its end to the ``launch`` that started it: see ``exit_records.py``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import runpy
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dvkernels import tracebacks
from dvkernels.launcher import exit_records
from dvkernels.launcher.exit_records import ExitRecord

__all__: list[str] = []

# How long a worker that exits with a status other than 0 waits for the others to do so too. Without
# MPI it cannot see them, and waits only briefly: mostly all have found the same wrong option.
_SECONDS_FOR_ALL_TO_EXIT = 10.0
_SECONDS_WITHOUT_MPI = 2.0
_SECONDS_FOR_THE_RELAY = 1.0
_SECONDS_FOR_THE_LAUNCHER = 0.1


def main(arguments: Sequence[str]) -> None:
    """Run the program as if the interpreter had been called with these arguments."""
    record = exit_records.record_of(os.environ)
    _redirect_input(record)
    _report_every_exit(record)
    try:
        if arguments[0] == "-m":
            sys.argv[:] = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = arguments
            sys.path[0] = str(Path(arguments[0]).absolute().parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        status = _status_of(end)
        if status:
            record.report_exit(status)
            if not _all_exit():
                _end_job(status)
        raise SystemExit(status) from None
    except BaseException as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        record.report_exit(status)
        _print_exception(error)
        _end_job(status)
        raise SystemExit(status) from None


def _redirect_input(record: ExitRecord) -> None:
    """Give the first worker the input of the job, and the others none.

    Launchers leave the standard input of the others open, and a read would wait for ever.
    """
    input_fd = record.report_start()
    if input_fd is None and record.worker != 0:
        input_fd = os.open(os.devnull, os.O_RDONLY)
    if input_fd:  # 0 if standard input was closed: then it is in place already
        os.dup2(input_fd, 0)
        os.close(input_fd)


def _report_every_exit(record: ExitRecord) -> None:
    """Report the exit of this process also if it ends well, by ``os._exit`` or by ``exec``.

    An end by a signal, or by ``exit`` in a C library, stays without a report.
    """
    atexit.register(record.report_exit, 0)  # called last; a failure was reported before

    def exit_at_once(status: int) -> NoReturn:
        record.report_exit(status & 0xFF)
        original_exit(status)

    def reporting(execute: Any) -> Any:
        @functools.wraps(execute)
        def report_and_execute(*arguments: Any, **named: Any) -> Any:
            record.report_exec()
            return execute(*arguments, **named)

        return report_and_execute

    original_exit, os._exit = os._exit, functools.wraps(os._exit)(exit_at_once)
    os.execv, os.execve = reporting(os.execv), reporting(os.execve)


def _status_of(end: SystemExit) -> int:
    """Return the exit status of a ``SystemExit``; print a code that is no integer."""
    if end.code is None or isinstance(end.code, int):
        return (end.code or 0) & 0xFF
    with contextlib.suppress(Exception):  # its __str__ may fail
        print(end.code, file=sys.stderr)
    return 1


def _print_exception(error: BaseException) -> None:
    """Print an exception by the program's ``sys.excepthook``.

    No error in the hook, not even a second Ctrl-C, may keep the job from ending.
    """
    with contextlib.suppress(BaseException):
        trace = tracebacks.of_users(error.__traceback__)
        BaseException.with_traceback(error, trace)  # no class of the program can override this
        sys.excepthook(type(error), error, trace)


def _all_exit() -> bool:
    """Wait for the other workers to exit too, and return whether all do.

    All of them may have saved their work, some later than others.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        time.sleep(_SECONDS_WITHOUT_MPI)
        return False
    barrier = mpi.COMM_WORLD.Ibarrier()
    deadline = time.monotonic() + _SECONDS_FOR_ALL_TO_EXIT
    while not barrier.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _end_job(status: int) -> None:
    """End all workers, by MPI if this one has started it, or else by the process manager."""
    _flush_output()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized():
        if not mpi.Is_finalized():
            mpi.COMM_WORLD.Abort(status)
    elif os.environ.get("PMI_FD", "").isdecimal():
        # If a worker ends before it started MPI, Hydra lets the others wait for it, unless it gets
        # an abort command of its protocol PMI-1. Open MPI and srun end them by themselves.
        with contextlib.suppress(OSError):
            os.write(int(os.environ["PMI_FD"]), b"cmd=abort exitcode=%d\n" % status)


def _flush_output() -> None:
    """Wait until the relay has passed on all output: a launcher that kills stops reading."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    relay_end = os.environ.get("DVKERNELS_RELAY_ENDED", "")
    if relay_end.isdecimal():
        null = os.open(os.devnull, os.O_WRONLY)
        for standard in (1, 2):
            os.dup2(null, standard)
        with contextlib.suppress(OSError):  # bounded: children that go on hold the pipe open
            select.select([int(relay_end)], [], [], _SECONDS_FOR_THE_RELAY)
    time.sleep(_SECONDS_FOR_THE_LAUNCHER)


if __name__ == "__main__":
    main(sys.argv[1:])
