"""Processes that form a host group: the laws of workers, and no endless wait, without MPI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid

import numpy as np
import psutil
import pytest
from host_jobs import outcome, run
from mpi_jobs import ROOT
from test_failures import COUNT, SECONDS, TOLD
from test_multi_worker import resumes_on_other_numbers, trains_as_one_device

MEMORY = "memory"
SHAPES = [(2, 1), (2, 2), (3, 1), (4, 1)]


def wide(*cases):
    return [pytest.param(*case, marks=pytest.mark.wide) for case in cases]


@pytest.mark.parametrize(
    ("program", "count", "num_local"),
    [
        ("variables", 3, 1),
        *wide(
            *((program, *shape)
            for program in ("communicator_laws", "strategy_laws", "variables", "own_memory")
            for shape in SHAPES)
        ),
    ],
)  # fmt: skip
def test_laws(program, count, num_local):
    run(count, program, num_local, MEMORY)


@pytest.mark.wide
@pytest.mark.parametrize(("count", "num_local"), SHAPES)
def test_training_is_that_of_one_device(count, num_local, tmp_path):
    trains_as_one_device(run, count, num_local, MEMORY, tmp_path)


@pytest.mark.wide
def test_a_checkpoint_resumes_on_another_number_of_workers(tmp_path):
    resumes_on_other_numbers(run, False, tmp_path)


@pytest.mark.wide
def test_random_draws_and_drift_and_algorithms(tmp_path):
    run(2, "drift", MEMORY)
    run(2, "large", MEMORY, 150_000_001)
    run(4, "random_draws", 1, MEMORY, tmp_path)
    drawn = json.loads((tmp_path / "drawn.json").read_text())
    run(2, "random_draws", 2, MEMORY, tmp_path)
    assert drawn == json.loads((tmp_path / "drawn.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(
    psutil.virtual_memory().available < 8 * 2**30, reason="needs 8 GiB of free memory"
)
def test_more_bytes_than_32_bits_count():
    run(2, "large", MEMORY, 2**31 + 5)


def fails(harm, seed, folder):
    """Let a worker come to harm; the others are told, and none is left."""
    victim = int(np.random.default_rng([seed]).integers(COUNT))
    codes, written = outcome(COUNT, "endure", MEMORY, harm, victim, seed, SECONDS, folder)
    kind, text = TOLD[harm]
    told = [path.read_text() for path in sorted(folder.glob("survivor_*"))]
    assert len(told) == COUNT - 1, written
    for line in told:
        assert kind in line, line
        assert text.format(victim=victim) in line, line
    expected = {"kill": -9, "stop": -9, "exit": 0}.get(harm, 1)
    assert codes[victim] == expected, written
    assert all(code == 1 for rank, code in enumerate(codes) if rank != victim), written


@pytest.mark.parametrize("harm", ["kill", *wide(*((harm,) for harm in TOLD if harm != "kill"))])
def test_survivors_are_told(harm, tmp_path):
    fails(harm, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("harm", TOLD)
@pytest.mark.parametrize("seed", range(100, 140))
def test_a_campaign(harm, seed, tmp_path):
    fails(harm, seed, tmp_path)


PAIR = """
import subprocess, sys

program = '''
import sys
import dvkernels as dv
group = dv.cluster.HostGroup(sys.argv[1], int(sys.argv[2]), 2, "secret")
with dv.MultiWorkerMirroredStrategy(group, devices=1, timeout_seconds=40) as made:
    ids = made.distribute_values_from_function(lambda c: c.replica_id_in_sync_group)
    print(f"sum {made.reduce('sum', ids)}")  # one piece: both write to one pipe
'''
path, *apart = sys.argv[1:]
commands = [[*apart * rank, sys.executable, "-c", program, path, str(rank)] for rank in (0, 1)]
children = [subprocess.Popen(command) for command in commands]
print([child.wait() for child in children])
"""


@pytest.mark.wide
@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], check=False).returncode,
    reason="this machine allows no namespaces",
)
@pytest.mark.parametrize(
    ("apart", "code", "text"),
    [
        (["unshare", "--mount"], 0, "sum 1"),
        (["unshare", "--pid", "--fork", "--mount-proc"], 1, "runs in another process namespace"),
        ([], 1, "2 processes need 3,174,400 bytes of shared memory, and /mnt has "),
    ],
)
def test_containers(apart, code, text):
    path = f"/dev/shm/dvkernels-test-{uuid.uuid4().hex}" if apart else "/mnt/group"
    mount = "true" if apart else "mount -t tmpfs -o size=2m tmpfs /mnt"
    words = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "-"]
    ended = subprocess.run(
        [*words, sys.executable, "-c", PAIR, path, *apart],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert ended.stdout.count(text) >= 2, ended.stdout
    assert f"[{code}, {code}]" in ended.stdout, ended.stdout
    assert not os.path.lexists(path)
