"""Depth of the Python stack between the user's call and the compiled kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import dvkernels as dv

PACKAGE = str(Path(dv.__file__).parent)
MOST = 25


def deepest(call):
    """Return the names of the library's frames at the deepest point of a call."""
    found: list[str] = []

    def look(frame, event, argument):
        own = []
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                own.append(frame.f_code.co_name)
            frame = frame.f_back
        if len(own) > len(found):
            found[:] = own

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.fixture
def strategy():
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as made:
        yield made


@pytest.mark.parametrize("shape", [(4,), (1 << 20,)], ids=["small", "large"])
def test_reduce(strategy, shape):
    value = dv.PerReplica([np.ones(shape), np.ones(shape)])
    strategy.reduce("sum", value)
    names = deepest(lambda: strategy.reduce("sum", value))
    assert "reduce" in names
    assert len(names) <= MOST, names


def test_write_in_replica_context(strategy):
    with strategy.scope():
        variable = dv.Variable(np.ones(1 << 20), aggregation="sum")
    ones = np.ones(1 << 20)
    strategy.run(lambda: variable.assign_add(ones))
    names = deepest(lambda: strategy.run(lambda: variable.assign_add(ones)))
    assert "aggregate_then_write" in names
    assert len(names) <= MOST, names
