"""A worker comes to harm at any moment: every other one is told so, and no process is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mpi_jobs import Job, is_open_mpi, needs_mpi

pytestmark = needs_mpi
COUNT, SECONDS = 3, 3.0
# What survivors must raise, and say.
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
    program: str = "endure",
) -> None:
    victim = int(np.random.default_rng([seed]).integers(COUNT))
    job = Job(COUNT, program, over, harm, victim, seed, SECONDS, folder, options=options)
    outcome = job.wait(60)
    kind, text = TOLD[harm]
    told = [path.read_text() for path in sorted(folder.glob("survivor_*"))]
    if harm == "kill" and options is None:  # the launcher may end all before they can say a word
        assert outcome.code != 0, outcome.written
        return
    assert len(told) == COUNT - 1, outcome.written
    assert outcome.code != 0 or harm == "exit" or options, outcome.written
    for line in told:
        assert kind in line, outcome.written
        if harm != "kill" or over == "memory":  # else MPI says who, or that somebody is lost
            assert text.format(victim=victim) in line, outcome.written


OVER = pytest.mark.parametrize("over", ["memory", "1,1,1", "2,1"])


@OVER
@pytest.mark.parametrize("harm", TOLD)
def test_survivors_are_told(over, harm, tmp_path):
    check(over, harm, 1, tmp_path)


@pytest.mark.parametrize("over", ["memory", "1,1"])
def test_all_hear_of_nccl_that_one_lacks_and_of_an_end(over):
    outcome = Job(2, "asks_for_nccl", over).wait(60)
    assert outcome.code != 0  # the group has ended, and with it the job
    assert "Traceback" not in outcome.written, outcome.written


@pytest.mark.skipif(not is_open_mpi(), reason="MPICH ends a job of which a process is killed")
@OVER
def test_survivors_that_the_launcher_leaves_alone(over, tmp_path):
    check(over, "kill", 2, tmp_path, ["--with-ft", "ulfm"])


@OVER
@pytest.mark.parametrize(
    ("harm", "options"),
    [
        ("stop", None),
        pytest.param("kill", ["--with-ft", "ulfm"], marks=pytest.mark.skipif(
            not is_open_mpi(), reason="MPICH ends a job of which a process is killed"
        )),
    ],
)  # fmt: skip
def test_survivors_on_gpus_are_told(over, harm, options, tmp_path):
    check(over, harm, 1, tmp_path, options, "endure_straight")


@pytest.mark.slow
@OVER
@pytest.mark.parametrize("harm", TOLD)
@pytest.mark.parametrize("seed", range(100, 120))
def test_a_campaign(over, harm, seed, tmp_path):
    check(over, harm, seed, tmp_path)
