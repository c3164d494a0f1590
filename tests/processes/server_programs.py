"""Programs of a job with servers: rank 0 runs them, the other processes end in the constructor."""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import itertools
import json
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time

import cloudpickle
import numpy as np
import pytest

import dvkernels as dv
from dvkernels.communicators.workers.shm import ring_channel
from dvkernels.coordinator import closure_queue, per_worker
from dvkernels.errors import (
    CallCancelledError,
    ClusterError,
    CollectiveTimeoutError,
    ContextError,
    NotABufferError,
    WorkerLostError,
)

# Imported once, by the process of which those of a job are forks.
PRELOADED = (
    dv.ParameterServerStrategy, dv.ClusterCoordinator, dv.Checkpoint, dv.optimizers.Adam,
    ring_channel, cloudpickle,
)  # fmt: skip
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
        shapes = ((NUM_ROWS, 2), (4,), (NUM_ROWS,), (7, 3)) * 3
        held = [variable_of(strategy, np.zeros(shape)) for shape in shapes]
        loads = [server.nbytes for server in strategy.processes.client.servers.values()]
        assert 0 < max(loads) < 2 * min(loads)
        del held
        with pytest.raises(ContextError, match="cannot hold them while it computes"):
            strategy.update(variable_of(strategy, 1.0), lambda v: v.assign(2.0))


def _objects(strategy) -> dict[str, list]:
    """Return tables and the optimizers of each, with all kinds of slots."""
    optimizers = dv.optimizers.SGD(0.1, momentum=0.9), dv.optimizers.Adagrad(0.5)
    optimizers += (dv.optimizers.Adam(0.1),)
    tables = [
        variable_of(strategy, np.ones((NUM_ROWS, 2), np.float32), f"table-{k}")
        for k in range(len(optimizers))
    ]
    return {"tables": tables, "optimizers": [*optimizers]}


def _learn(objects, steps) -> None:
    for step in steps:
        rng = np.random.default_rng(step)
        for table, optimizer in zip(objects["tables"], objects["optimizers"], strict=True):
            some = rng.integers(0, NUM_ROWS, 9), rng.standard_normal((9, 2)).astype(np.float32)
            optimizer.apply_gradients([(some, table)])


def _states(objects):
    """Yield contents, slots and step counts."""
    for table, optimizer in zip(objects["tables"], objects["optimizers"], strict=True):
        yield [table.numpy(), *(slot.numpy() for slot in optimizer.slots(table))]
        yield [optimizer.steps(table), optimizer.iterations, len(optimizer.slotted)]
        (entry,) = optimizer.state_dict()["variables"]
        yield [entry["steps"], *entry["slots"].values()]


def _assert_equal(found, expected) -> None:
    for one, other in zip(_states(found), _states(expected), strict=True):
        for array, like in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, like)


def checkpoints(num_servers: str, folder: str, steps: str) -> None:
    """Tables and slots that other servers have saved go on as if they had never been saved."""
    begin, more = int(steps), 3
    saved, again = (pathlib.Path(folder, str(k)) for k in (begin, begin + more))
    with (
        make(num_servers, variable_partitioner=SHARDS) as strategy,
        dv.ParameterServerStrategy(num_workers=1) as here,
    ):
        found, expected = _objects(strategy), _objects(here)
        _learn(expected, range(begin))
        if not saved.exists():  # by the servers of an earlier job
            dv.Checkpoint(**expected).save(saved)
        _learn(found, range(100, 101))  # which the restore undoes
        dv.Checkpoint(**found).restore(saved)
        _assert_equal(found, expected)
        for objects in (found, expected):
            _learn(objects, range(begin, begin + more))
        _assert_equal(found, expected)
        dv.Checkpoint(**found).save(again)
        restored = _objects(here)
        dv.Checkpoint(**restored).restore(again)
        _assert_equal(restored, expected)
        _loaded_states(strategy, found)


def _loaded_states(strategy, objects) -> None:
    """The state of an optimizer can be loaded for other variables, and is not lost by a copy."""
    made = _objects(strategy)
    for old, new, table in zip(
        objects["optimizers"], made["optimizers"], made["tables"], strict=True
    ):
        new.load_state_dict(old.state_dict(), variables=[table])
        with pytest.raises(ContextError, match="slots lie in server processes"):
            copy.deepcopy(old)
    for table, other in zip(objects["tables"], made["tables"], strict=True):
        other.assign(table)
    _assert_equal(made, objects)
    sgd = dv.optimizers.SGD(0.1, momentum=0.9)
    sgd.load_state_dict(objects["optimizers"][0].state_dict())
    with pytest.raises(ContextError, match="load_state_dict"):
        sgd.apply_gradients([(np.ones((NUM_ROWS, 2), np.float32), made["tables"][0])])


