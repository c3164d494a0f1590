"""Command lines of the launchers: Open MPI, MPICH and Intel MPI (Hydra), srun, our local engine.

Nothing is started here, except the launcher for its version.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dvkernels.cluster import launcher_environment
from dvkernels.communicators.workers.mpi import network_model
from dvkernels.errors import LaunchError
from dvkernels.launcher import scancel
from dvkernels.launcher.job_description import HostSlots, Job

__all__ = [
    "EXPORTED_VARIABLES",
    "FLAVOURS",
    "LOCAL",
    "MPI",
    "SLURM",
    "LauncherFlavour",
    "command",
    "environment",
    "find",
    "flavour_of",
]

# Limit the threads of BLAS, OpenMP and our kernels in one process.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "DVKERNELS_NUM_THREADS",
)
# glibc gives the large arrays that a step frees back to the system, whose pages are zeroed again in
# the next step: a NumPy step of 3.7 ms took 7 to 9 ms. With these a process keeps up to 256 MiB.
# 32 MiB is the greatest size that glibc lets one keep for mmap; other libraries read neither.
_MEMORY_VARIABLES = {
    "MALLOC_TRIM_THRESHOLD_": str(256 * 1024 * 1024),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024 * 1024),
}
# A choice of the user's, which the two above would change in part.
_MEMORY_CHOICES = {*_MEMORY_VARIABLES, "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"}
# Workers on other hosts need these too.
EXPORTED_VARIABLES = (
    *_THREAD_VARIABLES,
    *_MEMORY_VARIABLES,
    network_model.VARIABLE,
    "PYTHONUNBUFFERED",
    "PYTHONPATH",
)
# The MPI Operator sets the names of Open MPI 4. Open MPI 5 ignores them, and would start all
# workers on this host.
_RENAMED_VARIABLES = {
    "OMPI_MCA_orte_default_hostfile": "PRTE_MCA_prte_default_hostfile",
    "OMPI_MCA_orte_keep_fqdn_hostnames": "PRTE_MCA_prte_keep_fqdn_hostnames",
}
MPI, SLURM = ("mpiexec", "mpirun"), ("srun",)  # names of launchers
_SECONDS_FOR_A_VERSION = 30
_PREFIX_SCRIPT = Path(__file__).with_name("prefix_output.py")
_LOCAL_ENGINE = Path(__file__).with_name("local_engine.py")
# Without site packages the interpreter starts in a few milliseconds.
_BARE = (sys.executable, "-I", "-S")


class LauncherFlavour(NamedTuple):
    """A kind of launcher: its arguments, its signals and its exit statuses."""

    name: str
    version: re.Pattern[str]  # found in the output of --version
    rank_variable: str  # in the environment of a worker
    arguments: Callable[[Job, Sequence[str]], list[str]]  # of a job and the command of a worker
    forwarded_signals: frozenset[signal.Signals]  # those that it passes on to the workers
    end_signal: signal.Signals  # makes it end the workers, whatever these do
    # Sends a signal that it does not pass on to all workers: given its path, its pid, the signal.
    send_signal: Callable[[str, int, signal.Signals], bool] | None = None
    # Statuses of a failure that with other launchers mean an orderly end from outside.
    failure_statuses: frozenset[int] = frozenset()
    # Whether it passes on an input of any size. Hydra ends jobs that read slower than it does.
    forwards_input: bool = True


def find(
    name: str | None, environ: Mapping[str, str], among: Sequence[str] = (*MPI, *SLURM)
) -> str:
    """Return the path of the launcher.

    Parameters
    ----------
    name : str or None
        A name or path; None for the first of ``among`` that exists. A name is looked up in the
        folder of the interpreter, where pip installs the MPI of mpi4py, and then in ``PATH``.
    environ : mapping
        The environment variables.

    Raises
    ------
    LaunchError
        No launcher was found.
    """
    own_folder = str(Path(sys.executable).parent)
    names = (name,) if name else among
    for program in names:
        for folders in (own_folder, environ.get("PATH", "")):
            path = shutil.which(program, path=folders)
            if path is not None:
                return path
    raise LaunchError(
        f"no launcher: none of {', '.join(names)} is in the folder of {sys.executable} or in "
        f"PATH; install an MPI (python -m pip install mpi4py mpich), name its mpiexec with "
        f"--launcher PATH, or use --engine local for workers of this host"
    )


def flavour_of(launcher: str) -> LauncherFlavour:
    """Return the kind of a launcher, which is asked for its version.

    Raises
    ------
    LaunchError
        The launcher gives no answer, or is of no known kind.
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
        f"{launcher} is of no known kind ({known}): its version reads {first[0]!r}; name another "
        f"launcher with --launcher PATH"
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
        worker = [*_BARE, str(_PREFIX_SCRIPT), flavour.rank_variable, *worker]
    return [launcher, *flavour.arguments(job, worker)]


