"""Kernels and users' parallel functions on several threads, under each threading layer of Numba."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
from kinds import daily

# Numba's own parallel loop runs first, so that its layer is active beside our threads.
PROGRAM = """
import threading
import numba
import numpy as np
from dvkernels import kernels

@numba.njit(parallel=True)
def parallel_sum(x):
    total = 0.0
    for i in numba.prange(x.size):
        total += x[i]
    return total

parallel_sum(np.ones(10))
print(numba.threading_layer())
wrong = []

def call(seed):
    rng = np.random.default_rng(seed)
    for size in (10, 10_000, 1_000_000):  # serial, and shared with the pool
        for algorithm in ("direct", "ring"):
            buffers = [rng.integers(-9, 9, size) for _ in range(3)]
            expected = sum(buffers)
            kernels.all_reduce(buffers, algorithm=algorithm)
            if not all(np.array_equal(buffer, expected) for buffer in buffers):
                wrong.append((seed, size, algorithm))

threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong, wrong
print("right")
"""


@pytest.mark.parametrize("layer", daily(["workqueue", "omp"], "workqueue"))
def test_four_threads_reduce_at_once(layer: str) -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import os; os.environ['NUMBA_THREADING_LAYER'] = {layer!r}\n{PROGRAM}",
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    if layer == "omp" and "No threading layer could be loaded" in run.stderr:
        pytest.skip("Numba's OpenMP layer needs libgomp, which is not installed")
    assert run.stdout.split() == [layer, "right"], run.stderr


IN_REPLICAS = """
import numba
import numpy as np
{early}
@numba.njit(parallel=True)
def total(x):
    s = 0.0
    for i in numba.prange(x.size):
        s += x[i]
    return s

@numba.njit(parallel=True)
def nested(x):
    s = 0.0
    for i in numba.prange(4):
        s += total(x)
    return s

import dvkernels as dv
x = np.ones(100_000)
with dv.MirroredStrategy(["cpu:0", "cpu:1", "cpu:2"]) as strategy:
    for _ in range(50):
        assert strategy.run(total, (x,)).values == (x.size,) * 3
    assert total(x) == x.size
    print(numba.threading_layer(), flush=True)
    nested(x)
"""


@pytest.mark.parametrize(
    ("layer", "early"),
    daily(
        [*itertools.product(["workqueue", "omp"], ["import dvkernels", ""])],
        ("workqueue", ""),
        ("omp", "import dvkernels"),
    ),
)
def test_parallel_functions_of_users_run_in_several_replicas(layer: str, early: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", IN_REPLICAS.format(early=early)],
        env={**os.environ, "NUMBA_THREADING_LAYER": layer},
        capture_output=True,
        text=True,
        timeout=100,
    )
    if layer == "omp" and "No threading layer could be loaded" in run.stderr:
        pytest.skip("Numba's OpenMP layer needs libgomp, which is not installed")
    assert run.stdout.split() == [layer], run.stderr
    # Numba refuses a nested parallel function at once: the mutex does not deadlock.
    assert (run.returncode == 0) == (layer == "omp")
    assert ("workqueue threading layer is terminating" in run.stderr) == (layer == "workqueue")