# -- calls ---------------------------------------------------------------------------------------


def calls(num_servers: str) -> None:
    with make(num_servers, variable_partitioner=SHARDS, seed=3) as strategy:
        table = variable_of(strategy, np.zeros((NUM_ROWS, 2)), "table")
        coordinator = dv.ClusterCoordinator(strategy)
        _results(strategy, coordinator, table)
        rows = _rows_read(coordinator)
        _counts(coordinator, strategy)
        assert _rows_read(coordinator) == rows  # its variable has been dropped
        _errors(coordinator, table)
        _refusals(strategy, coordinator)
        coordinator.join()
        assert coordinator.done()
        _lifetimes(strategy, coordinator)
        _authors(strategy, coordinator)
        _a_fork_leaves(strategy, coordinator)
        _coordinators_in_turn(strategy, coordinator)


class _Source:
    """Sequence that counts how often it is sent."""

    num_sent = 0

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return index

    def __reduce__(self):
        _Source.num_sent += 1
        return _Source, ()


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
    source = _Source()
    own = iter(coordinator.create_per_worker_dataset(lambda: dv.Dataset.from_sequence(source)))
    taken = coordinator.fetch([coordinator.schedule(next, (own,)) for _ in range(20)])
    assert {*map(int, taken)} >= {0, 1}
    assert max(map(int, taken)) < 20
    assert 1 <= _Source.num_sent <= strategy.num_workers  # once to each worker

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
    (sums,) = adagrad.slots(weights)  # of an optimizer that was used in calls only
    assert (sums.gather_rows([0, 7, 9]).sum(axis=1) > 0).tolist() == [True, True, False]
    assert adagrad.steps(weights) == 60

    def read():
        return adagrad.slots(weights)[0].read_value(), int(adagrad.steps(weights)), sums[7]

    for one, other in zip(coordinator.schedule(read).fetch(), (sums, 60, sums[7]), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ContextError, match="ask outside of calls"):
        coordinator.schedule(lambda: adagrad.slotted).fetch()
    with pytest.raises(ContextError):
        coordinator.join()


def _counts(coordinator, strategy) -> None:
    """What the servers were asked is counted, and seen in a trace."""
    table = variable_of(strategy, np.zeros((NUM_ROWS, 2), np.float32), "counted")
    sgd, before = dv.optimizers.SGD(0.1), coordinator.stats()

    def learn(k):
        sgd.apply_gradients([(([k, 7], table.gather_rows([k, 7])), table)])

    with tempfile.TemporaryDirectory() as folder:
        with dv.profiler.trace(f"{folder}/run.json"):
            coordinator.schedule(lambda: [learn(k) for k in range(6)]).fetch()
            coordinator.join()
            table.gather_rows([3])
        (written,) = pathlib.Path(folder).iterdir()
        events = json.loads(written.read_text())["traceEvents"]
    after = coordinator.stats()
    assert (after.returned - before.returned, after.running, after.queued) == (1, 0, 0)
    assert sum(each.rows_read for each in after.servers) >= 13
    assert sum(each.rows_written for each in after.servers) >= 12
    assert {each.rank for each in after.servers} == {*strategy.processes.servers}
    assert all(each.most_waiting > 0 and each.busy_seconds > 0 for each in after.servers)
    assert str(after).count("server ") == len(after.servers)
    assert [event["name"] for event in events if event.get("cat") == "request"] == ["gather_rows"]
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert counters >= {"calls", *(f"rows of server {each.rank}" for each in after.servers)}


def _rows_read(coordinator) -> int:
    gc.collect()
    coordinator.stats()  # the next message to each server says what nobody has any more
    return sum(each.rows_read for each in coordinator.stats().servers)


def _errors(coordinator, table) -> None:
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    def fail(error):
        raise error

    with pytest.raises(ValueError, match="wrong") as caught:
        coordinator.schedule(fail, (ValueError("wrong"),)).fetch()
    (note,) = [each for each in caught.value.__notes__ if each.startswith("in process")]
    assert f'{__file__}", line' in note
    assert "in fail\n    raise error\n" in note
    with pytest.raises(ValueError, match="wrong"):
        coordinator.join()
    coordinator.join()

    def odd(*_):
        raise Odd(1, 2)

    at_server = dv.optimizers.SGD(odd)

    for call, error, text in (
        (odd, RuntimeError, "Odd: 1 .an error that cannot be sent"),
        (
            lambda: at_server.apply_gradients([(([0], [[1.0, 1.0]]), table)]),
            RuntimeError,
            "Odd: 1 .an error that cannot be sent",
        ),
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closure_queue, "MOST_QUEUED_NBYTES", 4 * images.nbytes)
        for _ in range(20):  # copies of its arguments do not fill the memory
            coordinator.schedule(np.sum, (images,))
            assert coordinator.stats().queued <= 4
    with pytest.raises(ContextError, match="cannot be sent to a worker process"):
        coordinator.schedule(lambda: threading.current_thread(), (threading.Lock(),))


