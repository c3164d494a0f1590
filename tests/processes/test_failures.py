"""A worker fails at any moment: every other worker raises an error, and no process is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mpi_jobs import Job, is_open_mpi, needs_mpi

pytestmark = needs_mpi
COUNT, SECONDS = 3, 3.0
# The error class and text of survivors.
TOLD = {
    "raise": ("StepEnded: ", "worker {victim} raised RuntimeError: of the victim"),
    "mismatch": ("CollectiveMismatchError: ", "worker {victim} called all_gather("),
    "exit": ("WorkerLostError: ", "worker {victim} is lost while"),
    "stop": ("CollectiveTimeoutError: ", "in vain for workers [{victim}]"),
    "kill": ("WorkerLostError: ", "worker {victim} is lost while"),
}


def check(
    over: str,
    harm: str,
    seed: int,
    folder: Path,
    options: list[str] | None = None,
    ops: str = "auto",
) -> None:
    victim = int(np.random.default_rng([seed]).integers(COUNT))
    job = Job(COUNT, "endure", over, harm, victim, seed, SECONDS, folder, ops, options=options)
    outcome = job.wait(60)
    kind, text = TOLD[harm]
    told = [path.read_text() for path in sorted(folder.glob("survivor_*"))]
    if harm == "kill" and options is None:  # the launcher may end all processes before they write
        assert outcome.code != 0, outcome.written
        return
    assert len(told) == COUNT - 1, outcome.written
    assert outcome.code != 0 or harm == "exit" or options, outcome.written
    for line in told:
        assert kind in line, outcome.written
        if harm != "kill" or over == "memory":  # else MPI may not name the lost worker
            assert text.format(victim=victim) in line, outcome.written


OVER = pytest.mark.parametrize("over", ["memory", "1,1,1", "2,1"])


@OVER
@pytest.mark.parametrize("harm", TOLD)
def test_survivors_are_told(over, harm, tmp_path):
    check(over, harm, 1, tmp_path)


@pytest.mark.parametrize("over", ["2,1"])
@pytest.mark.parametrize("harm", TOLD)
def test_survivors_of_a_ring_are_told(over, harm, tmp_path):
    check(over, harm, 3, tmp_path, ops="ring")


@pytest.mark.parametrize("over", ["memory", "1,1"])
def test_nccl_on_one_worker_and_an_abort_are_errors_on_all(over):
    outcome = Job(2, "mismatched_nccl", over).wait(60)
    assert outcome.code != 0  # the group was aborted, and with it the job
    assert "Traceback" not in outcome.written, outcome.written


@pytest.mark.skipif(not is_open_mpi(), reason="MPICH ends a job of which a process is killed")
@OVER
def test_survivors_that_the_launcher_leaves_alone(over, tmp_path):
    check(over, "kill", 2, tmp_path, ["--with-ft", "ulfm"])


@pytest.mark.skipif(not is_open_mpi(), reason="MPICH ends a job of which a process is killed")
@pytest.mark.parametrize("over", ["1,1,1"])
def test_survivors_of_a_ring_that_the_launcher_leaves_alone(over, tmp_path):
    check(over, "kill", 2, tmp_path, ["--with-ft", "ulfm"], "ring")


@pytest.mark.slow
@OVER
@pytest.mark.parametrize("harm", TOLD)
@pytest.mark.parametrize("seed", range(100, 120))
def test_a_campaign(over, harm, seed, tmp_path):
    check(over, harm, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("over", ["1,1,1", "2,1"])
@pytest.mark.parametrize("harm", TOLD)
@pytest.mark.parametrize("seed", range(200, 210))
def test_a_campaign_around_rings(over, harm, seed, tmp_path):
    check(over, harm, seed, tmp_path, ops="ring")
