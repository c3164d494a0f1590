"""Hooks of collectives: called by each replica, removed for good, and unable to hang the others."""

from __future__ import annotations

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import CollectiveMismatchError
from dvkernels.profiler import collective_hooks


@pytest.fixture
def strategy():
    with dv.MirroredStrategy(["cpu:0"] * 3) as made:
        yield made
    assert collective_hooks.active is None


def rank():
    return dv.get_replica_context().replica_id_in_sync_group


def test_each_replica_reports_each_collective_before_and_after(strategy):
    before, after = [], []
    with strategy.scope():
        weight = dv.Variable(np.zeros(3, np.float32), aggregation="mean")

    sgd = dv.optimizers.SGD(0.1)

    def step():
        replica = dv.get_replica_context()
        replica.all_reduce("max", {"a": np.ones(2), "b": np.ones((2, 2))})
        replica.barrier()
        weight.assign(np.ones(3, np.float32))
        sgd.apply_gradients([(np.ones(3, np.float32), weight)])
        handle = replica.all_reduce_async("sum", 1.0)
        assert handle.wait() == handle.wait() == 3

    strategy.run(lambda: None)
    with dv.profiler.on_collective(before.append, after.append):
        strategy.run(step)
    strategy.run(step)
    found = [
        ("all_reduce", "max", "float64", 48), ("barrier", "", "", 0),
        ("Variable.assign", "", "float32", 12), ("apply_gradients", "mean", "float32", 12),
        ("all_reduce_async", "sum", "float64", 8),
    ]  # fmt: skip
    for records in (before, after):
        for replica in range(3):
            own = [record for record in records if record.replica == replica]
            assert [record[:1] + record[4:7] for record in own] == found
            assert {(record.worker, record.step, record.error) for record in own} == {(0, 2, None)}
    assert all(record.seconds is None for record in before)
    own = [[array.size for array in record.arrays] for record in before if record.replica == 0]
    assert own == [[2, 4], [], [3], [3], [1]]
    assert not any(record.arrays for record in after)
    assert all(record.seconds > 0 for record in after)


def test_a_check_of_the_arrays_reports_each_replica(strategy):
    reports = []

    def look(record):
        reports.extend((record.replica, record.name) for a in record.arrays if np.isnan(a).any())

    def step():
        value = np.full(3, np.nan if rank() > 0 else 1.0)
        assert np.isnan(dv.get_replica_context().all_reduce("sum", value, out=value)).all()

    with dv.profiler.on_collective(before=look):
        strategy.run(step)
    assert sorted(reports) == [(1, "all_reduce"), (2, "all_reduce")]


def test_no_event_keeps_the_arrays(strategy):
    events = []
    hooks = dv.profiler.on_collective(before=lambda record: None)
    hooks.after = events.append
    with hooks:
        strategy.run(lambda: dv.get_replica_context().all_reduce("sum", np.ones(3)))
    assert [event.contributed for event in events] == [None] * 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_in_a_hook_ends_the_step_in_all_replicas(strategy, when):
    def fail(record):
        if record.replica == 1:
            raise ZeroDivisionError("mine")

    def step():
        try:
            dv.get_replica_context().barrier()
        except ZeroDivisionError:  # and go on, which must not let the others wait
            dv.get_replica_context().barrier()

    with dv.profiler.on_collective(**{when: fail}):
        with pytest.raises(ZeroDivisionError, match="mine") as caught:
            strategy.run(lambda: dv.get_replica_context().barrier())
        assert (
            f"hook {when} of on_collective, for barrier of replica 1" in caught.value.__notes__[0]
        )
        with pytest.raises((ZeroDivisionError, CollectiveMismatchError)):
            strategy.run(step)
    strategy.run(step)


def test_abort_gets_the_error_and_its_own_becomes_a_note(strategy):
    seen = []

    def abort(record):
        seen.append((record.replica, type(record.error)))
        raise ValueError("in the hook")

    with dv.profiler.on_collective(abort=abort), pytest.raises(CollectiveMismatchError) as caught:
        strategy.run(lambda: dv.get_replica_context().all_reduce("sum", np.ones(1 + rank())))
    assert sorted(replica for replica, _ in seen) == [0, 1, 2]
    assert all(issubclass(kind, CollectiveMismatchError) for _, kind in seen)
    assert "abort of on_collective raised ValueError" in "".join(caught.value.__notes__)


def test_abort_is_called_for_calls_that_cannot_be_issued_or_awaited(strategy):
    seen = []

    def step():
        if rank() == 0:
            raise ZeroDivisionError
        dv.get_replica_context().all_reduce_async("sum", 1.0).wait()

    hooks = dv.profiler.on_collective(abort=lambda record: seen.append(record[:2]))
    with hooks, pytest.raises(ZeroDivisionError):
        strategy.run(step)
    assert {*seen} <= {("all_reduce_async", 1), ("all_reduce_async", 2)}
    assert len({*seen}) == len(seen)


def test_a_handle_removes_its_own_hooks_only(strategy):
    first, second = [], []
    one = dv.profiler.on_collective(before=first.append)
    two = dv.profiler.on_collective(before=second.append)
    one.remove()
    one.remove()
    strategy.run(lambda: dv.get_replica_context().barrier())
    two.remove()
    assert (len(first), len(second)) == (0, 3)
    for bad in ({}, {"before": 3}):
        with pytest.raises(TypeError, match="on_collective"):
            dv.profiler.on_collective(**bad)
