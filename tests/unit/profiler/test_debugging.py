"""Debug mode names the fault and its place; without it nothing is checked."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import DriftError, NonFiniteError
from dvkernels.profiler import debugging


@pytest.fixture
def strategy():
    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as made, dv.debug(stall_seconds=0.1):
        yield made
    assert debugging.active is None


@pytest.fixture
def weight(strategy):
    with strategy.scope():
        return dv.Variable(np.ones(3, np.float32), aggregation="sum", name="weight")


def rank():
    return dv.get_replica_context().replica_id_in_sync_group


BAD = np.array([1, np.nan, np.inf], np.float32)
GOOD = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("all_reduce", lambda w, x: dv.get_replica_context().all_reduce("sum", x)),
        ("all_gather", lambda w, x: dv.get_replica_context().all_gather(x)),
        ("all_reduce_async", lambda w, x: dv.get_replica_context().all_reduce_async("sum", x)),
        ("assign_add of variable 'weight'", lambda w, x: w.assign_add(x)),
        ("scatter_add of variable 'weight'", lambda w, x: w.scatter_add([0, 1, 2], x)),
        ("gradient of 'weight'", lambda w, x: dv.optimizers.SGD(1.0).apply_gradients([(x, w)])),
    ],
)
def test_nan_is_found_with_its_replica_and_step(strategy, weight, what, call):
    strategy.run(lambda: None)
    with pytest.raises(NonFiniteError) as caught:
        strategy.run(lambda: call(weight, BAD if rank() == 1 else GOOD) and None)
    message = str(caught.value)
    assert what in message
    assert "1 NaN and 1 infinite of 3" in message
    assert "replica 1, step 2" in message
    np.testing.assert_array_equal(weight.values, [GOOD, GOOD])


def test_a_sum_that_overflows_is_found_before_it_is_written(strategy, weight):
    with pytest.raises(NonFiniteError, match="new content of variable 'weight'"):
        strategy.run(lambda: weight.assign_add(GOOD * np.float32(3e38)))
    np.testing.assert_array_equal(weight.values, [GOOD, GOOD])


def test_a_value_of_weight_zero_is_not_checked(strategy):
    context = dv.get_replica_context
    mean = strategy.run(
        lambda: context().all_reduce("mean", BAD if rank() else GOOD, weight=1 - rank())
    )
    np.testing.assert_array_equal(mean[1], GOOD)


def test_drift_is_found_and_nothing_is_written(strategy, weight):
    numbers = iter([1.0, 2.0])
    with pytest.raises(DriftError, match=r"'weight'.*replica 1 differs.*3 of 3 elements"):
        strategy.update(weight, lambda copy: copy.assign(GOOD * np.float32(next(numbers))))
    np.testing.assert_array_equal(weight.values, [GOOD, GOOD])


def test_copies_that_drifted_are_found_after_the_step(strategy, weight):
    weight._copies.arrays[1][2] = 5  # as a defect would
    with pytest.raises(
        DriftError, match=r"1 of 3 elements, first in element 2: 5.0 instead of 1.0"
    ):
        strategy.run(lambda: None)


def test_a_stall_is_reported_with_stacks(strategy, caplog):
    end = time.monotonic() + 60

    def step():
        while rank() == 1 and not caplog.records and time.monotonic() < end:
            time.sleep(0.01)
        dv.get_replica_context().barrier()

    with caplog.at_level(logging.WARNING, "dvkernels"):
        strategy.run(step)
    (record,) = caplog.records
    assert (record.replica, record.step) == (0, 1)
    assert "replica 0 called barrier()" in record.message
    assert "time.sleep(0.01)" in record.message


def test_the_last_collectives_are_logged_when_a_step_fails(strategy, caplog):
    def step():
        dv.get_replica_context().all_reduce("sum", np.ones(7))
        if rank() == 1:
            raise ZeroDivisionError("oh")
        dv.get_replica_context().barrier()

    with caplog.at_level(logging.ERROR, "dvkernels"), pytest.raises(ZeroDivisionError):
        strategy.run(step)
    (record,) = caplog.records
    assert "step 1 of MirroredStrategy(cpu:0, cpu:1) failed with ZeroDivisionError: oh" in (
        record.message
    )
    assert record.message.count("all_reduce(sum, float64[7])") == 2


def test_redundant_reads_are_reported_once(strategy, caplog):
    with strategy.scope():
        loss = dv.Variable(0.0, synchronization="on_read", aggregation="sum", name="loss")
    with caplog.at_level(logging.WARNING, "dvkernels"):
        for _ in range(3):
            strategy.run(lambda: loss.assign_add(1.0))
            float(loss)
            loss.assign(0.0)
            float(loss)
        assert not caplog.records
        float(loss)
        float(loss)
    (record,) = caplog.records
    assert "'loss' is ON_READ and was read 2 times" in record.message


def test_it_is_off_by_default_and_can_be_nested(weight):
    with dv.debug(False):
        weight.assign(BAD)
        with dv.debug(), pytest.raises(NonFiniteError):
            weight.assign(BAD)
        weight.assign(BAD)


@pytest.mark.parametrize("arguments", [{"stall_seconds": 0}, {"stall_seconds": "soon"}])
def test_bad_settings(arguments):
    with pytest.raises(ValueError, match="stall_seconds"):
        dv.debug(**arguments)
    with pytest.raises(TypeError, match="True or False"):
        dv.debug(1)


def test_the_logger_is_silent(capfd):
    dv.debug()
    try:
        logging.getLogger("dvkernels").warning("hello")
    finally:
        dv.debug(False)
    assert capfd.readouterr().err == ""
