"""``strategy.map``: results, errors and contexts are those of the items, whoever takes them."""

from __future__ import annotations

import collections
import contextvars
import copy
import itertools
import json
import operator
import random
import threading
import time

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import CollectiveTimeoutError, ContextError

SECONDS = 30  # until an event that must come is missed

MAKERS = {
    "one device": lambda: dv.OneDeviceStrategy("cpu:0"),
    "two mirrored": lambda: dv.MirroredStrategy(2),
    "five mirrored": lambda: dv.MirroredStrategy(5),
    "central storage": lambda: dv.CentralStorageStrategy(3),
    "one worker": lambda: dv.MultiWorkerMirroredStrategy(devices=2),
}


@pytest.fixture(params=MAKERS)
def strategy(request):
    with MAKERS[request.param]() as made:
        yield made


@pytest.fixture
def two():
    with dv.MirroredStrategy(2) as made:
        yield made


def here():
    return dv.get_replica_context()


def square(x):
    return x * x


def is_free(strategy):
    """Assert that the replicas are free."""
    ids = strategy.run(lambda: here().replica_id_in_sync_group).values
    assert ids == tuple(range(strategy.num_replicas_in_sync))
    return True


def eventually(condition):
    end = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    assert condition()


# -- results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 2, 3, 50])
def test_results_are_those_of_map(strategy, length):
    pauses = random.Random(length).choices([0, 0, 1e-5, 1e-3], k=length)

    def late_square(k):
        time.sleep(pauses[k])
        return square(k)

    expected = [*map(square, range(length))]
    assert list(strategy.map(late_square, range(length))) == expected
    assert sorted(strategy.map(late_square, range(length), ordered=False)) == expected
    assert list(strategy.map(late_square, (k for k in range(length)))) == expected
    assert is_free(strategy)


def test_the_default_strategy_maps():
    assert list(dv.get_strategy().map(abs, [-1, -2])) == [1, 2]


def test_endless_items(two):
    results = two.map(square, itertools.count())
    assert list(itertools.islice(results, 5)) == [0, 1, 4, 9, 16]
    results.close()
    assert is_free(two)


def test_unordered_results_come_as_they_are_ready(two):
    first_may_end = threading.Event()

    def wait(k):
        assert k or first_may_end.wait(SECONDS)
        return k

    results = two.map(wait, range(4), ordered=False)
    assert sorted(itertools.islice(results, 3)) == [1, 2, 3]
    first_may_end.set()
    assert list(results) == [0]


def test_replicas_work_at_the_same_time(strategy):
    all_here = threading.Barrier(strategy.num_replicas_in_sync)
    taken = list(
        strategy.map(
            lambda _: (all_here.wait(SECONDS) and None) or here().replica_id_in_sync_group,
            range(2 * strategy.num_replicas_in_sync),
        )
    )
    assert collections.Counter(taken) == dict.fromkeys(range(strategy.num_replicas_in_sync), 2)


def test_items_taken_ahead_are_bounded(strategy):
    most = 2 * strategy.num_replicas_in_sync + 1
    ahead, received = [], 0

    def items():
        for k in range(40):
            ahead.append(k + 1 - received)
            yield k

    results = strategy.map(square, items())
    eventually(lambda: len(ahead) == most)
    for result in results:
        received += 1
        assert result == square(received - 1)
    assert len(ahead) == 40
    assert max(ahead) <= most + 1  # an item is taken before this loop can count the result


def test_items_that_block_hold_back_no_result(two):
    may_go_on = threading.Event()

    def items():
        yield from range(3)
        assert may_go_on.wait(SECONDS)
        yield 3

    results = two.map(square, items())
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    may_go_on.set()
    assert list(results) == [9]


def test_a_generator_sees_the_context_variables_of_the_caller_and_its_own():
    variable = contextvars.ContextVar("variable", default=0)

    def items():
        with np.errstate(divide="raise"):
            for k in range(20):
                assert variable.get() == 7 + k
                variable.set(8 + k)
                assert np.geterr()["divide"] == "raise"
                yield k

    with dv.MirroredStrategy(3) as three:
        variable.set(7)
        assert list(three.map(square, items())) == [*map(square, range(20))]


