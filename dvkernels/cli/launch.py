"""``python -m dvkernels launch``: start a program on several workers with the MPI that is here."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from dvkernels.cli import argument_types
from dvkernels.cluster import launcher_environment, slurm_lists
from dvkernels.devices import cpu
from dvkernels.errors import LaunchError
from dvkernels.launcher import commands, supervision
from dvkernels.launcher.commands import HostSlots, Job, LauncherFlavour

__all__: list[str] = []

HELP = "start a program on several workers, with the installed mpiexec or srun"

_ATTEMPT = "DVKERNELS_ATTEMPT"
_HOST = re.compile(r"(?P<name>[^\s:,]+|\[[0-9a-fA-F:]+\])(?::(?P<count>[1-9][0-9]*))?")
# Set where the MPI Operator, a batch system or a user has named the hosts already.
_HOSTS_ELSEWHERE = (
    "OMPI_MCA_orte_default_hostfile",
    "PRTE_MCA_prte_default_hostfile",
    "HYDRA_HOST_FILE",
    "I_MPI_HYDRA_HOST_FILE",
    "SLURM_JOB_ID",
    "PBS_NODEFILE",
    "LSB_HOSTS",
    "PE_HOSTFILE",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = "%(prog)s [-n N] [options] (script.py | -m module) [arguments]"
    parser.add_argument(
        "-n",
        "--num-workers",
        type=argument_types.positive,
        metavar="N",
        help="default: as many as --hosts counts, as the tasks of a Slurm job, or as there are "
        "usable cores",
    )
    parser.add_argument(
        "--hosts",
        metavar="A:2,B:2",
        help="where, and how many workers on each; without counts they are spread evenly",
    )
    parser.add_argument(
        "-m", dest="is_module", action="store_true", help="the program is a module's name"
    )
    parser.add_argument(
        "--threads-per-worker",
        type=argument_types.positive,
        metavar="T",
        help="of BLAS, OpenMP and our kernels, unless OMP_NUM_THREADS etc. are set already; "
        "default: SLURM_CPUS_PER_TASK, or a worker's share of the cores",
    )
    parser.add_argument(
        "--bind",
        action=argparse.BooleanOptionalAction,
        help="bind each worker to cores of its own; default: on this host, if there are enough",
    )
    parser.add_argument(
        "--prefix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="begin each line with the worker's number (default: yes)",
    )
    parser.add_argument(
        "--timeout",
        type=argument_types.seconds,
        default=math.inf,
        metavar="SECONDS",
        help="end the job after so long, restarts included, with status 124",
    )
    parser.add_argument(
        "--grace",
        type=argument_types.seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long workers may go on after an interrupt or the timeout",
    )
    parser.add_argument(
        "--max-restarts",
        type=argument_types.natural,
        default=0,
        metavar="K",
        help=f"start a job that failed again, up to K times; the program finds the number of the "
        f"attempt in {_ATTEMPT} and its newest checkpoint by itself",
    )
    parser.add_argument(
        "--launcher", metavar="PATH", help="default: mpiexec of this environment, or of PATH, srun"
    )
    parser.add_argument(
        "--launcher-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="hand the launcher one more word, such as --launcher-option=--mpi=pmi2 (repeatable)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command, quoted for a shell, and end"
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Start the workers and wait for them; return the job's status."""
    path = commands.find(arguments.launcher, os.environ)
    flavour = commands.flavour_of(path)
    job = _job(arguments, flavour, os.environ)
    command = commands.command(path, flavour, job)
    added = commands.environment(job.num_threads, os.environ)
    if arguments.dry_run:
        print(shlex.join(["env", *(f"{name}={value}" for name, value in added.items()), *command]))
        return 0
    if flavour.name == "Open MPI" and os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1":
        # PRRTE's daemons are tasks of Slurm: told to stop as well, they kill the workers at once,
        # and of what srun says of them mpiexec returns the low byte, which is 0.
        _say(
            "when Slurm stops this job, Open MPI's mpiexec leaves the workers of other nodes no "
            "time and may end with status 0; where `srun --mpi=list` names pmix, use "
            "--launcher srun --launcher-option=--mpi=pmix"
        )
    given = _input()
    is_fed_by_launcher = flavour.feeds and not _is_first_here(job)
    if given is not None and not flavour.feeds and job.hosts and not _is_first_here(job):
        _say(
            f"the first worker is on another host, and {flavour.name} would end the job when its "
            f"input comes faster than it is read: it gets none; let the program read a file"
        )
    deadline = time.monotonic() + arguments.timeout
    first = _first_attempt(os.environ)
    for attempt in range(first, first + arguments.max_restarts + 1):
        end = supervision.run(
            command,
            {**os.environ, **added, _ATTEMPT: str(attempt)},
            forwarded=flavour.forwarded,
            ended_by=flavour.ended_by,
            timeout_seconds=max(0.0, deadline - time.monotonic()),
            grace_seconds=arguments.grace,
            sent=None if flavour.sent is None else functools.partial(_send, flavour.sent, path),
            failures=flavour.failures,
            given=given,
            is_fed_by_launcher=is_fed_by_launcher,
        )
        left = first + arguments.max_restarts - attempt
        if end.silent:
            _say(
                f"{flavour.name} says that all is well, but of the workers {end.silent} ended "
                f"without a word: killed, or by the exit of a library in C"
            )
        if end.status:
            _say(f"{flavour.name} ended with status {end.status}")
        if not (end.may_be_restarted and left):
            break
        _say(f"starting again; {left - 1} more restarts are allowed after this one")
    return end.status


