"""Ctrl-C at every point of schedule, join and fetch: no hang, no call lost or made twice."""

from __future__ import annotations

import os

import interrupt_points
import pytest
from kinds import daily

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")

PROGRAM = """
import numpy as np
import dvkernels as dv

KIND = {kind!r}

def fail():
    raise ValueError("wrong")

def make():
    strategy = dv.ParameterServerStrategy(num_workers=2)
    coordinator = dv.ClusterCoordinator(strategy)
    with strategy.scope():
        table = dv.Variable(np.zeros(3))
    made, came_out = [], []

    def act():
        if KIND == "write":
            table.scatter_add([0, 2], [1.0, 1.0])
            table.assign_add(np.ones(3))
            return
        if KIND == "close":
            coordinator.close()
            return
        values = [coordinator.schedule(made.append, (k,)) for k in range(3)]
        if KIND == "fetch":
            coordinator.fetch(values)
        if KIND == "error":
            coordinator.schedule(fail)
            try:
                coordinator.join()
            except ValueError as error:
                came_out.append(error)
            coordinator.join()
        if KIND == "join":
            coordinator.join()

    def check(was_raised):
        if KIND == "close":
            strategy.close()
            return
        try:
            coordinator.join()
        except ValueError as error:
            came_out.append(error)
        assert len(came_out) <= 1, came_out
        assert sorted(made) == list(range(len(made))), made
        assert was_raised or KIND in ("write", "error") or len(made) == 3, made
        assert coordinator.done()
        assert table.numpy().tolist() in (
            [[0.0] * 3, [1.0, 0.0, 1.0], [2.0, 1.0, 2.0]] if KIND == "write" else [[0.0] * 3]
        )
        assert coordinator.schedule(lambda: 5).fetch() == 5
        strategy.close()

    return act, check

act, check = make()
act()
check(False)
"""


KINDS = ("schedule", "join", "fetch", "error", "write", "close")


@pytest.mark.parametrize(
    ("kind", "sample"), daily([("error", 5), *((kind, 30) for kind in KINDS)], ("error", 5))
)
def test_an_interrupt_leaves_the_coordinator_usable(kind, sample):
    broken = interrupt_points.broken_in(PROGRAM.format(kind=kind), sample=sample)
    assert not broken, broken.text()
    assert broken.num_struck >= 3
