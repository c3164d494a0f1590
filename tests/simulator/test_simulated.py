"""The tests of this folder, in a process where Numba has chosen the simulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="it is the simulator")
def test_everything_here_passes_in_the_simulator() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE), "-p", "no:cacheprovider"],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert " skipped" not in child.stdout.replace("1 skipped", "")
