"""The launchers that may be installed, and the command by which each starts a job's workers.

Nothing here starts anything, but for asking a launcher for its version.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dvkernels.communicators.workers.mpi import network_model
from dvkernels.errors import LaunchError
from dvkernels.launcher import slurm_signals

__all__ = [
    "FLAVOURS",
    "KEPT",
    "HostSlots",
    "Job",
    "LauncherFlavour",
    "command",
    "environment",
    "find",
    "flavour_of",
]

# What limits the threads of BLAS and OpenMP, and of our kernels, in one process.
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "DVKERNELS_NUM_THREADS",
)
# What workers on other hosts must have too.
KEPT = (*_THREADS, network_model.VARIABLE, "PYTHONUNBUFFERED", "PYTHONPATH")
# The MPI Operator names the hosts in words that Open MPI 5 does not heed: all workers were here.
_RENAMED = {
    "OMPI_MCA_orte_default_hostfile": "PRTE_MCA_prte_default_hostfile",
    "OMPI_MCA_orte_keep_fqdn_hostnames": "PRTE_MCA_prte_keep_fqdn_hostnames",
}
_SECONDS_FOR_A_VERSION = 30
_RELAY = Path(__file__).with_name("prefix_output.py")


class HostSlots(NamedTuple):
    """A host, and how many workers go there."""

    name: str
    num_workers: int


@dataclass(frozen=True)
class Job:
    """What is to be started.

    Attributes
    ----------
    program : tuple of str
        The command of each worker.
    num_workers : int
        How many there are.
    hosts : tuple of Host
        Where; empty where the launcher decides, which is here unless a batch system says more.
    num_threads : int or None
        How many threads each worker is to use; None for its own choice.
    bound : bool or None
        Whether each worker is bound to as many cores as it has threads; None where nobody asked:
        Slurm binds tasks to what they were given, the others bind nothing.
    is_here : bool
        Whether it is known that all of them go to this host.
    crowded : bool
        Whether there are more workers than cores.
    as_root : bool
        Whether the superuser starts it.
    prefixed : bool
        Whether each line that a worker prints starts with its number.
    variables : tuple of str
        The variables that workers on other hosts must have too.
    options : tuple of str
        What else the launcher is told.
    """

    program: tuple[str, ...]
    num_workers: int
    hosts: tuple[HostSlots, ...] = ()
    num_threads: int | None = None
    bound: bool | None = False
    is_here: bool = False
    crowded: bool = False
    as_root: bool = False
    prefixed: bool = True
    variables: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class LauncherFlavour(NamedTuple):
    """How one kind of launcher is used."""

    name: str
    version: re.Pattern[str]  # found in what it says of its version
    rank_variable: str
    arguments: Callable[[Job, Sequence[str]], list[str]]  # of a job, and the command of a worker
    forwarded: frozenset[signal.Signals]  # the signals that it hands on to the workers
    ended_by: signal.Signals  # what makes it end the workers, whatever these do
    # brings a signal that it does not hand on to all workers: given its path, process, the signal
    sent: Callable[[str, int, signal.Signals], bool] | None = None
    # statuses that tell of a failure, and of an orderly end from outside with the others
    failures: frozenset[int] = frozenset()
    # whether it hands on an input of any size; Hydra ends jobs that do not read as fast as it does
    feeds: bool = True


def find(name: str | None, environ: Mapping[str, str]) -> str:
    """Return the path of the launcher.

    Parameters
    ----------
    name : str or None
        A name or path; None for ``mpiexec``, or else ``srun``. A name is looked for beside the
        interpreter, where the MPI that mpi4py was installed with lies, and then in ``PATH``.
    environ : mapping
        The variables.

    Raises
    ------
    LaunchError
        There is none.
    """
    names = (name,) if name else ("mpiexec", "mpirun", "srun")
    beside = str(Path(sys.executable).parent)
    for wanted in names:
        for place in (beside, environ.get("PATH", "")):
            path = shutil.which(wanted, path=place)
            if path is not None:
                return path
    raise LaunchError(
        f"no launcher: none of {', '.join(names)} lies beside {sys.executable} or in PATH; install "
        f"an MPI (python -m pip install mpi4py mpich), or name its mpiexec with --launcher PATH"
    )


def flavour_of(launcher: str) -> LauncherFlavour:
    """Ask a launcher for its version, and return what kind it is.

    Raises
    ------
    LaunchError
        It gives no answer, or is of no known kind.
    """
    try:
        answer = subprocess.run(
            [launcher, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_SECONDS_FOR_A_VERSION,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{launcher} --version: {error}") from None
    for flavour in FLAVOURS:
        if flavour.version.search(answer):
            return flavour
    known = ", ".join(flavour.name for flavour in FLAVOURS)
    first = answer.strip().splitlines()[:1] or ["nothing"]
    raise LaunchError(
        f"{launcher} is of no known kind ({known}): asked for its version it says {first[0]!r}; "
        f"name another one with --launcher PATH"
    )


def command(launcher: str, flavour: LauncherFlavour, job: Job) -> list[str]:
    """Return the command that starts a job.

    Raises
    ------
    LaunchError
        This kind of launcher cannot start such a job.
    """
    worker = list(job.program)
    if job.prefixed:
        # Without site packages it starts in a few milliseconds.
        relay = [sys.executable, "-I", "-S", str(_RELAY), flavour.rank_variable]
        worker = [*relay, *worker]
    return [launcher, *flavour.arguments(job, worker)]


def environment(num_threads: int | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that workers get beside those of ``environ``, which win."""
    threads = {} if num_threads is None else dict.fromkeys(_THREADS, str(num_threads))
    # Lines come when they are printed, and what was printed before a crash is not lost.
    added = {"PYTHONUNBUFFERED": "1", **threads}
    added |= {new: environ[old] for old, new in _RENAMED.items() if old in environ}
    return {name: value for name, value in added.items() if name not in environ}