def test_several_threads_share_the_results(two):
    results = two.map(square, range(200))
    taken = [[] for _ in range(3)]
    threads = [threading.Thread(target=own.extend, args=(results,)) for own in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(itertools.chain(*taken)) == [*map(square, range(200))]


# -- contexts --------------------------------------------------------------------------------------


def test_each_call_has_the_context_of_its_replica_and_of_the_caller(strategy):
    variable = contextvars.ContextVar("variable", default=0)

    def look(k):
        replica = here()
        assert replica.item_index == k
        assert replica.strategy is strategy
        assert dv.get_strategy() is strategy
        assert replica.device == strategy.worker_devices[replica.replica_id_in_sync_group]
        assert not dv.in_cross_replica_context()
        before = variable.get()
        variable.set(k)
        return before, np.geterr()["over"]

    with np.errstate(over="raise"):
        variable.set(-1)
        results = strategy.map(look, range(30))
    variable.set(-2)
    assert set(results) == {(-1, "raise")}
    assert strategy.run(lambda: here().item_index) is None


def test_distributed_values_are_the_replicas_own(two):
    with two.scope():
        weight = dv.Variable(3.0)
        hits = dv.Variable(0, synchronization="none")
        total = dv.Variable(0.0, synchronization="on_read", aggregation="sum")
    ids = dv.PerReplica([0, 1])

    def count(k):
        hits.assign_add(1)
        total.assign_add(float(k))
        return float(weight) * k, here().own(ids) == here().replica_id_in_sync_group

    assert list(two.map(count, range(10))) == [(3.0 * k, True) for k in range(10)]
    assert sum(int(own) for own in hits.values) == 10
    assert float(total) == 45


def test_draws_are_those_of_the_item(strategy):
    def draw(_):
        rng = here().rng("noise")
        return rng.random(), here().rng("noise").random(), here().rng("other").random()

    drawn = list(strategy.map(draw, range(9)))
    assert len({*itertools.chain(*drawn)}) == 27
    for length in (1, 1, 9):
        assert list(strategy.map(draw, range(length))) == drawn[:length]
    with dv.MirroredStrategy(3) as three:
        assert list(three.map(draw, range(9))) == drawn
    steps = strategy.state_dict()["num_steps"]
    list(strategy.map(draw, range(9)))
    assert strategy.state_dict()["num_steps"] == steps, "a map is no step"


COLLECTIVES = {
    "all_reduce": lambda: here().all_reduce("sum", 1.0),
    "all_reduce_async": lambda: here().all_reduce_async("sum", 1.0).wait(),
    "all_gather": lambda: here().all_gather(np.ones(2)),
    "reduce_scatter": lambda: here().reduce_scatter("sum", np.ones(2)),
    "broadcast": lambda: here().broadcast(1.0),
    "barrier": lambda: here().barrier(),
    "merge_call": lambda: here().merge_call(lambda strategy: None),
    "variable": lambda: dv.Variable(1.0),
}


@pytest.mark.parametrize("verb", COLLECTIVES)
def test_collectives_raise(strategy, verb):
    with pytest.raises(ContextError, match="map, for item 0"):
        list(strategy.map(lambda _: COLLECTIVES[verb](), range(3)))
    assert is_free(strategy)


@pytest.mark.parametrize("aggregation", ["none", "sum", "mean", "only_first_replica"])
def test_writes_that_need_a_meeting_raise(strategy, aggregation):
    with strategy.scope():
        variable = dv.Variable([1.0, 2.0], aggregation=aggregation)
    for write in (
        lambda _: variable.assign(np.zeros(2)),
        lambda _: variable.scatter_add([0], [1.0]),
        lambda _: dv.optimizers.SGD(0.1).apply_gradients([(np.ones(2), variable)]),
    ):
        with pytest.raises(ContextError, match="map, for item 0"):
            list(strategy.map(write, [0]))
    assert variable.numpy().tolist() == [1, 2]


def test_other_verbs_raise_in_its_functions(two):
    with dv.MirroredStrategy(2) as other:
        for call in (
            lambda _: two.run(square, (1,)),
            lambda _: two.map(square, [1]),
            lambda _: two.reduce("sum", dv.PerReplica([1, 2])),
            lambda _: other.run(square, (1,)),
            lambda _: other.map(square, [1]),
            lambda _: two.scope().__enter__(),
        ):
            with pytest.raises(ContextError, match="in a function of map, for item 0"):
                list(two.map(call, [0]))


def test_map_raises_in_replicas_and_in_merge_call(two):
    with pytest.raises(ContextError, match="cross-replica context"):
        two.run(lambda: two.map(square, [1]))
    with pytest.raises(ContextError, match="merge_call"):
        two.run(lambda: here().merge_call(lambda strategy: strategy.map(square, [1])))
    with dv.MirroredStrategy(2).scope(), pytest.raises(ContextError, match="leave that"):
        two.map(square, [1])
    with two.scope():
        assert list(two.map(square, [1])) == [1]


def test_a_context_kept_from_a_call_is_of_no_use(two):
    (kept,) = two.map(lambda _: here(), [0])
    eventually(lambda: not [t for t in threading.enumerate() if "of-map" in t.name])
    with pytest.raises(ContextError, match="has ended"):
        kept.barrier()


def test_a_thread_without_a_context_is_found_out(two):
    def all_reduce_elsewhere(_):
        raised = []

        def call():
            try:
                here().all_reduce("sum", 1.0)
            except ContextError as error:
                raised.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return len(raised)

    assert list(two.map(all_reduce_elsewhere, [0])) == [1]


def test_a_trace_has_a_span_for_each_item(two, tmp_path):
    with dv.profiler.trace(tmp_path / "trace.json"):
        list(two.map(square, range(4)))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event["args"]["item"] for event in events if event["name"] == "map"]
    assert sorted(spans) == [0, 1, 2, 3]


