"""A worker fails during a save: the others raise an error, and a whole checkpoint is left."""

from __future__ import annotations

import numpy as np
import pytest
from mpi_jobs import Job, is_open_mpi, needs_mpi, run

pytestmark = needs_mpi
COUNT, SECONDS = 3, 3.0
OVER = pytest.mark.parametrize("over", ["memory", "1,1,1", "2,1"])
# The error class and texts of survivors.
TOLD = {
    "full": ("CheckpointError: ", "worker {victim} of 3 failed: ", "worker {victim} raised "),
    "stop": ("CollectiveTimeoutError: ", "in vain for workers [{victim}]"),
    "kill": ("WorkerLostError: ", "worker {victim} is lost while"),
}


def check(over, harm, seed, folder, options=None):
    rng = np.random.default_rng([seed])
    # The worst first: the worker that holds the lock and renames; about 15 operations a save.
    victim, number = seed % COUNT, int(rng.integers(1, 60))
    job = Job(COUNT, "save_in_harm", over, harm, victim, number, SECONDS, folder, options=options)
    outcome = job.wait(60)
    told = {path.name: path.read_text() for path in folder.glob("told_*")}
    survivors = [text for name, text in told.items() if name != f"told_{victim}"]
    assert outcome.code != 0 or options, outcome.written
    if harm != "kill" or options:  # else the launcher may end all processes before they write
        assert len(survivors) == COUNT - 1, outcome.written
    kind, *words = TOLD[harm]
    for text in survivors:
        assert kind in text, outcome.written
        if harm != "kill" or over == "memory":  # else MPI may not name the lost worker
            assert any(one.format(victim=victim) in text for one in words), text
    saved = int((folder / "saved").read_text()) if (folder / "saved").exists() else 0
    run(
        2, "save_in_harm", "memory", "none", 0, 0, 60.0, folder
    )  # other workers resume, and clean up
    found = int((folder / "found").read_text())
    assert found in (saved, saved + 1), (
        "the last whole checkpoint: renamed, and perhaps not reported yet"
    )
    saved = found + 1
    left = {path.name for path in folder.iterdir() if path.name.startswith(("step", "."))}
    assert left == {f"step-{step:08d}" for step in (saved - 1, saved) if step}


@pytest.mark.parametrize(
    ("over", "harm", "seed"),
    [("memory", "full", 2), ("memory", "kill", 0), ("memory", "stop", 1), ("2,1", "kill", 1)],
)
def test_a_worker_comes_to_harm_while_all_save(over, harm, seed, tmp_path):
    check(over, harm, seed, tmp_path)


@pytest.mark.skipif(not is_open_mpi(), reason="MPICH ends a job of which a process is killed")
@OVER
def test_survivors_that_the_launcher_leaves_alone(over, tmp_path):
    check(over, "kill", 2, tmp_path, ["--with-ft", "ulfm"])


@pytest.mark.slow
@OVER
@pytest.mark.parametrize("harm", TOLD)
@pytest.mark.parametrize("seed", range(100, 108))
def test_a_campaign(over, harm, seed, tmp_path):
    check(over, harm, seed, tmp_path)
