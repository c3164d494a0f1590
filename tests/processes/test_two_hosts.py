"""Simulated hosts with a network: two with two workers each, and three."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from mpi_jobs import Job, is_open_mpi, launcher_says, needs_mpi
from network_hosts import Hosts, joined
from worker_programs import trained

import dvkernels as dv

pytestmark = needs_mpi


@pytest.fixture
def join(tmp_path):
    if "HYDRA" not in launcher_says() and not is_open_mpi():
        pytest.skip("needs an mpiexec that is known to start processes by any command")
    with contextlib.ExitStack() as stack:
        yield lambda *counts: stack.enter_context(joined(tmp_path, is_open_mpi(), *counts))


@pytest.fixture
def hosts(join):
    return join()


@pytest.fixture
def run(hosts):
    return lambda *words: run_on(hosts, 4, *words)


def run_on(hosts: Hosts, count: int, *words: object) -> None:
    outcome = Job(count, *words, prefix=hosts.prefix, options=hosts.options).wait()
    assert outcome.code == 0, outcome.written


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


def test_each_byte_passes_the_network_once_per_host_not_per_worker(hosts, run):
    nbytes = 40_000_001
    before = hosts.sent_nbytes()
    run("large", "as they are", nbytes)
    for sent, was in zip(hosts.sent_nbytes(), before, strict=True):
        # 2 (H - 1)/H of the array, and what frames, acknowledgements and the start come to.
        assert nbytes < sent - was < 1.3 * nbytes


@pytest.mark.parametrize("ops", ["direct", "ring"])
def test_the_laws_hold_between_three_hosts(join, ops):
    run_on(join(3, 1), 3, "communicator_laws", 1, "as they are", ops)


@pytest.mark.parametrize("ops", ["direct", "ring"])
def test_a_slow_network_that_loses_packets(join, ops):
    hosts = join(3, 1)
    hosts.limit(megabits=200, queue_nbytes=60_000)
    run_on(hosts, 3, "large", "as they are", 2_000_001, ops)


@pytest.mark.parametrize("ops", ["direct", "ring"])
def test_each_of_three_hosts_sends_four_thirds_of_the_array(join, ops):
    hosts, nbytes = join(3, 1), 30_000_001
    before = hosts.sent_nbytes()
    run_on(hosts, 3, "large", "as they are", nbytes, ops)
    for sent, was in zip(hosts.sent_nbytes(), before, strict=True):
        assert 4 / 3 * nbytes < sent - was < 1.3 * 4 / 3 * nbytes


def test_a_worker_that_stops_is_named_by_workers_of_other_hosts(hosts, tmp_path):
    words = ("endure", "as they are", "stop", 3, 1, 3.0, tmp_path)
    outcome = Job(4, *words, prefix=hosts.prefix, options=hosts.options).wait(60)
    told = [path.read_text() for path in sorted(tmp_path.glob("survivor_*"))]
    assert len(told) == 3, outcome.written
    assert all("CollectiveTimeoutError: " in one for one in told), told
    assert all("in vain for workers [3]" in one for one in told), told
