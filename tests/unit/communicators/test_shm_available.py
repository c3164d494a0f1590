"""Too little shared memory is an error of this package, before a process touches it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from dvkernels.cluster import MPIClusterResolver
from dvkernels.communicators.workers.shm import available
from dvkernels.errors import ClusterError

HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "64", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "64"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "64",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "64",
}  # fmt: skip


def have(monkeypatch, nbytes: int, left: int) -> None:
    found = SimpleNamespace(f_frsize=1024, f_bavail=left // 1024, f_blocks=nbytes // 1024)
    monkeypatch.setattr(os, "statvfs", lambda path: found)
    monkeypatch.setattr(type(available._MOUNT), "is_dir", lambda path: True)


def check(environ: dict[str, str]) -> None:
    available.check_for_mpi(MPIClusterResolver(environ=environ), environ, "n1")


def test_mpich_is_not_started_where_its_own_segment_does_not_fit(monkeypatch):
    have(monkeypatch, 64 << 20, 64 << 20)  # the default of containers
    message = "64 workers on n1 need 67,840,000 bytes .* /dev/shm has 67,108,864; make it larger"
    with pytest.raises(ClusterError, match=message):
        check(HYDRA)


def test_memory_that_other_workers_have_taken_counts_as_free(monkeypatch):
    have(monkeypatch, 128 << 20, 1 << 20)
    check(HYDRA)
    assert available.free_nbytes() == 1 << 20


@pytest.mark.parametrize("environ", [OPEN_MPI, {**HYDRA, "I_MPI_HYDRA_UUID": "4"}])
def test_other_mpis_start_with_little_memory(monkeypatch, environ):
    have(monkeypatch, 1 << 20, 1 << 20)
    check(environ)


def test_an_unknown_size_is_accepted(monkeypatch):
    monkeypatch.setattr(type(available._MOUNT), "is_dir", lambda path: False)
    check(HYDRA)
    available.check("n1", 64, 1 << 40, available.free_nbytes())