def environment(num_threads: int | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that workers get in addition to those of ``environ``, which win."""
    threads = {} if num_threads is None else dict.fromkeys(_THREAD_VARIABLES, str(num_threads))
    # Unbuffered: lines appear when they are printed, and a crash loses none of them.
    memory = {} if _MEMORY_CHOICES & environ.keys() else _MEMORY_VARIABLES
    added = {"PYTHONUNBUFFERED": "1", **memory, **threads}
    added |= {new: environ[old] for old, new in _RENAMED_VARIABLES.items() if old in environ}
    return {name: value for name, value in added.items() if name not in environ}


def _open_mpi(job: Job, worker: Sequence[str]) -> list[str]:
    arguments = ["-n", str(job.num_workers)]
    if job.as_root:
        arguments += ["--allow-run-as-root"]
    if job.hosts:
        arguments += ["--host", _host_list(job.hosts)]
    # Open MPI exports to other hosts only the variables that -x names.
    for name in job.exported_variables:
        arguments += ["-x", name]
    # Affinity and quota count logical cores, hence HWTCPUS. OVERSUBSCRIBE makes waiting workers
    # yield the core, which costs time where each worker has a core of its own.
    if job.oversubscribed:
        arguments += ["--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
    elif job.bound:
        threads = job.num_threads or 1
        arguments += ["--map-by", f"slot:PE={threads}:HWTCPUS", "--bind-to", "hwthread"]
    else:
        arguments += ["--map-by", "slot:HWTCPUS", "--bind-to", "none"]
    return [*arguments, *job.launcher_options, *worker]


def _hydra(job: Job, worker: Sequence[str]) -> list[str]:
    arguments = ["-n", str(job.num_workers)]
    if job.hosts:
        arguments = ["-hosts", _host_list(job.hosts), *arguments]
    binding = f"hwthread:{job.num_threads or 1}" if job.bound else "none"
    return [*arguments, "-bind-to", binding, *job.launcher_options, *worker]


def _intel(job: Job, worker: Sequence[str]) -> list[str]:
    # Intel MPI binds by default, even where there are fewer cores than workers.
    pinning = f"I_MPI_PIN_DOMAIN {job.num_threads or 1}" if job.bound else "I_MPI_PIN 0"
    arguments = ["-genv", *pinning.split(), *job.launcher_options]
    if not job.hosts:
        return [*arguments, "-n", str(job.num_workers), *worker]
    # Intel MPI ignores the counts of a host list, so each host gets an argument set of its own.
    for index, host in enumerate(job.hosts):
        arguments += [":"] if index else []
        arguments += ["-host", host.name, "-n", str(host.num_workers), *worker]
    return arguments


def _srun(job: Job, worker: Sequence[str]) -> list[str]:
    arguments = [f"--ntasks={job.num_workers}", "--kill-on-bad-exit=1"]
    if job.hosts:
        counts = {host.num_workers for host in job.hosts}
        if len(counts) > 1:
            raise LaunchError(
                f"srun starts the same number of workers on every host; got "
                f"{_host_list(job.hosts)}: give equal counts"
            )
        arguments += [f"--nodelist={','.join(host.name for host in job.hosts)}"]
        arguments += [f"--ntasks-per-node={counts.pop()}"]
    if job.num_threads is not None:
        arguments += [f"--cpus-per-task={job.num_threads}"]
    if job.bound is not None:
        arguments += [f"--cpu-bind={'cores' if job.bound else 'none'}"]
    return [*arguments, *job.launcher_options, *worker]


def _local(job: Job, worker: Sequence[str]) -> list[str]:
    num_cores = (job.num_threads or 1) if job.bound else 0
    return [*_BARE[1:], str(_LOCAL_ENGINE), str(job.num_workers), str(num_cores), *worker]


def _host_list(hosts: Sequence[HostSlots]) -> str:
    return ",".join(f"{host.name}:{host.num_workers}" for host in hosts)


LOCAL = LauncherFlavour(
    launcher_environment.LOCAL,
    re.compile(r"(?!)"),  # it is not asked
    launcher_environment.RANK,
    _local,
    frozenset(),
    signal.SIGTERM,
)

_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})

FLAVOURS = (
    LauncherFlavour(
        "Open MPI",
        re.compile(r"\(Open ?MPI\)|\(OpenRTE\)|\(PRRTE\)|Open MPI"),
        "OMPI_COMM_WORLD_RANK",
        _open_mpi,
        # A quarter of a second after SIGINT or SIGTERM it kills the workers.
        _SIGNALS - {signal.SIGINT, signal.SIGTERM},
        signal.SIGTERM,
    ),
    LauncherFlavour(
        "Intel MPI",
        re.compile(r"Intel\(R\) MPI Library"),
        "PMI_RANK",
        _intel,
        _SIGNALS,
        signal.SIGKILL,
        forwards_input=False,
    ),
    LauncherFlavour(
        "MPICH",
        re.compile(r"HYDRA build details"),
        "PMI_RANK",
        _hydra,
        _SIGNALS,
        signal.SIGKILL,
        forwards_input=False,
    ),
    LauncherFlavour(
        "srun",
        re.compile(r"^slurm", re.MULTILINE),
        "SLURM_PROCID",
        _srun,
        # At SIGTERM it kills the tasks, at SIGINT it prints their state.
        _SIGNALS - {signal.SIGINT, signal.SIGTERM},
        signal.SIGTERM,  # SIGKILL would leave the tasks behind
        scancel.send,
        # If a worker fails it ends the others by SIGTERM, and returns the largest status.
        failure_statuses=frozenset({128 + signal.SIGTERM}),
    ),
)
