"""Programs of a job with servers: rank 0 runs them, the other processes end in the constructor."""

from __future__ import annotations

import copy
import itertools
import os
import pathlib
import signal
import sys
import threading
import time

import numpy as np
import pytest

import dvkernels as dv
from dvkernels.errors import (
    CallCancelledError,
    CollectiveTimeoutError,
    ContextError,
    NotABufferError,
    WorkerLostError,
)

NUM_ROWS = 23
SHARDS = dv.partitioners.FixedShards(5)


def make(num_servers: object, timeout_seconds: float = 30.0, **options: object):
    return dv.ParameterServerStrategy(
        num_servers=int(str(num_servers)), timeout_seconds=timeout_seconds, **options
    )


def variable_of(strategy, value, name=None):
    with strategy.scope():
        return dv.Variable(value, name=name)


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    time.sleep(60)


# -- tables --------------------------------------------------------------------------------------


def _uses(strategy):
    """Yield what a table and a number hold after each of many uses."""
    rng = np.random.default_rng(5)
    table = variable_of(strategy, rng.standard_normal((NUM_ROWS, 3)).astype(np.float32), "table")
    count = variable_of(strategy, np.int64(3), "count")
    yield table.read_value()
    for verb in ("add", "sub", "mul", "min", "max", "update", "div"):
        rows = rng.integers(0, NUM_ROWS, 40)
        updates = rng.standard_normal((40, 3)).astype(np.float32)
        getattr(table, f"scatter_{verb}")(rows, updates)
        yield table.numpy()
    table.scatter_add([[1], [22]], 2.5)
    table.scatter_add([], np.empty((0, 3), np.float32))
    for rows in ([[0, 22], [7, 7]], [], 4, range(NUM_ROWS)):
        yield table.gather_rows(rows)
    out = np.zeros((2, 6), np.float32)[:, ::2]
    assert table.gather_rows([20, 2], out=out) is out
    yield out
    table.assign(np.arange(NUM_ROWS * 3, dtype=np.float32).reshape(-1, 3))
    table.assign_sub(table)
    count.assign_add(4)
    yield np.asarray(table + count)
    other = copy.deepcopy(table)
    other.assign_add(np.ones((NUM_ROWS, 3), np.float32))
    yield other.values[0]
    yield table.values[0]
    for wrong, error in (([-1], IndexError), ([3, NUM_ROWS], IndexError), ([0.5], NotABufferError)):
        with pytest.raises(error, match="scatter_add of variable 'table'"):
            table.scatter_add(wrong, 1.0)
        with pytest.raises(error, match="gather_rows of variable 'table'"):
            table.gather_rows(wrong)
    yield table.numpy()


def _steps(strategy):
    """Yield the content of variables after steps of optimizers, of all rows and of some."""
    rng = np.random.default_rng(6)
    for optimizer in (
        dv.optimizers.SGD(0.1, momentum=0.9),
        dv.optimizers.Adagrad(lambda step: 0.5 / (1 + step)),
        dv.optimizers.Adam(0.1),
    ):
        table = variable_of(strategy, np.ones((NUM_ROWS, 2), np.float32))
        other = variable_of(strategy, np.ones(4, np.float32))
        for _ in range(3):
            whole = rng.standard_normal((NUM_ROWS, 2)).astype(np.float32)
            some = rng.integers(0, NUM_ROWS, 9), rng.standard_normal((9, 2)).astype(np.float32)
            optimizer.apply_gradients([(whole, table), (whole[:4, 0], other)])
            optimizer.apply_gradients([(some, table)])
        yield table.numpy()
        yield other.numpy()


def tables(num_servers: str) -> None:
    """A table on servers is one of this process, bit by bit; so are the steps of optimizers."""
    with (
        make(num_servers, variable_partitioner=SHARDS) as strategy,
        dv.ParameterServerStrategy(num_workers=1) as here,
    ):
        for uses in (_uses, _steps):
            for number, (found, expected) in enumerate(
                itertools.zip_longest(uses(strategy), uses(here))
            ):
                assert found.dtype == expected.dtype, number
                np.testing.assert_array_equal(found, expected, err_msg=str(number))
        loads = [server.nbytes for server in strategy.processes.client.servers.values()]
        assert max(loads) < 2 * min(loads)
        with pytest.raises(ContextError, match="cannot hold them while it computes"):
            strategy.update(variable_of(strategy, 1.0), lambda v: v.assign(2.0))


