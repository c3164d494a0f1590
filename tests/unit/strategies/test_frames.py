"""Depth of the Python stack, and files, between the user's call and the compiled kernel."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.replicas import thread_limits

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


def files_entered(call):
    """Return the library's files that a call enters on this thread, one entry for each switch."""
    call()  # warm
    files: list[str] = []

    def look(frame, event, argument):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE) and name not in files[-1:]:
            files.append(name)

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files


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


@pytest.mark.parametrize(
    "values", [(1.0, 2.0), (np.ones(8), np.ones(8))], ids=["numbers", "arrays"]
)
def test_reduce_enters_few_files(strategy, values):
    value = dv.PerReplica(values)
    files = files_entered(lambda: strategy.reduce("sum", value))
    assert len(set(files)) <= 8, files
    assert len(files) - 1 <= 12, files


@pytest.mark.parametrize(("late", "most"), [(1, 10), (0, 13)], ids=["waits", "performs"])
def test_a_step_with_one_collective_enters_few_files(strategy, late, most, monkeypatch):
    monkeypatch.delenv("DVKERNELS_TIMEOUT_SECONDS", raising=False)
    monkeypatch.setattr(thread_limits, "settings", ())  # no threads of OpenMP and Numba
    ones = np.ones(8)

    def step():
        context = dv.get_replica_context()
        if context.replica_id_in_sync_group == late:
            time.sleep(0.02)  # the last replica to arrive performs the collective
        context.all_reduce("sum", ones)

    files = files_entered(lambda: strategy.run(step))
    assert len(set(files)) <= most, sorted(set(files))