def _open_mpi(job: Job, worker: Sequence[str]) -> list[str]:
    words = ["-n", str(job.num_workers)]
    if job.as_root:
        words += ["--allow-run-as-root"]
    if job.hosts:
        words += ["--host", _with_counts(job.hosts)]
    # It hands on no variables to other hosts but those that it is told to.
    for name in job.variables:
        words += ["-x", name]
    # Logical cores count: those are what affinity and quota speak of. Told of more workers than
    # cores it lets go of the core while it waits, which costs time where each has its own.
    if job.crowded:
        words += ["--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
    elif job.bound:
        threads = job.num_threads or 1
        words += ["--map-by", f"slot:PE={threads}:HWTCPUS", "--bind-to", "hwthread"]
    else:
        words += ["--map-by", "slot:HWTCPUS", "--bind-to", "none"]
    return [*words, *job.options, *worker]


def _hydra(job: Job, worker: Sequence[str]) -> list[str]:
    words = ["-n", str(job.num_workers)]
    if job.hosts:
        words = ["-hosts", _with_counts(job.hosts), *words]
    binding = f"hwthread:{job.num_threads or 1}" if job.bound else "none"
    return [*words, "-bind-to", binding, *job.options, *worker]


def _intel(job: Job, worker: Sequence[str]) -> list[str]:
    # By itself it binds, also where there are fewer cores than workers.
    pinning = f"I_MPI_PIN_DOMAIN {job.num_threads or 1}" if job.bound else "I_MPI_PIN 0"
    words = ["-genv", *pinning.split(), *job.options]
    if not job.hosts:
        return [*words, "-n", str(job.num_workers), *worker]
    # It does not heed the counts of a list of hosts. But it starts a part of a job on a host.
    for place, host in enumerate(job.hosts):
        words += [":"] if place else []
        words += ["-host", host.name, "-n", str(host.num_workers), *worker]
    return words


def _srun(job: Job, worker: Sequence[str]) -> list[str]:
    words = [f"--ntasks={job.num_workers}", "--kill-on-bad-exit=1"]
    if job.hosts:
        counts = {host.num_workers for host in job.hosts}
        if len(counts) > 1:
            raise LaunchError(
                f"srun starts as many workers on every host; got {_with_counts(job.hosts)}: give "
                f"equal counts"
            )
        words += [f"--nodelist={','.join(host.name for host in job.hosts)}"]
        words += [f"--ntasks-per-node={counts.pop()}"]
    if job.num_threads is not None:
        words += [f"--cpus-per-task={job.num_threads}"]
    if job.bound is not None:
        words += [f"--cpu-bind={'cores' if job.bound else 'none'}"]
    return [*words, *job.options, *worker]


def _with_counts(hosts: Sequence[HostSlots]) -> str:
    return ",".join(f"{host.name}:{host.num_workers}" for host in hosts)


_ALL = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})

FLAVOURS = (
    LauncherFlavour(
        "Open MPI",
        re.compile(r"\(Open ?MPI\)|\(OpenRTE\)|\(PRRTE\)|Open MPI"),
        "OMPI_COMM_WORLD_RANK",
        _open_mpi,
        # A quarter of a second after these two it kills the workers.
        _ALL - {signal.SIGINT, signal.SIGTERM},
        signal.SIGTERM,
    ),
    LauncherFlavour(
        "Intel MPI",
        re.compile(r"Intel\(R\) MPI Library"),
        "PMI_RANK",
        _intel,
        _ALL,
        signal.SIGKILL,
        feeds=False,
    ),
    LauncherFlavour(
        "MPICH",
        re.compile(r"HYDRA build details"),
        "PMI_RANK",
        _hydra,
        _ALL,
        signal.SIGKILL,
        feeds=False,
    ),
    LauncherFlavour(
        "srun",
        re.compile(r"^slurm", re.MULTILINE),
        "SLURM_PROCID",
        _srun,
        # At the other two it does what it wants: it kills the tasks, or says how they are.
        _ALL - {signal.SIGINT, signal.SIGTERM},
        signal.SIGTERM,  # killed itself, it would leave the tasks behind
        slurm_signals.send,
        # If a worker fails it ends the others by SIGTERM, and tells the largest status.
        failures=frozenset({128 + signal.SIGTERM}),
    ),
)
