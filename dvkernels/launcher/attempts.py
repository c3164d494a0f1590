"""Attempts of a job: run it, report how it ended, and start it again if it failed by itself."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping

from dvkernels.launcher import commands, job_plan, leaked_shm, supervision
from dvkernels.launcher.commands import LauncherFlavour
from dvkernels.launcher.job_description import Job

__all__ = ["run"]


def run(
    launcher: str,
    flavour: LauncherFlavour,
    job: Job,
    environ: Mapping[str, str],
    *,
    timeout_seconds: float,
    grace_seconds: float,
    max_restarts: int,
) -> int:
    """Run a job, with restarts, and return its exit status.

    Parameters
    ----------
    launcher : str
        The launcher's path.
    flavour : LauncherFlavour
        Its kind.
    job : Job
        The job.
    environ : mapping
        The environment variables of this process. Workers get those that the job adds as well.
    timeout_seconds : float
        How long all attempts together may take; may be infinite.
    grace_seconds : float
        How long workers may go on after an interrupt or the timeout.
    max_restarts : int
        How often a failed job is started again.

    Raises
    ------
    LaunchError
        The launcher cannot start the job.
    """
    command = commands.command(launcher, flavour, job)
    added = commands.environment(job.num_threads, environ)
    if flavour.name == "Open MPI" and environ.get("SLURM_JOB_NUM_NODES", "1") != "1":
        # PRRTE's daemons are tasks of Slurm: when Slurm stops them too, they kill the workers at
        # once. mpiexec then returns the low byte of srun's status, which is 0.
        _report(
            "when Slurm stops this job, Open MPI's mpiexec leaves the workers of other nodes no "
            "time and may end with status 0; where `srun --mpi=list` names pmix, use "
            "--launcher srun --launcher-option=--mpi=pmix"
        )
    is_first_local = job_plan.is_first_worker_local(job)
    input_fd = _input_descriptor()
    launcher_forwards_input = flavour.forwards_input and not is_first_local
    if input_fd is not None and not flavour.forwards_input and job.hosts and not is_first_local:
        _report(
            f"the first worker is on another host, and {flavour.name} would end the job when its "
            f"input comes faster than it is read: it gets none; let the program read a file"
        )
    deadline = time.monotonic() + timeout_seconds
    first = _first_attempt(environ)
    for attempt in range(first, first + max_restarts + 1):
        with leaked_shm.host_group(job.num_workers, flavour is commands.LOCAL) as group:
            end = supervision.run(
                command,
                {**environ, **added, **group, job_plan.ATTEMPT_VARIABLE: str(attempt)},
                forwarded_signals=flavour.forwarded_signals,
                end_signal=flavour.end_signal,
                timeout_seconds=max(0.0, deadline - time.monotonic()),
                grace_seconds=grace_seconds,
                send_signal=(
                    None
                    if flavour.send_signal is None
                    else functools.partial(_send_signal, flavour.send_signal, launcher)
                ),
                failure_statuses=flavour.failure_statuses,
                input_fd=input_fd,
                launcher_forwards_input=launcher_forwards_input,
            )
        restarts_left = first + max_restarts - attempt
        if end.silent:
            _report(
                f"{flavour.name} reports success, but of the workers {end.silent} ended without a "
                f"report: killed, or by the exit of a library in C"
            )
        if end.status:
            _report(f"{flavour.name} ended with status {end.status}")
        if not (end.may_be_restarted and restarts_left):
            break
        _report(f"starting again; {restarts_left - 1} more restarts are allowed after this one")
    return end.status


def _send_signal(
    send: Callable[[str, int, signal.Signals], bool],
    launcher: str,
    pid: int,
    number: signal.Signals,
) -> bool:
    """Send a signal to all workers, and report a failure."""
    if send(launcher, pid, number):
        return True
    _report(f"{number.name} could not be sent to the workers: they are ended after --grace seconds")
    return False


def _input_descriptor() -> int | None:
    """Return the descriptor that the first worker may read, None if there is no input.

    Not a terminal: workers run in sessions of their own, out of reach of Ctrl-C and Ctrl-Z.
    """
    with contextlib.suppress(OSError):
        if sys.stdin is None or os.isatty(0) or os.path.samestat(os.fstat(0), os.stat(os.devnull)):
            return None
        return 0
    return None


def _first_attempt(environ: Mapping[str, str]) -> int:
    """Return the number of this attempt, which a batch system that restarts launch may set."""
    text = environ.get(job_plan.ATTEMPT_VARIABLE, "0")
    return int(text) if text.isdecimal() else 0


def _report(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