class _Holder:
    def __init__(self, variable):
        self.variable = variable


def _lifetimes(strategy, coordinator) -> None:
    """A scheduled call keeps its variables; the iterators of workers end with that of all."""
    gc.collect()
    loads = [server.nbytes for server in strategy.processes.client.servers.values()]
    for _ in range(strategy.num_workers):
        coordinator.schedule(time.sleep, (0.1,))
    holder = _Holder(variable_of(strategy, np.full(NUM_ROWS, 3.0)))
    value = coordinator.schedule(lambda: holder.variable.numpy().sum())
    other = coordinator.schedule(lambda it: it.variable.numpy().sum(), (_Holder(holder.variable),))
    holder.variable = None
    gc.collect()
    coordinator.stats()  # lets the servers drop what nobody has
    assert value.fetch() == other.fetch() == 3.0 * NUM_ROWS
    gc.collect()
    assert loads == [server.nbytes for server in strategy.processes.client.servers.values()]
    calls = [coordinator.schedule(lambda: len(per_worker._own)) for _ in range(20)]
    assert {*coordinator.fetch(calls)} == {0}


def _authors(strategy, coordinator) -> None:
    """Writes that count once are those of the worker, which had read before."""
    table = variable_of(strategy, np.zeros(NUM_ROWS))
    coordinator.schedule(lambda: table.assign_add(table.read_value() + 1.0), once=True).fetch()
    reports = strategy.processes.reports().values()
    coordinator.schedule(lambda: table.assign_add(table.read_value()), once=True).fetch()
    for before, after in zip(reports, strategy.processes.reports().values(), strict=True):
        assert after.totals.writes_after_reads == before.totals.writes_after_reads + 1


def _a_fork_leaves(strategy, coordinator) -> None:
    """A forked child that closes the strategy does not end the job."""
    child = os.fork()
    if child == 0:
        strategy.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    why_gone = coordinator.schedule(lambda: strategy.processes.channel(0).why_gone())
    assert why_gone.fetch() == ("", False)


def _coordinators_in_turn(strategy, first) -> None:
    """A coordinator waits for the calls of one that could not be closed."""
    values = [first.schedule(lambda: time.sleep(0.3) or "first") for _ in range(3)]
    while first.stats().running < strategy.num_workers:
        time.sleep(0.001)
    first._closures._timeout_seconds = 0.01
    with pytest.raises(CollectiveTimeoutError):
        first.close()
    second = dv.ClusterCoordinator(strategy)
    assert second is not first
    assert second.fetch([second.schedule(abs, (k,)) for k in range(20)]) == [*range(20)]
    assert values[0].fetch() == "first"


def counts_differ() -> None:
    """All processes raise, whichever number is the wrong one."""
    num_servers = 2 if os.environ["DVKERNELS_GROUP_RANK"] == "1" else 1
    with pytest.raises(ClusterError, match=r"the same in all processes; got \[1, 2, 1\]"):
        make(num_servers)
    with pytest.raises(ClusterError, match="num_servers=2: expected at least a coordinator"):
        make(2)


def interrupted() -> None:
    """Ctrl-C ends a wait and not the calls, and leaves a request whole."""
    is_armed, num_sent = [False], 0

    def interrupt(*_):
        if is_armed[0]:
            is_armed[0] = False
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    with make(1) as strategy:
        table = variable_of(strategy, np.zeros((NUM_ROWS, 2)), "table")
        coordinator = dv.ClusterCoordinator(strategy)
        has_begun = threading.Event()

        def send():
            nonlocal num_sent
            has_begun.wait()
            while num_sent < 50:
                if is_armed[0]:
                    os.kill(os.getpid(), signal.SIGINT)
                    num_sent += 1
                time.sleep(0.001)

        sender = threading.Thread(target=send)
        sender.start()
        value = coordinator.schedule(lambda: time.sleep(0.2) or table.gather_rows([1]).sum())
        num_interrupts = num_tried = num_done = 0
        while sender.is_alive():
            try:
                is_armed[0] = True
                has_begun.set()
                coordinator.join()
                while sender.is_alive():
                    num_tried += 1
                    table.scatter_add([3, 5], 1.0)
                    num_done += 1
            except KeyboardInterrupt:
                num_interrupts += 1
        is_armed[0] = False
        sender.join()
        coordinator.join()
        assert value.fetch() == 0.0
        assert num_interrupts > 1
        content = table.numpy()
        assert num_done <= content[3, 0] <= num_tried
        np.testing.assert_array_equal(content[3], content[5])