def _send(
    sent: Callable[[str, int, signal.Signals], bool], path: str, pid: int, number: signal.Signals
) -> bool:
    if sent(path, pid, number):
        return True
    _say(f"{number.name} could not be brought to the workers: they are ended after --grace seconds")
    return False


def _job(
    arguments: argparse.Namespace, flavour: LauncherFlavour, environ: Mapping[str, str]
) -> Job:
    """Return the job that the options describe, as this host can do it."""
    cores = cpu.usable_cores()
    hosts = _hosts(arguments.hosts, arguments.num_workers)
    num_workers = sum(host.num_workers for host in hosts) or arguments.num_workers
    if num_workers is None:
        num_workers = _slurm_tasks(environ) or cores
    is_here = all(_is_this_host(host.name) for host in hosts)
    if not hosts:
        is_here = not any(environ.get(name) for name in _HOSTS_ELSEWHERE)
    is_here = is_here and flavour.name != launcher_environment.SRUN
    # Of other hosts we do not know how many cores they have: their workers find their share,
    # unless Slurm was told.
    num_threads = arguments.threads_per_worker
    if num_threads is None and "SLURM_CPUS_PER_TASK" in environ:
        num_threads = launcher_environment.number(environ, "SLURM_CPUS_PER_TASK", 1)
    if num_threads is None and is_here:
        num_threads = max(1, cores // num_workers)
    known = {**environ, **commands.environment(num_threads, environ)}
    fits = is_here and num_workers * (num_threads or 1) <= cores
    if arguments.bind and is_here and not fits:
        raise LaunchError(
            f"--bind: {num_workers} workers of {num_threads} threads need "
            f"{num_workers * (num_threads or 1)} cores, and {cores} may be used here; start fewer, "
            f"or leave --bind out"
        )
    return Job(
        program=_program(arguments.program, arguments.is_module),
        num_workers=num_workers,
        hosts=hosts,
        num_threads=num_threads,
        bound=(fits or None) if arguments.bind is None else arguments.bind,
        is_here=is_here,
        crowded=is_here and num_workers > cores,
        as_root=hasattr(os, "geteuid") and os.geteuid() == 0,
        prefixed=arguments.prefix,
        variables=(_ATTEMPT, *(name for name in commands.KEPT if name in known)),
        options=tuple(arguments.launcher_option),
    )


def _slurm_tasks(environ: Mapping[str, str]) -> int | None:
    """Return how many tasks a Slurm job has; None outside of one."""
    if "SLURM_NTASKS" in environ:
        return launcher_environment.number(environ, "SLURM_NTASKS", 1)
    name = "SLURM_TASKS_PER_NODE"  # alone, if the job was asked for as so many nodes
    return sum(slurm_lists.expand_counts(name, environ[name])) if name in environ else None


def _program(words: Sequence[str], is_module: bool) -> tuple[str, ...]:
    """Return the command of a worker."""
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        raise LaunchError("launch: expected a script, or -m and a module; got nothing to start")
    if not is_module and not os.path.isfile(words[0]):
        raise LaunchError(f"launch: there is no file {words[0]!r} to start")
    module = ("-m",) if is_module else ()
    return (sys.executable, "-m", "dvkernels.launcher.worker", *module, *words)


def _hosts(text: str | None, num_workers: int | None) -> tuple[HostSlots, ...]:
    """Return the hosts that ``a:2,b:2`` or ``a,b`` mean, with a count for each."""
    if text is None:
        return ()
    matches = [_HOST.fullmatch(part) for part in text.split(",")]
    found = [(match["name"], match["count"]) for match in matches if match is not None]
    counted = [count for _, count in found if count is not None]
    if len(found) < len(matches) or len(counted) not in (0, len(found)):
        raise LaunchError(
            f"--hosts: expected hosts such as a,b, or all with counts such as a:2,b:2; got {text!r}"
        )
    if len({name for name, _ in found}) < len(found):
        raise LaunchError(f"--hosts: each host once; got {text!r}")
    if counted:
        hosts = tuple(HostSlots(name, int(count)) for name, count in found)
        room = sum(host.num_workers for host in hosts)
        if num_workers not in (None, room):
            raise LaunchError(f"--hosts: {text!r} counts {room} workers, but -n is {num_workers}")
        return hosts
    each, more = divmod(len(found) if num_workers is None else num_workers, len(found))
    counts = [each + (place < more) for place in range(len(found))]
    return tuple(
        HostSlots(name, count) for (name, _), count in zip(found, counts, strict=True) if count
    )


def _is_first_here(job: Job) -> bool:
    """Tell whether it is known that the first worker goes to this host."""
    return job.is_here or (bool(job.hosts) and _is_this_host(job.hosts[0].name))


def _input() -> int | None:
    """Return the descriptor of what the first worker may read.

    Not a terminal: workers are in sessions of their own, where Ctrl-C and Ctrl-Z do not reach them.
    """
    with contextlib.suppress(OSError):
        if sys.stdin is None or os.isatty(0) or os.path.samestat(os.fstat(0), os.stat(os.devnull)):
            return None
        return 0
    return None


def _is_this_host(name: str) -> bool:
    return name in ("localhost", "127.0.0.1", "[::1]", socket.gethostname())


def _first_attempt(environ: Mapping[str, str]) -> int:
    """Return the number of this attempt; a batch system that restarts us may have set it."""
    text = environ.get(_ATTEMPT, "0")
    return int(text) if text.isdecimal() else 0


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
