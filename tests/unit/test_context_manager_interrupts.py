"""Ctrl-C at every point of the context managers that set the state of the process or the thread.

A with block that an interrupt leaves before the first line of ``__exit__`` has not been left: that
is Python's. The law is that leaving is all or nothing, so it can be repeated.
"""

from __future__ import annotations

import os

import interrupt_points
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")

PROGRAM = """
import os, tempfile
import dvkernels as dv
from dvkernels.profiler import debugging, tracing

strategy = dv.MirroredStrategy(["cpu:0", "cpu:0"])
folder = ""
managers = {{
    "scope": strategy.scope,
    "trace": lambda: dv.profiler.trace(folder + "/run.json"),
    "debug": dv.debug,
}}

def is_set():
    return dv.has_strategy() or tracing.active is not None or debugging.active is not None

def make():
    global folder
    folder = tempfile.mkdtemp()
    entered = []

    def act():
        entered.append(managers[{kind!r}]())
        with entered[0]:
            pass

    def check(was_raised):
        if is_set() or {kind!r} == "trace" and entered:
            entered[0].__exit__(None, None, None)
        assert not is_set()
        assert set(os.listdir(folder)) <= {{"run.json"}}, os.listdir(folder)
        with managers[{kind!r}]():
            assert is_set()
        assert not is_set()

    return act, check
"""


# All 10,000 points of a trace take eight minutes.
@pytest.mark.parametrize(
    "sample",
    [10, pytest.param(100, marks=pytest.mark.wide), pytest.param(None, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", ["scope", "trace", "debug"])
def test_a_context_manager_that_was_interrupted_can_be_left_and_entered_again(kind, sample):
    broken = interrupt_points.broken_in(PROGRAM.format(kind=kind), sample=sample)
    assert not broken, broken.text()
    assert broken.num_struck > 2
