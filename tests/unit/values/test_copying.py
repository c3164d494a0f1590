"""Copying and pickling: process-bound objects refuse with a remedy, values are copied."""

from __future__ import annotations

import copy
import functools
import pickle
import threading

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import CollectiveTimeoutError


@pytest.fixture
def strategy():
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
        yield strategy


def bound(strategy):
    """Return each kind of process-bound object, with the remedy in its error."""
    with strategy.scope():
        variable = dv.Variable(1.0)
    dataset = strategy.distribute_dataset(dv.Dataset.range(4).batch(2))
    contexts = strategy.run(dv.get_replica_context)
    yield strategy, "dv.Checkpoint"
    yield dv.OneDeviceStrategy("cpu:0"), "dv.Checkpoint"
    yield dv.get_strategy(), "dv.Checkpoint"
    yield dataset, "pass on the dv.Dataset"
    with iter(dataset) as iterator:
        yield iterator, r"state_dict\(\)"
    yield contexts[1], r"get_replica_context\(\)"
    yield dv.get_replica_context(), r"get_replica_context\(\)"
    yield strategy.run(lambda: dv.get_replica_context().all_reduce_async("sum", 1.0))[0], "wait"
    yield variable, "dv.Checkpoint"
    yield dv.optimizers.Adam(), "dv.Checkpoint"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_says_what_to_do(strategy, protocol):
    for thing, remedy in bound(strategy):
        for held in (thing, {"in": [thing]}, functools.partial(print, thing)):
            with pytest.raises(TypeError, match=rf"(?s)cannot be (copied or )?pickled.*{remedy}"):
                pickle.dumps(held, protocol)


def test_copying_says_what_to_do(strategy):
    for thing, remedy in bound(strategy):
        can_be_deep = isinstance(thing, dv.Variable | dv.optimizers.Optimizer)
        for attempt in (copy.copy,) if can_be_deep else (copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=rf"cannot be copied.*{remedy}|copy\.deepcopy"):
                attempt(thing)


def test_values_are_copied_with_their_devices(strategy):
    value = strategy.run(lambda: [np.zeros(2)])[0]
    assert copy.copy(value) is value
    deep = copy.deepcopy({"a": value, "again": value})
    assert deep["a"] is deep["again"]
    assert (deep["a"].devices, deep["a"].owner) == (value.devices, value.owner)
    deep["a"].on(0)[:] = 1
    assert not value.on(0).any()
    assert pickle.loads(pickle.dumps(dv.Mirrored([1, 1]))).values == (1, 1)


@pytest.mark.parametrize("mode", ["on_write", "on_read", "none"])
def test_a_deep_copy_waits_for_the_step(strategy, mode):
    with strategy.scope():
        variable = dv.Variable(np.zeros(3), synchronization=mode, aggregation="sum")
    copied, is_asked, may_end = [], threading.Event(), threading.Event()

    def ask():
        is_asked.set()
        copied.append(copy.deepcopy(variable))

    asker = threading.Thread(target=ask)

    def step():
        replica = dv.get_replica_context()
        variable.assign_add(np.ones(3))
        if replica.replica_id_in_sync_group == 0:
            asker.start()
            is_asked.wait(10)
            may_end.wait(0.05)  # not set: time for a copy that does not wait
            assert not copied
        replica.barrier()
        variable.assign_add(np.ones(3))

    strategy.run(step)
    asker.join(10)
    total = 4 if mode == "on_write" else 2
    assert [copy.tolist() for copy in copied[0].values] == [[total] * 3] * 2


def test_a_deep_copy_in_merge_call_has_the_contents_of_the_step(strategy):
    with strategy.scope():
        variable = dv.Variable(np.zeros(3))
    twin = strategy.run(
        lambda: dv.get_replica_context().merge_call(lambda _, v: copy.deepcopy(v), (variable,))
    )
    assert isinstance(twin, dv.Variable)
    assert twin is not variable


def test_a_deep_copy_that_the_step_waits_for_times_out(strategy, monkeypatch):
    with strategy.scope():
        variable = dv.Variable(np.zeros(3))
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "0.1")
    errors = []

    def ask():
        try:
            copy.deepcopy(variable)
        except CollectiveTimeoutError as error:
            errors.append(str(error))

    def step():
        if dv.get_replica_context().replica_id_in_sync_group == 1:
            helper = threading.Thread(target=ask)
            helper.start()
            helper.join(10)

    strategy.run(step)
    assert "DVKERNELS_TIMEOUT_SECONDS" in errors[0]
    assert copy.deepcopy(variable).values[0].tolist() == [0, 0, 0]
