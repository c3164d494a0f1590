"""Available shared memory of the host: the size of /dev/shm, where MPI allocates it on Linux.

Pages of /dev/shm are allocated on first touch, and a process that touches a page beyond its size
gets SIGBUS, so the size is checked first. Containers have 64 MiB by default.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dvkernels.cluster.launcher_environment import Environment
from dvkernels.cluster.resolver import ClusterResolver
from dvkernels.errors import ClusterError

__all__: list[str] = []

_MOUNT = Path("/dev/shm")  # MPICH, Open MPI and Intel MPI
REMEDY = (
    "make it larger (docker run --shm-size=1g; in Kubernetes an emptyDir with medium: Memory, "
    "mounted there)"
)
# The bytes per process that MPICH 5.0.2 needs in MPI_Init: its segment had 2.12 MB for 2 processes,
# 4.23 MB for 4 and 8.46 MB for 8. It allocates up to 5.4 MB more per process only if they are free,
# and so do Open MPI 5.0.11 and Intel MPI 2021.18.
_MPICH_NBYTES = 1_060_000


def free_nbytes() -> int:
    """Return the free bytes of /dev/shm; ``sys.maxsize`` where there is none."""
    return _measured()[0]


def check(host: str, num_workers: int, needed: int, found: int) -> None:
    """Raise ``ClusterError`` if the workers of a host need more bytes than it has free."""
    if needed > found:
        raise ClusterError(
            f"{num_workers} workers on {host} need {needed:,} bytes of shared memory, and "
            f"{_MOUNT} has {found:,}; {REMEDY}, or start fewer workers a host"
        )


def check_for_mpi(resolver: ClusterResolver, environ: Environment, host: str) -> None:
    """Raise ``ClusterError`` if MPI_Init of MPICH would crash for lack of shared memory.

    Compares with the total size, because some workers may have allocated their part already.
    """
    is_mpich = "PMI_RANK" in environ and not any(name.startswith("I_MPI_") for name in environ)
    if is_mpich and (num_workers := resolver.num_local_workers or 1) > 1:
        check(host, num_workers, num_workers * _MPICH_NBYTES, _measured()[1])


def _measured() -> tuple[int, int]:
    """Return the free and the total bytes of /dev/shm."""
    if not _MOUNT.is_dir():
        return sys.maxsize, sys.maxsize
    found = os.statvfs(_MOUNT)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
