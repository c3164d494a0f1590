"""``python -m dvkernels launch``: start a program on several workers."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys

from dvkernels.cli import argument_types
from dvkernels.cluster import simulated_hosts
from dvkernels.errors import LaunchError
from dvkernels.launcher import commands, job_plan, leaked_shm
from dvkernels.launcher.commands import LauncherFlavour
from dvkernels.launcher.job_description import HostSlots

__all__: list[str] = []

HELP = "start a program on several workers: here, or with the installed mpiexec or srun"
EXAMPLES = (
    ("four workers on this host", "python -m dvkernels launch -n 4 train.py --epochs 10"),
    ("a module; again after a failure", "python -m dvkernels launch --max-restarts 3 -m my.train"),
    ("two hosts, by MPI", "python -m dvkernels launch --hosts node1:2,node2:2 train.py"),
)

_HOST = re.compile(r"(?P<name>[^\s:,]+|\[[0-9a-fA-F:]+\])(?::(?P<count>[1-9][0-9]*))?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = "%(prog)s [-n N] [options] (script.py | -m module) [arguments]"
    parser.add_argument(
        "-n",
        "--num-workers",
        type=argument_types.positive,
        metavar="N",
        help="default: the sum of the counts of --hosts, the tasks of a Slurm job, or the number "
        "of usable cores",
    )
    parser.add_argument(
        "--hosts",
        metavar="A:2,B:2",
        help="hosts, and the number of workers on each; without counts they are spread evenly",
    )
    parser.add_argument(
        "-m", dest="is_module", action="store_true", help="the program is a module's name"
    )
    parser.add_argument(
        "--threads-per-worker",
        type=argument_types.positive,
        metavar="T",
        help="threads of BLAS, OpenMP and our kernels, unless OMP_NUM_THREADS etc. are set "
        "already; default: SLURM_CPUS_PER_TASK, or a worker's share of the cores",
    )
    parser.add_argument(
        "--bind",
        action=argparse.BooleanOptionalAction,
        help="bind each worker to its own cores; default: on this host, if there are enough",
    )
    parser.add_argument(
        "--prefix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start each line of output with the worker's number (default: yes)",
    )
    parser.add_argument(
        "--timeout",
        type=argument_types.seconds,
        default=math.inf,
        metavar="SECONDS",
        help="end the job after this time, restarts included, with status 124",
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
        help=f"start a failed job again, up to K times; {job_plan.ATTEMPT_VARIABLE} holds the "
        f"number of the attempt; the program itself has to load its newest checkpoint",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", commands.LOCAL.name, "mpi", "slurm"),
        default="auto",
        help="what starts the workers, and connects them: local needs nothing but this package; "
        "auto takes MPI, else Slurm, in their allocations or where hosts are named, else local",
    )
    parser.add_argument(
        "--launcher",
        metavar="PATH",
        help="mpiexec or srun; default: mpiexec of this environment or in PATH, else srun",
    )
    parser.add_argument(
        "--launcher-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="pass the launcher a further argument, as in --launcher-option=--mpi=pmi2 "
        "(repeatable)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command, quoted for a shell, and end"
    )
    parser.add_argument(
        "--json", action="store_true", help="with --dry-run: print command and variables as JSON"
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Start the workers and wait for them; return the job's exit status."""
    if arguments.json and not arguments.dry_run:
        raise LaunchError("--json needs --dry-run: what a job prints is what its program prints")
    launcher, flavour = _engine(arguments)
    job = job_plan.plan(
        flavour,
        arguments.program,
        os.environ,
        is_module=arguments.is_module,
        hosts=_hosts(arguments.hosts, arguments.num_workers),
        num_workers=arguments.num_workers,
        num_threads=arguments.threads_per_worker,
        bind=arguments.bind,
        prefixed=arguments.prefix,
        launcher_options=arguments.launcher_option,
    )
    if arguments.dry_run:
        added = commands.environment(job.num_threads, os.environ)
        with leaked_shm.host_group(job.num_workers, flavour is commands.LOCAL) as group:
            variables = added | group
        command = commands.command(launcher, flavour, job)
        assignments = [f"{name}={value}" for name, value in variables.items()]
        text = shlex.join(["env", *assignments, *command])
        about = {"environment": variables, "command": command}
        print(json.dumps(about) if arguments.json else text)
        return 0
    from dvkernels.launcher import attempts

    return attempts.run(
        launcher,
        flavour,
        job,
        os.environ,
        timeout_seconds=arguments.timeout,
        grace_seconds=arguments.grace,
        max_restarts=arguments.max_restarts,
    )


def _engine(arguments: argparse.Namespace) -> tuple[str, LauncherFlavour]:
    """Return the path and the kind of the launcher."""
    engine: str = arguments.engine
    if engine == "auto":
        is_named = arguments.launcher or arguments.launcher_option or arguments.hosts
        is_named = is_named or os.environ.get(simulated_hosts.VARIABLE)
        engine = "any" if is_named or job_plan.names_hosts(os.environ) else commands.LOCAL.name
    if engine == commands.LOCAL.name:
        if arguments.launcher:
            raise LaunchError("--engine local needs no --launcher; leave one of them out")
        return sys.executable, commands.LOCAL
    among = {"mpi": commands.MPI, "slurm": commands.SLURM}.get(
        engine, (*commands.MPI, *commands.SLURM)
    )
    launcher = commands.find(arguments.launcher, os.environ, among)
    return launcher, commands.flavour_of(launcher)


def _hosts(text: str | None, num_workers: int | None) -> tuple[HostSlots, ...]:
    """Parse ``a:2,b:2``, or ``a,b``, over which the workers are spread evenly."""
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
        raise LaunchError(f"--hosts: expected each host once; got {text!r}")
    if counted:
        hosts = tuple(HostSlots(name, int(count)) for name, count in found)
        total = sum(host.num_workers for host in hosts)
        if num_workers not in (None, total):
            raise LaunchError(f"--hosts: {text!r} counts {total} workers, but -n is {num_workers}")
        return hosts
    each, more = divmod(len(found) if num_workers is None else num_workers, len(found))
    counts = [each + (index < more) for index in range(len(found))]
    return tuple(
        HostSlots(name, count) for (name, _), count in zip(found, counts, strict=True) if count
    )
