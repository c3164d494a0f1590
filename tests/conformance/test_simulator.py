"""What runs in Numba's simulator, in processes of their own: the CPU's bodies, and some more.

Numba chooses the simulator when it is imported.
"""

from __future__ import annotations

import os

import pytest
from kinds import BODIES, check_body

pytestmark = pytest.mark.simulator
OWN = (
    "tests/simulator/test_one_gpu.py",
    "tests/simulator/test_simulated_strategies.py",
    "tests/simulator/test_between.py",
    "tests/simulator/test_concurrency.py",
    "tests/simulator/test_waiting_kernels_simulated.py",
)


@pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="it is the simulator")
@pytest.mark.parametrize("body", [*BODIES, *OWN])
def test_the_bodies_pass_in_the_simulator(body: str) -> None:
    check_body(body, "simulator", 280, NUMBA_ENABLE_CUDASIM="1")
