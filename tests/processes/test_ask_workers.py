"""Campaign of questions: of the workers of a job one is asleep, and the answer names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from mpi_jobs import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="starts and ends processes")
COUNT = 4

SLEEPS = """
import json, os, pathlib, sys, time
import dvkernels as dv

folder, sleepers = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
with dv.MultiWorkerMirroredStrategy(devices=1, timeout_seconds=300) as strategy:

    def step(number, sleeper):
        replica = dv.get_replica_context()
        if replica.replica_id_in_sync_group == sleeper:
            print(os.getpid(), flush=True)
            while not (folder / str(number)).exists():
                time.sleep(0.01)
        replica.barrier()

    for number, sleeper in enumerate(sleepers):
        strategy.run(step, (number, sleeper))
"""


def seconds_of_answers(rounds, folder):
    """Return how long each answer took that names the sleeping replica."""
    sleepers = np.random.default_rng(rounds).integers(COUNT, size=rounds).tolist()
    program = folder / "program.py"
    program.write_text(SLEEPS)
    module = [sys.executable, "-m", "dvkernels"]
    words = ["launch", "--engine", "local", "-n", str(COUNT), "--no-prefix", program, folder]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        [*module, *words, json.dumps(sleepers)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ,
    )  # fmt: skip
    try:
        return [
            _seconds_until_named(module, job, number, sleeper, folder)
            for number, sleeper in enumerate(sleepers)
        ]
    finally:
        for number in range(rounds):
            (folder / str(number)).touch()
        _, errors = job.communicate(timeout=100)
        assert job.returncode == 0, errors


def _seconds_until_named(module, job, number, sleeper, folder):
    own = int(job.stdout.readline())
    asked = [job.pid, own][number % 2]  # launch, or the worker itself
    end = time.monotonic() + 60
    while True:  # the others may be on their way to the barrier
        began = time.monotonic()
        said = subprocess.run(
            [*module, "ask", str(asked), "--json"],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True,
        ).stdout  # fmt: skip
        seconds = time.monotonic() - began
        answer = json.loads(said)
        waiting = [
            replica["state"] in ("waits for workers", "performs")
            for worker in answer["workers"]
            for replica in worker["replicas"]
        ]
        if sum(waiting) == COUNT - 1 or time.monotonic() > end:
            break
    (late,) = answer["late"]
    assert (late["name"], late["pid"]) == (f"replica {sleeper} of worker {sleeper}", own)
    assert ".py:" in late["at"]
    (folder / str(number)).touch()
    return seconds


@pytest.mark.wide
def test_the_sleeping_replica_is_named(tmp_path):
    assert len(seconds_of_answers(3, tmp_path)) == 3


@pytest.mark.slow
def test_a_campaign_of_questions(tmp_path):
    seconds = seconds_of_answers(100, tmp_path)
    assert max(seconds) < 2, sorted(seconds)[-10:]
