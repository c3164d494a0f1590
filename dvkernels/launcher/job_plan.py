"""Plan of a job: how many workers start, on which hosts, with how many threads, bound or not."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence

from dvkernels.cluster import launcher_environment, slurm_counts
from dvkernels.devices import cpu
from dvkernels.errors import LaunchError
from dvkernels.launcher import commands
from dvkernels.launcher.commands import LauncherFlavour
from dvkernels.launcher.job_description import HostSlots, Job

__all__ = ["ATTEMPT_VARIABLE", "is_first_worker_local", "names_hosts", "plan"]

ATTEMPT_VARIABLE = "DVKERNELS_ATTEMPT"
# Set where the MPI Operator, a batch system or a user has named the hosts already.
_HOST_LIST_VARIABLES = (
    "OMPI_MCA_orte_default_hostfile",
    "PRTE_MCA_prte_default_hostfile",
    "HYDRA_HOST_FILE",
    "I_MPI_HYDRA_HOST_FILE",
    "SLURM_JOB_ID",
    "PBS_NODEFILE",
    "LSB_HOSTS",
    "PE_HOSTFILE",
)


def plan(
    flavour: LauncherFlavour,
    program: Sequence[str],
    environ: Mapping[str, str],
    *,
    is_module: bool = False,
    hosts: tuple[HostSlots, ...] = (),
    num_workers: int | None = None,
    num_threads: int | None = None,
    bind: bool | None = None,
    prefixed: bool = True,
    launcher_options: Sequence[str] = (),
) -> Job:
    """Plan a job for this host, its batch system and one kind of launcher.

    Parameters
    ----------
    flavour : LauncherFlavour
        The kind of launcher.
    program : sequence of str
        A script or, with ``is_module``, a module's name, and its arguments.
    environ : mapping
        The environment variables of this process.
    is_module : bool, optional
        Whether ``program`` names a module.
    hosts : tuple of HostSlots, optional
        The hosts and their workers; empty if the user named none.
    num_workers : int, optional
        Default: the workers of ``hosts``, the tasks of a Slurm job, or the usable cores.
    num_threads : int, optional
        Threads of a worker. Default: ``SLURM_CPUS_PER_TASK``, or a worker's share of the cores.
    bind : bool, optional
        Whether workers are bound to cores. Default: if all run on this host and fit on its cores.
    prefixed : bool, optional
        Whether each line of output starts with the worker's number.
    launcher_options : sequence of str, optional
        Further arguments of the launcher.

    Raises
    ------
    LaunchError
        There is no program, or binding needs more cores than there are.
    ClusterError
        A variable of Slurm is malformed.
    """
    cores = cpu.usable_cores()
    num_workers = sum(host.num_workers for host in hosts) or num_workers
    is_local = all(_is_this_host(host.name) for host in hosts)
    if flavour is commands.LOCAL:
        if not is_local or launcher_options:
            raise LaunchError(
                "--engine local starts the workers of this host, without a launcher: it takes no "
                "other --hosts and no --launcher-option; use --engine mpi or slurm"
            )
    elif not hosts:
        is_local = not names_hosts(environ)
    is_local = is_local and flavour.name != launcher_environment.SRUN
    if num_workers is None:
        num_workers = (None if flavour is commands.LOCAL else _slurm_tasks(environ)) or cores
    # The cores of other hosts are unknown: their workers compute their share themselves, unless
    # Slurm says how many cores a task has.
    if num_threads is None and "SLURM_CPUS_PER_TASK" in environ:
        num_threads = launcher_environment.number(environ, "SLURM_CPUS_PER_TASK", 1)
    if num_threads is None and is_local:
        num_threads = max(1, cores // num_workers)
    known = {**environ, **commands.environment(num_threads, environ)}
    fits = is_local and num_workers * (num_threads or 1) <= cores
    if bind and is_local and not fits:
        raise LaunchError(
            f"--bind: {num_workers} workers of {num_threads} threads need "
            f"{num_workers * (num_threads or 1)} cores, and {cores} may be used here; start fewer, "
            f"or leave --bind out"
        )
    return Job(
        program=_worker_command(program, is_module),
        num_workers=num_workers,
        hosts=hosts,
        num_threads=num_threads,
        bound=(fits or None) if bind is None else bind,
        is_local=is_local,
        oversubscribed=is_local and num_workers > cores,
        as_root=hasattr(os, "geteuid") and os.geteuid() == 0,
        prefixed=prefixed,
        exported_variables=(
            ATTEMPT_VARIABLE,
            *(name for name in commands.EXPORTED_VARIABLES if name in known),
        ),
        launcher_options=tuple(launcher_options),
    )


def names_hosts(environ: Mapping[str, str]) -> bool:
    """Return whether a batch system, an operator or a user has named the hosts of jobs."""
    return any(environ.get(name) for name in _HOST_LIST_VARIABLES)


def is_first_worker_local(job: Job) -> bool:
    """Return whether the first worker is known to run on this host."""
    return job.is_local or (bool(job.hosts) and _is_this_host(job.hosts[0].name))


def _slurm_tasks(environ: Mapping[str, str]) -> int | None:
    """Return the number of tasks of a Slurm job; None outside of one."""
    if "SLURM_NTASKS" in environ:
        return launcher_environment.number(environ, "SLURM_NTASKS", 1)
    name = "SLURM_TASKS_PER_NODE"  # alone, if the job asked for nodes instead of tasks
    return sum(slurm_counts.expand(name, environ[name])) if name in environ else None


def _worker_command(program: Sequence[str], is_module: bool) -> tuple[str, ...]:
    """Return the command that runs the program as a worker."""
    program = program[1:] if program[:1] == ["--"] else program
    if not program:
        raise LaunchError("launch: expected a script, or -m and a module; got nothing to start")
    if not is_module and not os.path.isfile(program[0]):
        raise LaunchError(f"launch: there is no file {program[0]!r} to start")
    module = ("-m",) if is_module else ()
    return (sys.executable, "-m", "dvkernels.launcher.worker", *module, *program)


def _is_this_host(name: str) -> bool:
    return name in ("localhost", "127.0.0.1", "[::1]", socket.gethostname())
