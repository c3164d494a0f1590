"""Threads that replicas start have no context; independent threads are not affected."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import ContextError

here = dv.get_replica_context


@pytest.fixture(params=[2, 3])
def strategy(request):
    with dv.MirroredStrategy([f"cpu:{k}" for k in range(request.param)]) as made:
        yield made


def by_pool(fn):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fn).result()


def by_thread(fn):
    outcome = []

    def call():
        try:
            outcome.append((fn(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    (result, error) = outcome[0]
    if error is not None:
        raise error
    return result


def by_thread_pool(fn):
    with ThreadPool(1) as pool:
        result = pool.apply(fn)
        pool.close()
        pool.join()
    return result


def by_executor(fn):
    async def call():
        return await asyncio.get_running_loop().run_in_executor(None, fn)

    return asyncio.run(call())


starters = pytest.mark.parametrize(
    "start_and_wait", [by_pool, by_thread, by_thread_pool, by_executor]
)

COLLECTIVES = {
    "all_reduce": lambda: here().all_reduce("sum", np.ones(2)),
    "all_reduce_async": lambda: here().all_reduce_async("sum", 1.0).wait(),
    "reduce_scatter": lambda: here().reduce_scatter("sum", np.ones(4)),
    "all_gather": lambda: here().all_gather(np.ones(2)),
    "broadcast": lambda: here().broadcast(1.0),
    "barrier": lambda: here().barrier(),
    "merge_call": lambda: here().merge_call(lambda strategy: 1),
}


@starters
@pytest.mark.parametrize("verb", COLLECTIVES)
def test_a_thread_that_a_replica_waits_for_has_no_context(strategy, start_and_wait, verb):
    with pytest.raises(ContextError, match=rf"{verb}\(.*contextvars.copy_context\(\).run"):
        strategy.run(lambda: start_and_wait(COLLECTIVES[verb]))
    assert strategy.run(COLLECTIVES["all_reduce"])[0][0] == strategy.num_replicas_in_sync


@starters
def test_a_context_can_be_passed_to_another_thread(strategy, start_and_wait):
    def handed():
        own = 1.0 + here().replica_id_in_sync_group
        context = contextvars.copy_context()
        return start_and_wait(lambda: context.run(lambda: float(here().all_reduce("sum", own))))

    count = strategy.num_replicas_in_sync
    assert set(strategy.run(handed).values) == {count * (count + 1) / 2}


def written(strategy):
    """Return functions that write variables of this strategy, by name."""
    with strategy.scope():
        shared = dv.Variable([0.0, 0.0], aggregation="mean")
        own = dv.Variable([0.0, 0.0], synchronization="none")
        on_read = dv.Variable([0.0, 0.0], synchronization="on_read", aggregation="mean")
    sgd = dv.optimizers.SGD(0.1)
    return [shared, own, on_read], {
        "assign": lambda: shared.assign([1.0, 1.0]),
        "assign_add": lambda: shared.assign_add([1.0, 1.0]),
        "own": lambda: own.assign([1.0, 1.0]),
        "on_read": lambda: on_read.assign([1.0, 1.0]),
        "scatter": lambda: shared.scatter_add([0], [1.0]),
        "sync": lambda: own.sync(),
        "update": lambda: strategy.update(shared, lambda copy: copy.assign([1.0, 1.0])),
        "optimizer": lambda: sgd.apply_gradients([(np.ones(2), shared)]),
    }


VERBS = ["assign", "assign_add", "own", "on_read", "scatter", "sync", "update", "optimizer"]


@pytest.mark.parametrize("is_scoped", [False, True])
@pytest.mark.parametrize("verb", VERBS)
def test_no_other_thread_writes_during_a_step(strategy, verb, is_scoped):
    variables, writes = written(strategy)

    def write():
        if not is_scoped:
            return writes[verb]()
        with strategy.scope():
            return writes[verb]()

    def step():
        if here().replica_id_in_sync_group == 1:
            by_thread(write)
        here().barrier()

    with pytest.raises(ContextError, match="another thread runs a step"):
        strategy.run(step)
    assert all((copy == 0).all() for variable in variables for copy in variable.values)
    by_thread(write)  # between steps
    writes[verb]()
    with strategy.scope():
        writes[verb]()
    if verb != "sync":
        strategy.run(lambda: here().merge_call(lambda _: writes[verb]() and None))


def test_independent_threads_are_not_blocked(strategy):
    """While replicas compute, and while they wait for each other."""
    variables, _ = written(strategy)
    unscoped = dv.Variable([0.0], aggregation="sum")
    sgd = dv.optimizers.SGD(1.0)
    is_over, errors, counts = threading.Event(), [], [0, 0, 0]

    def own_work(which, act):
        try:
            while not is_over.is_set() or not counts[which]:
                act()
                counts[which] += 1
        except BaseException as error:
            errors.append(error)

    def default():
        assert here().all_reduce("sum", np.ones(2)).tolist() == [1.0, 1.0]
        assert here().all_gather(np.ones(1)).tolist() == [1.0]
        float(variables[0][0])  # a read is no write

    def of_no_scope():
        before = float(unscoped[0])
        unscoped.assign_add([1.0])
        sgd.apply_gradients([([1.0], unscoped)])
        assert dv.get_strategy().run(lambda: float(here().all_reduce("sum", 2.0)))[0] == 2.0
        assert float(unscoped[0]) == before

    with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as other:

        def elsewhere():
            assert other.run(lambda: float(here().all_reduce("sum", 1.0)))[1] == 2.0

        acts = [default, of_no_scope, elsewhere]
        threads = [threading.Thread(target=own_work, args=(k, act)) for k, act in enumerate(acts)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            strategy.run(lambda: (COLLECTIVES["all_reduce"](), sum(range(20_000))))
        is_over.set()
        for thread in threads:
            thread.join(20)
    assert not errors, errors
    assert all(counts)


def test_an_io_thread_that_uses_no_context_is_accepted(strategy):
    assert strategy.run(lambda: by_pool(lambda: 7)).values == (7,) * strategy.num_replicas_in_sync
    assert strategy.run(lambda: by_pool(lambda: here().num_replicas_in_sync))[0] == 1


def test_the_main_thread_is_not_taken_for_a_replica_thread(strategy):
    is_inside, is_done, found = threading.Event(), threading.Event(), []

    def step():
        is_inside.set()
        assert is_done.wait(20)

    runner = threading.Thread(target=lambda: found.append(strategy.run(step)))
    runner.start()
    assert is_inside.wait(20)
    assert float(here().all_reduce("sum", 1.0)) == 1.0
    is_done.set()
    runner.join(20)
    assert found == [None]
