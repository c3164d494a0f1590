"""Ctrl-C at any point of a scatter leaves equal copies, with all of its updates or with none."""

from __future__ import annotations

import interrupt_points
import pytest

PROGRAM = """
import numpy as np
import dvkernels as dv
from dvkernels.kernels.cpu.engine import thread_pool

thread_pool.SHARED_NBYTES = thread_pool._WAKING_NBYTES = 1
rng = np.random.default_rng(0)
table = rng.integers(0, 9, (50, 16)).astype("DTYPE")
indices, updates = rng.integers(0, 50, 200), rng.integers(1, 9, (200, 16)).astype("DTYPE")

def make():
    strategy = dv.MirroredStrategy(["cpu:0", "cpu:1"])
    with strategy.scope():
        variable = dv.Variable(table, aggregation="sum")
    def act():
        ACT
    def check(was_raised):
        first, second = (copy.tobytes() for copy in variable.values)
        assert first == second, "the copies differ"
        assert first in ((before, after) if was_raised else (after,)), "some rows are written"
        variable.scatter_add(indices, updates)
        strategy.close()
    return act, check

before = after = table.tobytes()
act, check = make()
act()
after = act.__closure__[-1].cell_contents.values[0].tobytes()
check(False)
del act, check
"""
ACTS = {
    "across": "variable.scatter_add(indices, updates)",
    "in replicas": "strategy.run(lambda: variable.scatter_add(indices, updates))",
}


def program(act: str, dtype: str) -> str:
    return PROGRAM.replace("ACT", ACTS[act]).replace("DTYPE", dtype)


@pytest.mark.parametrize("sample", [4, pytest.param(40, marks=pytest.mark.wide)])
@pytest.mark.parametrize(("act", "dtype"), [("across", "f2"), ("in replicas", "f4")])
def test_some_interrupts_of_a_scatter(act, dtype, sample):
    broken = interrupt_points.broken_in(program(act, dtype), sample=sample)
    assert not broken, broken.text()


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_all_interrupts_of_a_scatter(act, dtype):
    broken = interrupt_points.broken_in(program(act, dtype))
    assert not broken, broken.text()