# -- while it is open ------------------------------------------------------------------------------


def test_the_strategy_is_occupied_while_a_map_is_open(strategy):
    with strategy.scope():
        variable = dv.Variable(0.0)
    per_replica = strategy.distribute_values_from_function(lambda _: 1.0)
    for end in (list, lambda results: results.close()):
        results = strategy.map(square, range(50))
        assert next(results) == 0
        for verb in (
            lambda: strategy.run(square, (1,)),
            lambda: strategy.reduce("sum", per_replica),
            lambda: strategy.gather(per_replica),
            lambda: strategy.broadcast_to(1.0, per_replica),
            lambda: strategy.map(square, [1]),
            lambda: strategy.update(variable, lambda copy: copy.assign(1.0)),
            lambda: variable.assign(1.0),
        ):
            with pytest.raises(ContextError, match=r"test_item_map.*list\(\.\.\.\).*close\(\)"):
                verb()
        assert float(variable) == 0
        assert strategy.local_results(per_replica)
        end(results)
        assert is_free(strategy)
        variable.assign(0.0)


def test_deep_copies_of_variables_wait_for_it_or_raise(two):
    with two.scope():
        variable = dv.Variable(1.0)
    with (
        two.map(square, itertools.count()),
        pytest.raises(ContextError, match="deepcopy of variable"),
    ):
        copy.deepcopy(variable)
    assert float(copy.deepcopy(variable)) == 1
    with pytest.raises(ContextError, match="deepcopy of variable"):
        list(two.map(lambda _: copy.deepcopy(variable), range(5)))


def test_other_strategies_are_not_occupied(two):
    results = two.map(square, range(50))
    with dv.MirroredStrategy(2) as other:
        assert other.run(square, (2,)).values == (4, 4)
        assert sum(other.map(square, range(3))) == 5
    assert sum(results) == sum(map(square, range(50)))


def test_dropping_it_closes_it(two):
    num_calls = itertools.count()
    for _ in two.map(lambda k: next(num_calls), itertools.count()):
        break
    assert is_free(two)
    assert next(num_calls) <= 6  # 5 items ahead of the first


def test_an_error_in_a_loop_over_the_results_closes_it(two):
    def consume():
        for result in two.map(square, itertools.count()):
            assert result < 9

    with pytest.raises(AssertionError) as caught:
        consume()
    assert is_free(two)
    assert caught.value.__traceback__ is not None


def test_the_next_step_waits_for_calls_that_still_run(two):
    has_begun, may_end, has_ended = threading.Event(), threading.Event(), threading.Event()

    def wait(_):
        has_begun.set()
        assert may_end.wait(SECONDS)
        time.sleep(0.05)
        has_ended.set()

    results = two.map(wait, [0])
    assert has_begun.wait(SECONDS)
    del results
    threading.Timer(0.05, may_end.set).start()
    assert two.run(has_ended.is_set).values == (True, True)


def test_waits_for_a_function_have_a_deadline(two, monkeypatch):
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "0.05")
    may_end, has_begun = threading.Event(), threading.Barrier(2)
    results = two.map(lambda _: (has_begun.wait(SECONDS), may_end.wait(SECONDS)), [0])
    has_begun.wait(SECONDS)
    with pytest.raises(CollectiveTimeoutError, match=r"close waited .* for items \[0\]"):
        results.close()
    with pytest.raises(CollectiveTimeoutError, match=r"run waited .* for items \[0\]"):
        two.run(square, (1,))
    may_end.set()
    monkeypatch.delenv("DVKERNELS_TIMEOUT_SECONDS")
    assert is_free(two)


def test_close_waits_for_calls_and_takes_no_more(two):
    running, most = set(), itertools.count()

    def work(k):
        running.add(k)
        next(most)
        time.sleep(0.01)
        running.discard(k)

    with two.map(work, itertools.count()) as results:
        next(results)
    assert not running
    assert next(most) <= 6
    results.close()
    with pytest.raises(ContextError, match="was closed"):
        next(results)


def test_closing_the_strategy_closes_it():
    strategy = dv.MirroredStrategy(2)
    results = strategy.map(square, itertools.count())
    next(results)
    strategy.close()
    with pytest.raises(ContextError, match="its strategy was closed"):
        next(results)
    with pytest.raises(ContextError, match="has been closed"):
        strategy.map(square, [1])


