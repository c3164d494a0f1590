"""Advice for real programs: each with one problem, which is named with the setting to change.

How long things take depends on what else the machine does: a program may run several times.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.profiler.report import analysis, trace_table

ROOT = Path(__file__).resolve().parents[3]
ATTEMPTS = 6
STEPS = 12


def context():
    return dv.get_replica_context()


def two(**options):
    return dv.MirroredStrategy(["cpu:0"] * 2, **options)


def healthy(path, seconds=(0.03, 0.03), read=lambda x: x):
    """Trace steps that take so long in each replica, then a collective."""
    data = dv.Dataset.range(2 * STEPS).map(read).batch(2)

    def step(rows):
        if any(seconds):
            time.sleep(seconds[context().replica_id_in_sync_group])
        return context().all_reduce("sum", rows.sum())

    with two() as strategy, dv.profiler.trace(path):
        for batch in strategy.distribute_dataset(data):
            strategy.run(step, (batch,))


def input_bound(path):
    def read(x):
        time.sleep(0.004)
        return x

    healthy(path, (0.005, 0.005), read)


def slow_replica(path):
    healthy(path, (0.003, 0.015))


def tiny_steps(path):
    healthy(path, (0, 0))


OVERSUBSCRIBED = """
import sys
import numpy as np
import dvkernels as dv

one = np.ones((600, 600), np.float32)

def step():
    one @ one  # a few large products: each makes its threads wait for each other
    dv.get_replica_context().barrier()

with dv.MirroredStrategy(["cpu:0"] * 2, threads="all") as strategy:
    strategy.run(step)
    with dv.profiler.trace(sys.argv[1]):
        for _ in range(6):
            strategy.run(step)
"""


def oversubscribed(path):
    # BLAS starts so many threads by itself: an old OpenBLAS crashes where it is told to later.
    many = {f"{name}_NUM_THREADS": "4" for name in ("OPENBLAS", "MKL", "OMP")}
    command = [sys.executable, "-c", OVERSUBSCRIBED, str(path)]
    subprocess.run(command, env={**os.environ, **many}, cwd=ROOT, check=True)


def read_every_step(path):
    with two() as strategy:
        with strategy.scope():
            loss = dv.Variable(
                np.zeros(200_000), synchronization="on_read", aggregation="mean", name="loss"
            )

        def step():
            time.sleep(0.01)
            context().barrier()

        with dv.profiler.trace(path):
            for _ in range(STEPS):
                strategy.run(step)
                loss.read_value()


@pytest.mark.parametrize(
    ("program", "problem", "setting"),
    [
        (healthy, None, None),
        (input_bound, "input", "prefetch"),
        (slow_replica, "late replica", "balance"),
        (tiny_steps, "tiny steps", "batch(size)"),
        (oversubscribed, "oversubscribed cores", "threads"),
        (read_every_step, "read every step", "once an epoch"),
    ],
)
def test_the_problem_is_named_and_nothing_else(tmp_path, program, problem, setting):
    for attempt in range(ATTEMPTS):
        program(tmp_path / f"{attempt}.json")
        found = analysis.analyse(trace_table.read(tmp_path / f"{attempt}.json"))
        if [each.problem for each in found.advice] == ([problem] if problem else []):
            break
    else:
        pytest.fail(f"the last attempt says {found.advice}; {found.times}")
    assert all(setting in each.change for each in found.advice)