def checkpoints(num_servers: str, folder: str) -> None:
    """A checkpoint is restored by another number of servers."""
    with make(num_servers, variable_partitioner=SHARDS) as strategy:
        content = np.arange(NUM_ROWS * 4.0).reshape(-1, 4)
        table = variable_of(strategy, content if num_servers == "1" else 0 * content)
        checkpoint = dv.Checkpoint(table=table)
        if num_servers == "1":
            checkpoint.save(folder)
        else:
            checkpoint.restore(folder)
        np.testing.assert_array_equal(table, content)


# -- calls ---------------------------------------------------------------------------------------


def calls(num_servers: str) -> None:
    with make(num_servers, variable_partitioner=SHARDS, seed=3) as strategy:
        table = variable_of(strategy, np.zeros((NUM_ROWS, 2)), "table")
        coordinator = dv.ClusterCoordinator(strategy)
        _results(strategy, coordinator, table)
        _errors(coordinator, table)
        _refusals(strategy, coordinator)
        coordinator.join()
        assert coordinator.done()


def _results(strategy, coordinator, table) -> None:
    processes = {}

    def call(k, scale=1.0):
        table.scatter_add([k % NUM_ROWS, 7], [[scale, 0.0]] * 2)
        assert dv.get_strategy() is strategy
        assert strategy.run(lambda: dv.get_replica_context().num_replicas_in_sync).on(0) == 1
        return {"of": k, "process": os.getpid()}

    values = [coordinator.schedule(call, (k,), {"scale": 2.0}) for k in range(50)]
    coordinator.join()
    for k, found in enumerate(coordinator.fetch(values)):
        assert found["of"] == k
        processes[found["process"]] = None
    assert os.getpid() not in processes
    expected = 2.0 * np.bincount([k % NUM_ROWS for k in range(50)] + [7] * 50)
    np.testing.assert_array_equal(table[:, 0], expected)
    assert coordinator.schedule(lambda: table).fetch() is table

    draws = [
        coordinator.schedule(strategy.run, (lambda: dv.get_replica_context().rng().random(),))
        for _ in range(4)
    ]
    assert len({value.on(0) for value in coordinator.fetch(draws)}) == 4
    own = iter(coordinator.create_per_worker_dataset(lambda: dv.Dataset.range(1000)))
    taken = coordinator.fetch([coordinator.schedule(next, (own,)) for _ in range(20)])
    assert {*map(int, taken)} >= {0, 1}
    assert max(map(int, taken)) < 20

    adagrad = dv.optimizers.Adagrad(0.5)
    weights = variable_of(strategy, np.zeros((NUM_ROWS, 2), np.float32))

    def learn(k):
        error = weights.gather_rows([k, 7]) - np.float32(1.0)
        adagrad.apply_gradients([(([k, 7], error), weights)])

    for k in range(60):
        coordinator.schedule(learn, (k % 3,))
    coordinator.join()
    assert np.abs(weights[[0, 1, 2, 7]] - 1).max() < 0.2
    assert not weights[9].any()
    with pytest.raises(ContextError, match="leave it out of the checkpoint"):
        adagrad.state_dict()
    before = weights.numpy()
    with pytest.raises(ContextError, match="slot 'sum_of_squares' of variable"):
        dv.optimizers.Adagrad(0.5).slots(weights)
    np.testing.assert_array_equal(weights, before)


