"""Variables that have a server: rows change one at a time, and garbage changes none."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import (
    BufferMismatchError,
    ClusterError,
    CollectiveTimeoutError,
    ContextError,
    NotABufferError,
    SynchronizationError,
)
from dvkernels.variables.variable import storage_of

NUM_ROWS = 40


@pytest.fixture
def strategy():
    with dv.ParameterServerStrategy(num_workers=4) as made:
        yield made


@pytest.fixture
def table(strategy):
    with strategy.scope():
        return dv.Variable(np.zeros((NUM_ROWS, 3), np.float32), name="table")


def scheduled(strategy, calls):
    coordinator = dv.ClusterCoordinator(strategy)
    for call in calls:
        coordinator.schedule(call)
    coordinator.join()


def test_no_write_of_concurrent_calls_is_lost(strategy, table):
    everything, rows = np.ones((NUM_ROWS, 3), np.float32), np.arange(NUM_ROWS)

    def call(k):
        if k % 3 == 0:
            table.assign_add(everything)
        elif k % 3 == 1:
            table.scatter_add(rows, everything)
        else:
            strategy.run(lambda: table.scatter_sub(rows, -everything))

    scheduled(strategy, [lambda k=k: call(k) for k in range(120)])
    assert np.array_equal(table, 120 * everything)


def test_an_update_is_one_write(strategy, table):
    def double_and_add(copy):
        copy.assign(copy.numpy() * 2)
        copy.assign_add(np.ones((NUM_ROWS, 3), np.float32))

    scheduled(strategy, [lambda: strategy.update(table, double_and_add)] * 10)
    assert np.all(table.numpy() == 2**10 - 1)
    coordinator = dv.ClusterCoordinator(strategy)
    coordinator.schedule(strategy.update, (table, double_and_add), once=True)
    with pytest.raises(ContextError, match="with once=True"):
        coordinator.join()


def test_a_read_sees_a_whole_write(strategy, table):
    """Rows that are always written together are never read apart."""
    seen = []

    def write(k):
        table.assign(np.full((NUM_ROWS, 3), k, np.float32))

    def read(_):
        seen.append(table.read_value())
        seen.append(table.gather_rows([0, NUM_ROWS - 1]))

    scheduled(strategy, [lambda k=k: (write, read)[k % 2](k) for k in range(100)])
    assert all(len({*each.ravel().tolist()}) == 1 for each in seen)


def test_a_value_that_was_read_stays_as_it_was(table):
    before = table.read_value()
    table.assign_add(np.ones((NUM_ROWS, 3), np.float32))
    assert not before.any()
    assert not before.flags.writeable
    out = np.empty((2, 3), np.float32)
    assert table.gather_rows([3, 3], out=out) is out
    assert out.all()


@pytest.mark.parametrize("ids", [[1, -1], [1, NUM_ROWS], [1, 0.5], [1, np.nan], ["1", "2"]])
@pytest.mark.parametrize("where", ["outside", "in a call", "in run"])
def test_garbage_as_ids_raises_and_writes_nothing(strategy, table, ids, where):
    ones = np.ones((2, 3), np.float32)
    sgd = dv.optimizers.SGD(1.0)
    for act in (
        lambda: table.gather_rows(ids),
        lambda: table.scatter_add(ids, ones),
        lambda: table.scatter_update(ids, ones),
        lambda: sgd.apply_gradients([((ids, ones), table)]),
    ):
        caller = {
            "outside": lambda act=act: act(),
            "in run": lambda act=act: strategy.run(act),
            "in a call": lambda act=act: scheduled(strategy, [act]),
        }[where]
        with pytest.raises((IndexError, NotABufferError), match="table"):
            caller()
    assert not table.numpy().any()


def test_what_does_not_fit_raises_and_writes_nothing(strategy, table):
    sgd = dv.optimizers.SGD(1.0)
    for act in (
        lambda: table.assign(np.zeros(3)),
        lambda: table.scatter_add([1], np.zeros((1, 3))),
        lambda: sgd.apply_gradients([(([1], np.ones((1, 3))), table)]),
        lambda: sgd.apply_gradients([(np.ones((NUM_ROWS, 3)), table)]),
    ):
        with pytest.raises(BufferMismatchError, match="table"):
            act()
    with pytest.raises(SynchronizationError, match="PerReplica"):
        table.assign(dv.PerReplica([np.zeros((NUM_ROWS, 3), np.float32)]))
    with strategy.scope(), pytest.raises(SynchronizationError):
        dv.Variable(0.0, synchronization="on_read")
    assert not table.numpy().any()


def test_a_deep_copy_has_a_server_of_its_own(table):
    twin = copy.deepcopy(table)
    twin.scatter_add([1], 1.0)
    assert not table.numpy().any()
    assert storage_of(twin).server is not storage_of(table).server


def test_a_server_that_does_not_answer_is_named(monkeypatch, table):
    monkeypatch.setenv("DVKERNELS_TIMEOUT_SECONDS", "0.05")
    begun, event = threading.Event(), threading.Event()

    def occupy(_):
        begun.set()
        event.wait(30)

    storage = storage_of(table)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(storage.server.ask, "a test", occupy, storage)
        assert begun.wait(30)
        with pytest.raises(CollectiveTimeoutError, match=r"scatter_add of variable 'table' waited"):
            table.scatter_add([1], 1.0)
        event.set()
    table.scatter_add([1], 1.0)


# -- partitioners: TensorFlow's own cases -----------------------------------------------------


@pytest.mark.parametrize(
    ("partitioner", "shape", "expected"),
    [
        (dv.partitioners.FixedShards(2), [10, 3], [2, 1]),
        (dv.partitioners.FixedShards(20), [10, 3], [10, 1]),
        (dv.partitioners.MinSize(4, 2), [6, 1], [2, 1]),
        (dv.partitioners.MinSize(4, 10), [6, 1], [6, 1]),
        (dv.partitioners.MinSize(8, 10), [6, 1], [3, 1]),
        (dv.partitioners.MinSize(max_shards=4), [100_000, 4], [4, 1]),
        (dv.partitioners.MaxSize(4), [6, 1], [6, 1]),
        (dv.partitioners.MaxSize(4, 2), [6, 1], [2, 1]),
        (dv.partitioners.MaxSize(8), [6, 1], [3, 1]),
        (dv.partitioners.MaxSize(16), [6, 1], [2, 1]),
        (dv.partitioners.MaxSize(1024), [6, 1], [1, 1]),
        (dv.partitioners.FixedShards(2), [], []),
        (dv.partitioners.MaxSize(4), [0, 3], [1, 1]),
    ],
)
def test_partitioners_deal_as_those_of_tensorflow(partitioner, shape, expected):
    assert partitioner(shape, np.float32) == expected


@pytest.mark.parametrize(
    ("rows", "shards", "sizes"), [(10, 4, [3, 3, 2, 2]), (13, 5, [3, 3, 3, 2, 2])]
)
def test_the_first_shards_are_a_row_larger(rows, shards, sizes):
    deal = dv.partitioners.FixedShards(shards)
    with dv.ParameterServerStrategy(variable_partitioner=deal) as strategy, strategy.scope():
        dealt = storage_of(dv.Variable(np.zeros((rows, 2)))).server.shards
    assert [len(shard) for shard in dealt] == sizes
    assert [row for shard in dealt for row in shard] == [*range(rows)]


@pytest.mark.parametrize("returned", [2, [2], [1, 2], [11, 1], [0, 1], [1.5, 1], None])
def test_a_partitioner_that_returns_something_else_raises(returned):
    with (
        dv.ParameterServerStrategy(variable_partitioner=lambda *_: returned) as strategy,
        strategy.scope(),
        pytest.raises(ClusterError, match="variable_partitioner must"),
    ):
        dv.Variable(np.zeros((10, 2)))


@pytest.mark.parametrize("make", [dv.partitioners.FixedShards, dv.partitioners.MaxSize])
@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_sizes_are_positive(make, size):
    with pytest.raises(ClusterError, match="must be a positive integer"):
        make(size)
