"""Asynchronous collectives: correct for every order of waits, and never a hang."""

from __future__ import annotations

import gc
import random
import threading
import time

import numpy as np
import pytest
from kinds import devices

import dvkernels as dv
from dvkernels.errors import CollectiveMismatchError, ContextError


@pytest.fixture(params=[1, 2, 3])
def strategy(request):
    with dv.MirroredStrategy(devices(request.param)) as made:
        yield made


def here():
    return dv.get_replica_context()


def rank():
    return here().replica_id_in_sync_group


def test_results_do_not_depend_on_the_order_of_waits(strategy):
    count = strategy.num_replicas_in_sync

    def step():
        values = [np.full(1 + 300 * k, float(rank() + k)) for k in range(6)]
        handles = [here().all_reduce_async("sum", [value]) for value in values]
        here().barrier()
        order = random.Random(rank()).sample(range(6), 6)
        found = {k: handles[k].wait()[0] for k in order}
        assert all(handle.done() for handle in handles)
        assert handles[0].wait()[0] is found[0]
        return [found[k] for k in range(6)], values

    found, values = strategy.run(step)
    for k in range(6):
        right = sum(range(count)) + count * k
        for replica in range(count):
            np.testing.assert_array_equal(found[k][replica], right)
            np.testing.assert_array_equal(values[k][replica], replica + k)


def test_run_returns_after_its_asynchronous_collectives(strategy):
    held = [np.ones(1 << 20) for _ in range(strategy.num_replicas_in_sync)]
    strategy.run(lambda: [here().all_reduce_async("sum", held[rank()]) and None for _ in range(5)])
    for array in held:
        array[:] = np.nan  # the array may be written again


@pytest.mark.parametrize(
    "step",
    [
        lambda: here().all_reduce_async("sum", np.ones(2 + rank())).wait(),
        lambda: here().all_reduce_async("max" if rank() else "min", 1.0).wait(),
        lambda: rank() == 1 or here().all_reduce_async("sum", 1.0).wait(),
        lambda: [here().all_reduce_async("sum", 1.0) and None for _ in range(rank())],
        lambda: (rank() == 0 and here().barrier()) or here().all_reduce_async("sum", 1.0).wait(),
    ],
    ids=["shapes", "ops", "one returns", "numbers of calls", "each waits for another"],
)
def test_replicas_that_disagree_never_hang(step):
    with dv.MirroredStrategy(devices(3)) as strategy:
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(CollectiveMismatchError, match="replica 1"):
                strategy.run(step)
            assert time.monotonic() - began < 10
        assert strategy.run(lambda: here().all_reduce_async("sum", 1).wait())[2] == 3


def test_an_error_in_another_replica_ends_the_wait():
    def step():
        if rank() == 1:
            time.sleep(0.05)
            raise ZeroDivisionError
        return here().all_reduce_async("sum", 1.0).wait()

    with dv.MirroredStrategy(devices(2)) as strategy, pytest.raises(ZeroDivisionError):
        strategy.run(step)


def test_bad_input_raises_at_the_call(strategy):
    with pytest.raises(dv.errors.UnsupportedDTypeError):
        strategy.run(lambda: here().all_reduce_async("mean", 1))


def test_a_handle_outlives_its_run(strategy):
    kept = []
    strategy.run(lambda: kept.append(here().all_reduce_async("sum", 1.0)))
    assert [float(handle.wait()) for handle in kept] == [len(kept)] * len(kept)
    assert "done" in repr(kept[0])


def test_an_ended_context_starts_no_collective(strategy):
    kept = []
    strategy.run(lambda: kept.append(here()))
    with pytest.raises(ContextError):
        kept[0].all_reduce_async("sum", 1.0)


def test_the_progress_thread_ends_with_the_strategy():
    strategy = dv.MirroredStrategy(devices(2))
    strategy.run(lambda: here().all_reduce_async("sum", 1.0).wait())
    del strategy
    gc.collect()
    end = time.monotonic() + 5
    while any("progress" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)
