"""Time of ``import dvkernels`` after ``import numpy``, in a new interpreter."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
from pathlib import Path

NUM_RUNS = 7
CHILD = """
import time
import numpy
start = time.perf_counter()
import dvkernels
print(time.perf_counter() - start)
"""


def _import_seconds():
    # The child imports the same package as this process, installed or not.
    folder = Path(importlib.util.find_spec("dvkernels").origin).parent.parent
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "PYTHONPATH": str(folder)},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return float(child.stdout)


class ImportTime:
    def setup(self):
        _import_seconds()  # compiles the bytecode

    def track_import_over_numpy(self):
        return statistics.median(_import_seconds() for _ in range(NUM_RUNS)) * 1e3

    track_import_over_numpy.unit = "ms"
