"""What runs in Numba's simulator, in processes of their own: the CPU's bodies, and some more.

Numba chooses the simulator when it is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.simulator
ROOT = Path(__file__).resolve().parents[2]
BODIES = [
    "tests/unit/kernels/test_contract.py",
    "tests/unit/kernels/test_optimizers.py",
    "tests/properties/test_kernels.py",
    "tests/properties/test_collectives.py",
    "tests/simulator/test_one_gpu.py",
    "tests/simulator/test_simulated_strategies.py",
    "tests/conformance/test_strategy_laws.py",
    "tests/unit/variables",
    "tests/unit/optimizers",
    "tests/unit/strategies/test_contract_of_members.py",
    "tests/unit/strategies/test_contract_of_values.py",
    "tests/unit/strategies/test_async.py",
    "tests/unit/strategies/test_strategies.py",
    "tests/unit/test_context.py",
    "tests/simulator/test_between.py",
    "tests/simulator/test_concurrency.py",
    "tests/simulator/test_waiting_kernels_simulated.py",
]


@pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="it is the simulator")
@pytest.mark.parametrize("body", BODIES)
def test_the_bodies_pass_in_the_simulator(body: str) -> None:
    child = subprocess.run(
        [sys.executable, "-m", "pytest", body, "-p", "no:cacheprovider"],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "DVKERNELS_TEST_KIND": "simulator"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed is not None, child.stdout  # and not all skipped
