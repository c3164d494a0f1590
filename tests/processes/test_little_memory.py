"""Workers of a host with too little shared memory, as containers have by default."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from mpi_jobs import Job, needs_mpi

pytestmark = needs_mpi


@pytest.mark.parametrize("size", ["1m", "3m"])  # too little for MPICH itself, and for our segment
def test_too_little_shared_memory_is_an_error_not_a_signal(size):
    alone = ["unshare", "--mount", "sh", "-c"]
    small = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    if shutil.which("unshare") is None or subprocess.run([*alone, small, "-", "true"]).returncode:
        pytest.skip("this machine allows no mount namespaces")
    outcome = Job(2, "communicator_laws", 1, "as they are", prefix=[*alone, small, "-"]).wait(60)
    assert outcome.code != 0
    assert "ClusterError: 2 workers on " in outcome.written, outcome.written
    assert "/dev/shm has " in outcome.written
