"""Time of ``import dvkernels`` after ``import numpy``, and to the first step, in new processes."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_RUNS = 7
CHILD = """
import time
import numpy
start = time.perf_counter()
import dvkernels
print(time.perf_counter() - start)
"""
FIRST_STEP = """
import time
import numpy as np
import dvkernels as dv

with dv.MultiWorkerMirroredStrategy(devices=1) as strategy:
    with strategy.scope():
        weight = dv.Variable(np.zeros(1000, np.float32), aggregation="mean")
    strategy.run(lambda: weight.assign_sub(np.ones(1000, np.float32)))
    print(time.time(), flush=True)
"""


def _printed(*arguments):
    """Return the numbers that a new interpreter prints."""
    # The child imports the same package as this process, installed or not.
    folder = Path(importlib.util.find_spec("dvkernels").origin).parent.parent
    child = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(folder)},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return [float(line.split()[-1]) for line in child.stdout.splitlines()]


def _import_seconds():
    return _printed("-c", CHILD)[0]


class ImportTime:
    def setup(self):
        _import_seconds()  # compiles the bytecode

    def track_import_over_numpy(self):
        return statistics.median(_import_seconds() for _ in range(NUM_RUNS)) * 1e3

    track_import_over_numpy.unit = "ms"


class FirstStep:
    def track_two_local_workers_over_one_process(self):
        """Compare the first step under ``launch`` with that of the program alone, caches warm."""
        launch = ("-m", "dvkernels", "launch", "--engine", "local", "-n", "2")
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "program.py"
            program.write_text(FIRST_STEP)

            def seconds_to_the_last(*words):
                began = time.time()
                return max(_printed(*words, program)) - began

            pairs = [
                (seconds_to_the_last(*launch), seconds_to_the_last()) for _ in range(NUM_RUNS + 1)
            ]
        return statistics.median(two - one for two, one in pairs[1:]) * 1e3

    track_two_local_workers_over_one_process.unit = "ms"
