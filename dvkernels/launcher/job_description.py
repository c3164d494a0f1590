"""Description of a job to start: a program, its workers, their hosts, threads and binding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["HostSlots", "Job"]


class HostSlots(NamedTuple):
    """A host and its number of workers."""

    name: str
    num_workers: int


@dataclass(frozen=True)
class Job:
    """A job to start: a program, its workers, their hosts, threads and binding.

    Attributes
    ----------
    program : tuple of str
        The command of each worker.
    num_workers : int
        Number of workers.
    hosts : tuple of HostSlots
        The hosts; empty where the launcher decides: this host, unless a batch system names others.
    num_threads : int or None
        Threads of each worker; None for the worker's own choice.
    bound : bool or None
        Whether each worker is bound to as many cores as it has threads. None for the launcher's
        default: Slurm binds tasks to their allocation, the others bind nothing.
    is_local : bool
        Whether all workers are known to run on this host.
    oversubscribed : bool
        Whether there are more workers than cores.
    as_root : bool
        Whether the superuser starts the job.
    prefixed : bool
        Whether each line that a worker prints starts with its number.
    exported_variables : tuple of str
        Names of the environment variables that workers on other hosts need too.
    launcher_options : tuple of str
        Further arguments of the launcher.
    """

    program: tuple[str, ...]
    num_workers: int
    hosts: tuple[HostSlots, ...] = ()
    num_threads: int | None = None
    bound: bool | None = False
    is_local: bool = False
    oversubscribed: bool = False
    as_root: bool = False
    prefixed: bool = True
    exported_variables: tuple[str, ...] = ()
    launcher_options: tuple[str, ...] = ()
