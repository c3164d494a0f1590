"""Coordinator: results, errors once, cancellation, lost workers, writes that count once, end."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.coordinator import closure_queue
from dvkernels.errors import (
    CallCancelledError,
    ClusterError,
    CollectiveTimeoutError,
    ContextError,
    DatasetError,
    WorkerLostError,
)

SECONDS = 30


@pytest.fixture
def blocked(coordinator):
    """Calls that occupy both workers until the event is set."""
    event, begun = threading.Event(), [threading.Event() for _ in range(2)]

    def occupy(k):
        begun[k].set()
        assert event.wait(SECONDS)
        return k

    values = [coordinator.schedule(occupy, (k,)) for k in range(2)]
    assert all(each.wait(SECONDS) for each in begun)
    yield event, values
    event.set()


def fail(text="wrong"):
    raise ValueError(text)


def losing(variable, num_losses):
    """Return a call that adds 1 and then loses its worker, the first times it is made."""
    left = [None] * num_losses

    def call():
        variable.assign_add(1.0)
        if left:
            left.pop()
            raise WorkerLostError("the worker was killed")
        return threading.current_thread().name

    return call


def variable_of(strategy, value=0.0):
    with strategy.scope():
        return dv.Variable(value)


# -- results -----------------------------------------------------------------------------------


def test_results_of_nests_come_as_they_are_scheduled(coordinator):
    squares = {k: coordinator.schedule(lambda x, y=0: x * x + y, (k,), {"y": 1}) for k in range(9)}
    assert coordinator.fetch({"of": squares, "plain": 5}) == {
        "of": {k: k * k + 1 for k in range(9)},
        "plain": 5,
    }
    coordinator.join()
    assert coordinator.done()


def test_one_strategy_has_one_coordinator_until_it_is_closed(strategy, coordinator):
    assert dv.ClusterCoordinator(strategy) is coordinator
    coordinator.close()
    coordinator.close()
    with pytest.raises(ContextError, match="was closed"):
        coordinator.schedule(fail)
    with dv.ClusterCoordinator(strategy) as second:
        assert second is not coordinator
        assert second.schedule(int).fetch() == 0


def test_other_strategies_have_none():
    with (
        dv.MirroredStrategy(["cpu:0"]) as mirrored,
        pytest.raises(ClusterError, match=r"strategy\.run, or strategy\.map"),
    ):
        dv.ClusterCoordinator(mirrored)


def test_a_call_runs_in_the_context_of_its_caller_and_of_the_strategy(strategy, coordinator):
    def call():
        assert dv.get_strategy() is strategy
        assert dv.in_cross_replica_context()
        assert np.geterr()["divide"] == "raise"
        here = strategy.run(lambda: dv.get_replica_context().num_replicas_in_sync)
        return strategy.reduce("sum", here)

    with np.errstate(divide="raise"):
        value = coordinator.schedule(call)
    assert value.fetch() == 1


def test_draws_depend_on_the_number_of_the_call_and_not_on_the_worker():
    def draw():
        return float(dv.get_replica_context().rng().random())

    def draws(num_workers):
        with dv.ParameterServerStrategy(num_workers=num_workers, seed=3) as made:
            calls = dv.ClusterCoordinator(made)
            run = [calls.schedule(made.run, (draw,)) for _ in range(20)]
            return [each.on(0) for each in calls.fetch(run)]

    one = draws(1)
    assert one == draws(3)
    assert len({*one}) == len(one)


def test_a_wrong_call_is_refused_before_it_is_scheduled(coordinator):
    value = coordinator.schedule(int)
    with pytest.raises(TypeError, match="expected a function"):
        coordinator.schedule(5)
    with pytest.raises(TypeError, match="generator function"):
        coordinator.schedule(lambda: (yield))
    with pytest.raises(ValueError, match="args must be a list or tuple"):
        coordinator.schedule(int, 5)
    with pytest.raises(ContextError, match=r"what its fetch\(\) returns"):
        coordinator.schedule(int, ([value],))
    coordinator.join()


@pytest.mark.parametrize("verb", ["join", "schedule", "done", "close", "fetch"])
def test_a_call_does_not_wait_for_its_own_coordinator(coordinator, verb):
    ready = threading.Event()
    values = []

    def call():
        assert ready.wait(SECONDS)
        getattr(coordinator, verb)(*{"schedule": [int], "fetch": [values]}.get(verb, []))

    values.append(coordinator.schedule(call))
    ready.set()
    with pytest.raises(ContextError, match="on a worker, which would wait for itself"):
        coordinator.join()


# -- errors and cancellation -------------------------------------------------------------------


def test_an_error_comes_out_once_and_cancels_what_is_behind(coordinator, blocked):
    event, (first, second) = blocked
    failed = coordinator.schedule(fail)
    behind = [coordinator.schedule(int) for _ in range(5)]
    event.set()
    with pytest.raises(ValueError, match="wrong") as caught:
        coordinator.join()
    assert "raised by call 2 of fail, on worker" in caught.value.__notes__[0]
    coordinator.join()
    assert (first.fetch(), second.fetch()) == (0, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            failed.fetch()
    ends = []
    for value in behind:  # one may have been taken by the other worker meanwhile
        try:
            ends.append(value.fetch())
        except CallCancelledError as error:
            ends.append(str(error).partition(": ")[2])
    assert {*ends} - {0} <= {
        "call 2 of fail, scheduled before it, raised ValueError: wrong; schedule it again"
    }
    assert coordinator.schedule(int).fetch() == 0


def test_an_error_comes_out_of_schedule_which_then_schedules_nothing(coordinator):
    failed, calls = coordinator.schedule(fail), []
    with pytest.raises(ValueError, match="wrong"):
        failed.fetch()
    with pytest.raises(ValueError, match="wrong"):
        coordinator.schedule(calls.append, (1,))
    coordinator.schedule(calls.append, (2,))
    coordinator.join()
    assert calls == [2]


def test_several_errors_come_out_of_one_join_each(coordinator, blocked):
    event, _ = blocked
    barrier = threading.Barrier(2)

    def both(k):
        barrier.wait(SECONDS)
        fail(str(k))

    for k in range(2):
        coordinator.schedule(both, (k,))
    event.set()
    texts = set()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"[01]") as caught:
            coordinator.join()
        texts.add(str(caught.value))
    assert texts == {"0", "1"}
    coordinator.join()


def test_threads_may_schedule_and_join_together(coordinator):
    made, failures = [], []

    def work(k):
        try:
            for number in range(200):
                coordinator.schedule(made.append, ((k, number),))
                if number % 20 == 0:
                    coordinator.join()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    coordinator.join()
    assert not failures
    assert sorted(made) == [(k, number) for k in range(4) for number in range(200)]


def test_a_full_queue_lets_schedule_wait(monkeypatch):
    monkeypatch.setattr(closure_queue.ClosureQueue.__init__, "__defaults__", (3,))
    with dv.ParameterServerStrategy(num_workers=1) as strategy:
        coordinator = dv.ClusterCoordinator(strategy)
        event, done = threading.Event(), []
        coordinator.schedule(event.wait, (SECONDS,))

        def schedule():
            for k in range(20):
                coordinator.schedule(done.append, (k,))

        thread = threading.Thread(target=schedule)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not done
        event.set()
        thread.join(SECONDS)
        coordinator.join()
        assert done == [*range(20)]


# -- deadlines ---------------------------------------------------------------------------------


def test_a_call_that_never_ends_is_named(coordinator, monkeypatch):
    event = threading.Event()
    value = coordinator.schedule(event.wait, (SECONDS,))
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "0.2")
    for wait in (coordinator.join, value.fetch, coordinator.close):
        with pytest.raises(CollectiveTimeoutError, match=r"worker \d .* call 0 of Event\.wait"):
            wait()
    monkeypatch.delenv("DVKERNELS_TIMEOUT_SECONDS")
    event.set()
    assert value.fetch()


# -- lost workers ------------------------------------------------------------------------------


@pytest.mark.parametrize("once", [False, True])
def test_a_call_whose_worker_is_lost_is_made_again_by_another(strategy, coordinator, once):
    total = variable_of(strategy)
    before = {*threading.enumerate()}
    value = coordinator.schedule(losing(total, 2), once=once)
    assert value.fetch().startswith("dvkernels-replica-worker-")
    coordinator.join()
    assert float(total) == (1 if once else 3)
    now = {each for each in threading.enumerate() if "replica-worker" in each.name} - before
    assert now, "the lost thread has been replaced"


def test_a_call_that_loses_every_worker_is_given_up(strategy, coordinator):
    total = variable_of(strategy)
    value = coordinator.schedule(losing(total, 100), once=True)
    with pytest.raises(WorkerLostError, match="was killed"):
        coordinator.join()
    assert float(total) == 0
    with pytest.raises(WorkerLostError):
        value.fetch()
    assert coordinator.schedule(int).fetch() == 0


def test_a_thread_that_dies_outside_of_a_call_is_replaced(monkeypatch):
    begin, failures = closure_queue.ClosureQueue.begin, [MemoryError("no memory is left")]

    def failing(self, worker, closure, place):
        if failures:
            raise failures.pop()
        begin(self, worker, closure, place)

    monkeypatch.setattr(closure_queue.ClosureQueue, "begin", failing)
    with dv.ParameterServerStrategy(num_workers=1) as strategy:
        coordinator = dv.ClusterCoordinator(strategy)
        coordinator.schedule(int)
        with pytest.raises(MemoryError):
            coordinator.join()
        assert coordinator.schedule(int).fetch() == 0


def test_writes_that_count_once_take_effect_together(strategy, coordinator):
    table = variable_of(strategy, np.zeros(3))
    adam, seen = dv.optimizers.Adam(0.5), []

    def call(raises):
        update = np.ones(1)
        table.scatter_add([0], update)
        update[:] = 100.0
        table.assign_add(np.ones(3))
        adam.apply_gradients([(([2], np.ones(1)), table)])
        seen.append(table.numpy())
        if raises:
            fail()

    coordinator.schedule(call, (True,), once=True)
    with pytest.raises(ValueError, match="wrong"):
        coordinator.join()
    coordinator.schedule(call, (False,), once=True)
    coordinator.join()
    assert not np.any(seen)
    np.testing.assert_allclose(table, [2.0, 1.0, 0.5], rtol=1e-6)


# -- datasets of the workers -------------------------------------------------------------------


def test_each_worker_has_an_iterator_of_its_own():
    made = []

    def make():
        made.append(threading.current_thread())
        return dv.Dataset.range(1000)

    with dv.ParameterServerStrategy(num_workers=3) as strategy:
        coordinator = dv.ClusterCoordinator(strategy)
        iterator = iter(coordinator.create_per_worker_dataset(make))
        barrier = threading.Barrier(3)

        def call(own):
            barrier.wait(SECONDS)
            return int(next(own["batches"]))

        values = [coordinator.schedule(call, ({"batches": iterator},)) for _ in range(6)]
        assert sorted(coordinator.fetch(values)) == [0, 0, 0, 1, 1, 1]
        assert len({*made}) == len(made) == 3
        with pytest.raises(ContextError, match=r"schedule\(fn, args=\(iterator,\)\)"):
            next(iterator)


def test_a_dataset_that_ends_or_fails_raises_in_the_call(coordinator):
    iterator = iter(coordinator.create_per_worker_dataset([]))
    coordinator.schedule(next, (iterator,))
    with pytest.raises(StopIteration):
        coordinator.join()
    broken = iter(coordinator.create_per_worker_dataset(fail))
    coordinator.schedule(next, (broken,))
    with pytest.raises(ValueError, match="wrong") as caught:
        coordinator.join()
    assert "raised for the dataset of worker" in caught.value.__notes__[0]
    with pytest.raises(TypeError):
        coordinator.create_per_worker_dataset(5)
    with pytest.raises(DatasetError, match="pass a function that makes one"):
        coordinator.create_per_worker_dataset(iter(range(3)))


# -- the end -----------------------------------------------------------------------------------


def test_closing_cancels_what_has_not_begun(coordinator, blocked):
    event, values = blocked
    behind = coordinator.schedule(int)
    threading.Timer(0.01, event.set).start()
    coordinator.close()
    assert coordinator.fetch(values) == [0, 1]
    with pytest.raises(CallCancelledError, match="was closed"):
        behind.fetch()


def test_a_dropped_coordinator_ends_its_threads():
    strategy = dv.ParameterServerStrategy(num_workers=2)
    coordinator = dv.ClusterCoordinator(strategy)
    thread = coordinator.schedule(threading.current_thread).fetch()
    gone = weakref.ref(coordinator)
    del coordinator
    gc.collect()
    assert gone() is None
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert dv.ClusterCoordinator(strategy).schedule(int).fetch() == 0
    strategy.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_coordinator_does_not_follow_a_fork(strategy, coordinator):
    total = variable_of(strategy)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with pytest.raises(ContextError, match="was forked from"):
                coordinator.schedule(int)
            total.assign_add(1.0)
            coordinator.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert float(total) == 0
