"""Memory that the processes of a host may share, where MPI takes it from on Linux.

It is taken when it is first touched, and a process that touches what is not there gets SIGBUS: so
it is looked at before. Containers have 64 MiB unless told more.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dvkernels.cluster.launcher_environment import Environment
from dvkernels.cluster.resolvers import ClusterResolver
from dvkernels.errors import ClusterError

__all__: list[str] = []

_PLACE = Path("/dev/shm")  # MPICH, Open MPI and Intel MPI
REMEDY = (
    "make it larger (docker run --shm-size=1g; in Kubernetes an emptyDir with medium: Memory, "
    "mounted there)"
)
# What MPICH 5.0.2 cannot do without in MPI_Init, of each process: its segment was of 2.12 MB for 2,
# of 4.23 for 4 and of 8.46 for 8. What it takes beside, up to 5.4 MB each, it takes where it is
# there; so do Open MPI 5.0.11 and Intel MPI 2021.18.
_MPICH_NBYTES = 1_060_000


def free_nbytes() -> int:
    """Return how much is left; more than there can be where nobody knows."""
    return _measured()[0]


def check(host: str, num_workers: int, needed: int, found: int) -> None:
    """Raise ``ClusterError`` if the workers of a host need more than was found there."""
    if needed > found:
        raise ClusterError(
            f"{num_workers} workers on {host} need {needed:,} bytes of shared memory, and "
            f"{_PLACE} has {found:,}; {REMEDY}, or start fewer workers a host"
        )


def check_for_mpi(resolver: ClusterResolver, environ: Environment, host: str) -> None:
    """Raise ``ClusterError`` if MPICH would not survive its own start.

    Held against the whole size: some workers may have taken their part already.
    """
    is_mpich = "PMI_RANK" in environ and not any(name.startswith("I_MPI_") for name in environ)
    if is_mpich and (num_workers := resolver.num_local_workers or 1) > 1:
        check(host, num_workers, num_workers * _MPICH_NBYTES, _measured()[1])


def _measured() -> tuple[int, int]:
    """Return how much is left, and how much there is."""
    if not _PLACE.is_dir():
        return sys.maxsize, sys.maxsize
    found = os.statvfs(_PLACE)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
