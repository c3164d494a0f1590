"""Run a program as a worker of a job that ends as a whole: if one worker fails, all do.

``python -m dvkernels.launcher.worker (script.py | -m module) [arguments]``. Without it a worker
that raised waits in ``MPI_Finalize`` for the others, which wait for it in a collective. Whoever
started the job with ``launch`` is told how this worker ended: see ``exit_records.py``.
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
from types import TracebackType
from typing import Any, NoReturn

from dvkernels.launcher import exit_records
from dvkernels.launcher.exit_records import ExitRecord

__all__: list[str] = []

# How long a worker that leaves with a status other than 0 waits for the others to do so. Those that
# cannot be seen are given little: mostly all have found the same wrong option.
_SECONDS_FOR_THE_OTHERS = 10.0
_SECONDS_WITHOUT_MPI = 2.0
_SECONDS_FOR_THE_RELAY = 1.0
_SECONDS_FOR_THE_LAUNCHER = 0.1

# Code of this module and of what it runs programs with is left out of tracebacks.
_OURS = (__file__, runpy.__file__, "<frozen runpy>")


def main(words: Sequence[str]) -> None:
    """Run the program as if the interpreter had been called with these words."""
    entry = exit_records.entry_of(os.environ)
    _leave_input_to_the_first(entry)
    _tell_of_every_end(entry)
    try:
        if words[0] == "-m":
            sys.argv[:] = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = words
            sys.path[0] = str(Path(words[0]).absolute().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = _status_of(end)
        if status:
            entry.leave(status)
            if not _all_leave():
                _end_job(status)
        raise SystemExit(status) from None
    except BaseException as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        entry.leave(status)
        _show(error)
        _end_job(status)
        raise SystemExit(status) from None


def _leave_input_to_the_first(entry: ExitRecord) -> None:
    """Give the first worker the input of the job, and the others none.

    Launchers leave those waiting for what never comes.
    """
    given = entry.arrive()
    if given is None and entry.worker != 0:
        given = os.open(os.devnull, os.O_RDONLY)
    if given:  # 0 if it was closed
        os.dup2(given, 0)
        os.close(given)


def _tell_of_every_end(entry: ExitRecord) -> None:
    """Have it said when the process ends well, by ``os._exit`` or by becoming another program.

    Other ends, by a signal or out of a library in C, go without a word.
    """
    atexit.register(entry.leave, 0)  # the last to be called; a failure was said before

    def exit_at_once(status: int) -> NoReturn:
        entry.leave(status & 0xFF)
        leave(status)

    def becoming(become: Any) -> Any:
        @functools.wraps(become)
        def become_another(*words: Any, **named: Any) -> Any:
            entry.be_replaced()
            return become(*words, **named)

        return become_another

    leave, os._exit = os._exit, functools.wraps(os._exit)(exit_at_once)
    os.execv, os.execve = becoming(os.execv), becoming(os.execve)


def _status_of(end: SystemExit) -> int:
    """Return the exit status that a program asked for; what is no number is its last word."""
    if end.code is None or isinstance(end.code, int):
        return (end.code or 0) & 0xFF
    with contextlib.suppress(Exception):  # it may have no words
        print(end.code, file=sys.stderr)
    return 1


def _show(error: BaseException) -> None:
    """Print an exception as the interpreter does, or whatever the program does in its stead.

    Nothing that goes wrong there, be it a second Ctrl-C, may keep the job from ending.
    """
    with contextlib.suppress(BaseException):
        trace = _of_program(error.__traceback__)
        BaseException.with_traceback(error, trace)  # which no class of the program's refuses
        sys.excepthook(type(error), error, trace)


def _of_program(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename in _OURS:
        trace = trace.tb_next
    return trace


def _all_leave() -> bool:
    """Wait for the other workers to ask for an end too, and say whether all have.

    They may all have saved what they did, and some be later than others.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        time.sleep(_SECONDS_WITHOUT_MPI)
        return False
    everybody = mpi.COMM_WORLD.Ibarrier()
    deadline = time.monotonic() + _SECONDS_FOR_THE_OTHERS
    while not everybody.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _end_job(status: int) -> None:
    """End all workers, by MPI if this one has started it, or else by the process manager."""
    _let_last_words_out()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized():
        if not mpi.Is_finalized():
            mpi.COMM_WORLD.Abort(status)
    elif os.environ.get("PMI_FD", "").isdecimal():
        # Hydra lets the others wait for a worker that ended before it started MPI, unless told in
        # the words of its own protocol, PMI-1. Open MPI and srun end them by themselves.
        with contextlib.suppress(OSError):
            os.write(int(os.environ["PMI_FD"]), b"cmd=abort exitcode=%d\n" % status)


def _let_last_words_out() -> None:
    """Wait until the relay has passed on what was printed: launchers that kill read no more."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
            stream.flush()
    relay = os.environ.get("DVKERNELS_RELAY_ENDED", "")
    if relay.isdecimal():
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for standard in (1, 2):
            os.dup2(nowhere, standard)
        with contextlib.suppress(OSError):  # children that go on hold the pipe: not for ever
            select.select([int(relay)], [], [], _SECONDS_FOR_THE_RELAY)
    time.sleep(_SECONDS_FOR_THE_LAUNCHER)


if __name__ == "__main__":
    main(sys.argv[1:])