def _errors(coordinator, table) -> None:
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    def fail(error):
        raise error

    with pytest.raises(ValueError, match="wrong") as caught:
        coordinator.schedule(fail, (ValueError("wrong"),)).fetch()
    assert any("in process" in note for note in caught.value.__notes__)
    with pytest.raises(ValueError, match="wrong"):
        coordinator.join()
    coordinator.join()

    def odd():
        raise Odd(1, 2)

    for call, error, text in (
        (odd, RuntimeError, "cannot be sent"),
        (lambda: (x for x in ()), TypeError, "result of a call cannot be sent"),
        (lambda: table.gather_rows([NUM_ROWS]), IndexError, "variable 'table'"),
        (lambda: dv.Variable(1.0), ContextError, "outside of its calls"),
    ):
        coordinator.schedule(call)
        with pytest.raises(error, match=text):
            coordinator.join()

    def counted(is_wrong):
        table.scatter_add([0], 1.0)
        table.scatter_add([22], 1.0)
        if is_wrong:
            raise ValueError("after its writes")

    before = table.numpy()
    for k in range(10):
        coordinator.schedule(counted, (k == 9,), once=True)
    with pytest.raises(ValueError, match="after its writes"):
        coordinator.join()
    change = table - before
    assert change.sum() == 2 * 2 * 9
    assert change[0, 0] == change[22, 0] == 9


def _refusals(strategy, coordinator) -> None:
    images = np.zeros(200_000)
    with pytest.raises(ContextError, match=r"array 'images' has 1,600,000.*dv\.Variable"):
        coordinator.schedule(lambda: images.sum())
    assert coordinator.schedule(np.sum, (images,)).fetch() == 0  # an argument may be large
    with pytest.raises(ContextError, match="cannot be sent to a worker process"):
        coordinator.schedule(lambda: threading.current_thread(), (threading.Lock(),))


# -- losses --------------------------------------------------------------------------------------


def workers_die(num_calls: str, folder: str) -> None:
    """Every result comes once, and writes under ``once`` count once, though three workers die."""
    count = int(num_calls)
    with make(1) as strategy:
        seen = variable_of(strategy, np.zeros(count, np.int64), "seen")
        coordinator = dv.ClusterCoordinator(strategy)
        victims = {count // 5, count // 2, count - 1}

        def call(k):
            seen.scatter_add([k], [1])
            mark = pathlib.Path(folder, str(k))
            if k in victims and not mark.exists():  # it has written, and has not reported
                mark.touch()
                kill(os.getpid())
            return k

        values = [coordinator.schedule(call, (k,), once=True) for k in range(count)]
        coordinator.join()
        assert coordinator.fetch(values) == list(range(count))
        np.testing.assert_array_equal(seen, 1)


def all_workers_die() -> None:
    with make(1) as strategy:
        coordinator = dv.ClusterCoordinator(strategy)
        value = coordinator.schedule(lambda: kill(os.getpid()))
        with pytest.raises(WorkerLostError):
            coordinator.join()
        with pytest.raises(WorkerLostError):
            value.fetch()
        with pytest.raises((ContextError, CallCancelledError), match="all its workers are lost"):
            coordinator.schedule(int).fetch()


def server_dies() -> None:
    with make(1) as strategy:
        table = variable_of(strategy, np.zeros(4), "embedding")
        coordinator = dv.ClusterCoordinator(strategy)
        (rank,) = strategy.processes.servers
        victim = int(strategy.processes.channel(rank).place.split()[-1])
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(WorkerLostError, match=r"server 2, which has variables 'embedding'"):
            table.read_value()
        coordinator.schedule(lambda: table.assign_add(np.ones(4)))
        with pytest.raises(WorkerLostError, match="'embedding'"):
            coordinator.join()


def coordinator_dies() -> None:
    with make(1):
        os.kill(os.getpid(), signal.SIGKILL)


def coordinator_fails() -> None:
    with make(1):
        raise ValueError("of the program")


def call_never_ends() -> None:
    strategy = make(1)
    strategy.timeout_seconds = 0.5
    coordinator = dv.ClusterCoordinator(strategy)
    coordinator.schedule(time.sleep, (1000,))
    with pytest.raises(CollectiveTimeoutError, match=r"worker 0 has been running.*in process"):
        coordinator.join()
    with pytest.raises(CollectiveTimeoutError):
        strategy.close()


if __name__ == "__main__":  # started by mpiexec
    globals()[sys.argv[1]](*sys.argv[2:])
