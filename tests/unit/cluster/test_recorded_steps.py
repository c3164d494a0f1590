"""Resolvers on the recorded environments of Slurm 22.05.8 job steps on three nodes.

``slurm_steps.json`` was recorded in one allocation, from tasks of srun and from ranks that the
mpiexec of three MPIs started through srun. Each is held against the host that it ran on.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from dvkernels.cluster import MPIClusterResolver, SlurmClusterResolver, default_resolver

STEPS = json.loads(Path(__file__).with_name("slurm_steps.json").read_text(encoding="utf-8"))


@pytest.fixture(params=STEPS, ids=[step["command"] for step in STEPS])
def step(request):
    return request.param


def test_each_worker_is_found_once_and_on_its_host(step):
    hosts = [task["host"] for task in step["tasks"]]
    found = [default_resolver(task["environ"]) for task in step["tasks"]]
    assert sorted(worker.worker_id for worker in found) == list(range(len(hosts)))
    assert {worker.num_workers for worker in found} == {len(hosts)}
    assert [worker.num_local_workers for worker in found] == [Counter(hosts)[at] for at in hosts]
    places = {(at, worker.local_rank) for at, worker in zip(hosts, found, strict=True)}
    assert places == {(at, k) for at, count in Counter(hosts).items() for k in range(count)}


def test_the_launcher_is_named(step):
    kind = SlurmClusterResolver if step["command"].startswith("srun") else MPIClusterResolver
    assert {type(default_resolver(task["environ"])) for task in step["tasks"]} == {kind}