# -- losses --------------------------------------------------------------------------------------


def workers_die(num_calls: str, folder: str, seed: str = "0") -> None:
    """Every result comes once, and writes under ``once`` count once, though three workers die.

    Two are killed at any moment, and one when it has written and has not reported.
    """
    count, random = int(num_calls), np.random.default_rng(int(seed))
    moments = sorted(random.integers(count // 8, count - 16, 2))
    with make(1) as strategy:
        seen = variable_of(strategy, np.zeros(count, np.int64), "seen")
        coordinator = dv.ClusterCoordinator(strategy)
        victims = [int(strategy.processes.channel(rank).place.split()[-1]) for rank in (1, 2)]
        last, mark = int(random.integers(count // 8, count - 16)), pathlib.Path(folder, "mark")

        def call(k):
            seen.scatter_add([k], [1])
            while k >= last and not mark.exists():
                if os.getpid() in victims:
                    time.sleep(0.001)  # there are more calls, and one of the others takes one
                    continue
                with contextlib.suppress(FileExistsError):
                    mark.mkdir()
                    kill(os.getpid())
            return k

        def kill_others():
            for moment, victim in zip(moments, victims, strict=True):
                while len(values) < moment:
                    time.sleep(0.001)
                os.kill(victim, signal.SIGKILL)

        values, killer = [], threading.Thread(target=kill_others)
        killer.start()
        for k in range(count):
            values.append(coordinator.schedule(call, (k,), once=True))
        coordinator.join()
        killer.join()
        assert coordinator.fetch(values) == list(range(count))
        np.testing.assert_array_equal(seen, 1)


def calls_fail(num_calls: str, seed: str = "0") -> None:
    """Each error comes out once; a call ends with its result, its own error, or is cancelled."""
    count = int(num_calls)
    wrong = {*np.random.default_rng(int(seed)).choice(count, count // 100, replace=False).tolist()}
    came_out, failed, returned = collections.Counter(), {}, set()

    def call(k):
        if k in wrong:
            raise ValueError(k)
        return k

    with make(1) as strategy:
        coordinator = dv.ClusterCoordinator(strategy)
        left = [*range(count)]
        while left:
            values = {}
            for k in left:
                try:
                    values[k] = coordinator.schedule(call, (k,))
                except ValueError as error:  # of another call; this one is not scheduled
                    came_out[error.args[0]] += 1
            while True:
                try:
                    coordinator.join()
                    break
                except ValueError as error:
                    came_out[error.args[0]] += 1
            for k, value in values.items():
                try:
                    assert value.fetch() == k
                    returned.add(k)
                except CallCancelledError:
                    pass  # it is scheduled again
                except ValueError as error:
                    failed[k] = error.args
            left = [k for k in left if k not in returned and k not in failed]
        assert failed == {k: (k,) for k in wrong}
        assert came_out == dict.fromkeys(wrong, 1)
        assert returned == {*range(count)} - wrong


def worker_dies(folder: str) -> None:
    """Where MPI goes on without a killed process, another one runs its call again."""
    with make(1) as strategy:
        seen = variable_of(strategy, np.zeros(40, np.int64), "seen")
        coordinator = dv.ClusterCoordinator(strategy)
        mark = pathlib.Path(folder, "mark")

        def call(k):
            seen.scatter_add([k], [1])
            if k >= 7:
                with contextlib.suppress(FileExistsError):
                    mark.mkdir()
                    kill(os.getpid())
            return k

        values = [coordinator.schedule(call, (k,), once=True) for k in range(40)]
        coordinator.join()
        assert coordinator.fetch(values) == list(range(40))
        np.testing.assert_array_equal(seen, 1)
        assert coordinator.stats().repeated == 1
        print("survived", flush=True)


def all_workers_die() -> None:
    with make(1) as strategy:
        coordinator = dv.ClusterCoordinator(strategy)
        value = coordinator.schedule(lambda: kill(os.getpid()))
        with pytest.raises(WorkerLostError):
            coordinator.join()
        with pytest.raises(WorkerLostError):
            value.fetch()
        with pytest.raises(WorkerLostError, match=r"all workers of .* are lost"):
            coordinator.schedule(int)


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