def test_it_may_be_closed_by_its_own_function(two):
    made = threading.Event()

    def close_at_3(k):
        assert made.wait(SECONDS)
        if k == 3:
            results.close()

    results = two.map(close_at_3, itertools.count())
    made.set()
    with pytest.raises(ContextError, match="was closed"):
        list(results)
    assert is_free(two)


def test_next_in_its_own_function_raises(two):
    made = threading.Event()
    results = two.map(lambda k: made.wait(SECONDS) and next(results), [0])
    made.set()
    with pytest.raises(ContextError, match="its own function"):
        list(results)


def test_a_step_of_another_thread_is_awaited(two):
    may_end, has_begun = threading.Event(), threading.Event()

    def wait():
        has_begun.set()
        may_end.wait(SECONDS)

    step = threading.Thread(target=two.run, args=(wait,))
    step.start()
    assert has_begun.wait(SECONDS)
    threading.Timer(0.02, may_end.set).start()
    assert list(two.map(lambda _: may_end.is_set(), range(2))) == [True, True]
    step.join()


# -- errors ----------------------------------------------------------------------------------------


class Own(Exception):
    pass


@pytest.mark.parametrize("kind", [Own, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_the_first_error_in_order_ends_it(strategy, kind):
    raised = kind("no")
    taken = []

    def fail_at_7(k):
        taken.append(k)
        if k == 7:
            raise raised
        if k > 7:
            raise ValueError(k)
        time.sleep(0.002 * (7 - k))
        return k

    # From an iterator: it could block the caller, who does not work on items then.
    results = strategy.map(fail_at_7, iter(range(1000)))
    assert [next(results) for _ in range(7)] == [*range(7)]
    with pytest.raises(kind) as caught:
        next(results)
    assert caught.value is raised
    assert any("for item 7 of map" in note for note in raised.__notes__)
    assert next(results, None) is None, "it has ended"
    assert is_free(strategy)
    assert len(taken) < 50


def test_an_unordered_error_ends_it(two):
    with pytest.raises(Own):
        list(two.map(lambda k: square(k) if k < 20 else fail(), itertools.count(), ordered=False))
    assert is_free(two)


def fail(*_):
    raise Own


def test_stop_iteration_of_a_function_is_an_error(two):
    with pytest.raises(RuntimeError, match="StopIteration") as caught:
        list(two.map(lambda k: next(iter(())), range(3)))
    assert isinstance(caught.value.__cause__, StopIteration)


@pytest.mark.parametrize("ordered", [True, False])
def test_an_error_of_the_items_is_raised_in_its_place(strategy, ordered):
    def items():
        yield from range(9)
        fail()

    results = strategy.map(square, items(), ordered=ordered)
    assert sorted(itertools.islice(results, 9)) == [*map(square, range(9))]
    with pytest.raises(Own) as caught:
        next(results)
    assert "in place of item 9" in caught.value.__notes__[0]
    assert is_free(strategy)


def test_bad_arguments(two):
    def generator(x):
        yield x

    async def coroutine(x):
        return x

    with two.scope():
        variable = dv.Variable([1.0, 2.0])
    dataset = two.distribute_dataset(dv.Dataset.range(4).batch(2))
    for fn in (generator, coroutine, None):
        with pytest.raises(TypeError, match="map expected a function"):
            two.map(fn, [1])
    for items in (5, None, dv.PerReplica([1, 2]), variable, dataset, iter(dataset)):
        with pytest.raises(TypeError, match=r"map expected (an iterable of )?items"):
            two.map(square, items)
    with pytest.raises(TypeError, match="ordered"):
        two.map(square, [1], ordered="yes")
    assert list(two.map(operator.neg, dv.Dataset.range(3))) == [0, -1, -2]
    with pytest.raises(TypeError, match="copied or pickled"):
        copy.copy(two.map(square, []))
    assert is_free(two)


def test_the_caller_works_on_items_while_it_waits(strategy):
    caller, idents = threading.get_ident(), set()

    def fn(k):
        idents.add(threading.get_ident())
        return dv.get_replica_context().replica_id_in_sync_group, threading.get_ident() == caller

    found = [*strategy.map(fn, range(200))]
    assert all((replica == 0) == is_caller for replica, is_caller in found)
    assert caller in idents
    assert threading.get_ident() not in {
        ident for _, ident in strategy.map(lambda _: (0, threading.get_ident()), iter(range(50)))
    }


def test_an_interrupt_of_the_caller_ends_it_at_once(strategy):
    caller = threading.get_ident()

    def fn(k):
        if threading.get_ident() == caller:
            raise KeyboardInterrupt
        return k

    results = strategy.map(fn, range(1000))
    with pytest.raises(KeyboardInterrupt):
        for _ in results:
            pass
    strategy.run(lambda: None)
    assert [*strategy.map(abs, [-1, -2])] == [1, 2]
