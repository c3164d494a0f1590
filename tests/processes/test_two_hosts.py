"""Two hosts with two workers each, and a network between them."""

from __future__ import annotations

import numpy as np
import pytest
from mpi_jobs import Job, is_open_mpi, launcher_says, needs_mpi
from network_hosts import joined
from worker_programs import trained

import dvkernels as dv

pytestmark = needs_mpi


@pytest.fixture
def hosts(tmp_path):
    if "HYDRA" not in launcher_says() and not is_open_mpi():
        pytest.skip("needs an mpiexec that is known to start processes by any command")
    with joined(tmp_path, is_open_mpi()) as found:
        yield found


@pytest.fixture
def run(hosts):
    def run(program: str, *args: object) -> None:
        outcome = Job(4, program, *args, prefix=hosts.prefix, options=hosts.options).wait()
        assert outcome.code == 0, outcome.written

    return run


def test_the_laws_hold(run):
    run("communicator_laws", 1, "as they are")


def test_training_is_that_of_one_device(run, tmp_path):
    run("train", 1, "as they are", tmp_path / "weights.npz")
    expected, seen = trained(dv.OneDeviceStrategy("cpu:0"))
    found = np.load(tmp_path / "weights.npz")
    assert found["seen"].tolist() == seen
    for name, right in expected.items():
        difference = np.linalg.norm(found[name] - right) / np.linalg.norm(right)
        assert difference <= 1e-9, name


def test_each_byte_passes_once_between_hosts_and_not_once_a_worker(hosts, run):
    nbytes = 40_000_001
    before = hosts.sent_nbytes()
    run("large", "as they are", nbytes)
    for sent, was in zip(hosts.sent_nbytes(), before, strict=True):
        # 2 (H - 1)/H of the array, and what frames, acknowledgements and the start come to.
        assert nbytes < sent - was < 1.3 * nbytes


def test_a_worker_that_stops_is_named_over_the_network(hosts, tmp_path):
    words = ("endure", "as they are", "stop", 3, 1, 3.0, tmp_path)
    outcome = Job(4, *words, prefix=hosts.prefix, options=hosts.options).wait(60)
    told = [path.read_text() for path in sorted(tmp_path.glob("survivor_*"))]
    assert len(told) == 3, outcome.written
    assert all("CollectiveTimeoutError: " in one for one in told), told
    assert all("in vain for workers [3]" in one for one in told), told
