"""Laws of strategies, those of the package and third-party ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dvkernels import context, replica_context
from dvkernels.data.dataset import Dataset
from dvkernels.devices import array_memory, interop
from dvkernels.errors import (
    BufferMismatchError,
    CollectiveMismatchError,
    ContextError,
    SynchronizationError,
)
from dvkernels.strategies.base import Strategy
from dvkernels.values.distributed import Mirrored, PerReplica
from dvkernels.variables.variable import Variable
from dvkernels.variables.writes import sync

__all__ = ["check_strategy"]


def check_strategy(make: Callable[[int], Strategy], replicas: Sequence[int] = (1, 2, 3)) -> None:
    """Assert the laws of a strategy.

    Parameters
    ----------
    make : callable
        Called with a number of replicas; returns a strategy, which is closed in the end. The
        replicas may be spread over several processes, each of which calls this function.
    replicas : sequence of int
        Numbers of replicas to test.

    Raises
    ------
    AssertionError
        A law is broken; the message names it and the number of replicas.

    Notes
    -----
    Covered are contexts, collectives, values, every kind of variable that the strategy supports,
    ``merge_call`` with ``run`` inside, datasets, maps, random draws, and failures: the exception of
    a replica is re-raised as it is, replicas that disagree raise ``CollectiveMismatchError``,
    variables stay unchanged, and the next step works.

    Examples
    --------
    >>> import dvkernels as dv
    >>> from dvkernels.testing import check_strategy
    >>> check_strategy(lambda n: dv.MirroredStrategy([f"cpu:{k}" for k in range(n)]))
    """
    for count in replicas:
        for law in _LAWS:
            with make(count) as strategy:
                try:
                    law(strategy, count)
                except AssertionError as error:
                    error.add_note(f"law: {law.__name__[1:]}, with {count} replicas")
                    raise
    with make(replicas[0]) as strategy:
        strategy.close()
        _assert_raises(ContextError, lambda: strategy.run(_rank))


def _replica_context() -> replica_context.ReplicaContext:
    replica = replica_context.get_replica_context()
    assert replica is not None, "there is no replica context in run"
    return replica


def _rank() -> int:
    return _replica_context().replica_id_in_sync_group


def _local(strategy: Strategy) -> tuple[int, ...]:
    """Return the ids of the replicas of this process."""
    made = strategy.distribute_values_from_function(lambda here: here.replica_id_in_sync_group)
    ids: tuple[int, ...] = made.values
    assert ids == tuple(range(ids[0], ids[0] + len(ids))), f"local ids are {ids}"
    return ids


def _assert_raises(kind: type[BaseException], call: Callable[[], Any]) -> BaseException:
    try:
        result = call()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, and {result!r} was returned")


def _on_device(value: Any) -> Any:
    """Return an array on the device of this replica."""
    return array_memory.on_device(np.asarray(value), _replica_context().device)


def _on_host(value: Any) -> Any:
    return array_memory.holding(value).to_host(value) if interop.is_foreign(value) else value


def _kept(strategy: Strategy, value: Any) -> Any:
    """Return an array in the dtype that the strategy keeps: JAX may have 32 bits for 64."""
    return value.astype(strategy.placement.memory.kept_dtype(value.dtype))


def _assert_equal(result: Any, expected: Any, message: str) -> None:
    np.testing.assert_array_equal(_on_host(result), _on_host(expected), err_msg=message)


def _run_calls_each_replica_once(strategy: Strategy, count: int) -> None:
    local = _local(strategy)
    assert strategy.num_replicas_in_sync == count, "num_replicas_in_sync"
    assert len(strategy.worker_devices) == len(local), "worker_devices"
    result = strategy.run(lambda x: (_rank(), x, _replica_context().num_replicas_in_sync), (7,))
    assert isinstance(result[0], PerReplica), "run returns PerReplica leaves"
    assert result[0].values == local, f"ids are {result[0].values}"
    assert [result[0].on(rank) for rank in local] == [*local], "ids of components are global"
    assert result[1].values == (7,) * len(local), "arguments"
    assert strategy.run(lambda: None) is None, "None from all replicas is None"
    with strategy.scope():
        assert context.get_strategy() is strategy, "scope sets the strategy"
        assert context.in_cross_replica_context(), "scope is cross-replica context"


def _collectives_combine_all_replicas(strategy: Strategy, count: int) -> None:
    width = max(3, count)

    def step() -> Any:
        here, own = _replica_context(), _on_device(np.full(width, float(_rank() + 1)))
        total = here.all_reduce("sum", own)
        mean = here.all_reduce("mean", own, weight=float(_rank() == 0))
        pending = here.all_reduce_async("max", {"own": own})
        whole = here.all_gather(own[: _rank() + 1])
        root = here.broadcast(own, root=count - 1)
        here.barrier()
        part = here.reduce_scatter("sum", own)
        plain = here.all_reduce("sum", _rank() + 1)
        into = _on_device(np.zeros(width))
        if array_memory.holding(into).is_writable(into):
            assert here.all_reduce("sum", own, out=into) is into, "out is returned"
        else:
            _assert_raises(BufferMismatchError, lambda: here.all_reduce("sum", own, out=into))
            into = here.all_reduce("sum", own)
        same = here.all_reduce("sum", own, shared=True)
        assert type(total) is type(own), "results are of the inputs' library"
        return total, mean, pending.wait()["own"], whole, root, part, plain, into, same

    total, mean, largest, whole, root, part, plain, into, same = strategy.run(step)
    all_values = np.arange(1.0, count + 1)
    for rank in _local(strategy):
        _assert_equal(total[rank], np.full(width, all_values.sum()), "all_reduce")
        _assert_equal(mean[rank], np.ones(width), "all_reduce of weight 0 but for replica 0")
        _assert_equal(largest[rank], np.full(width, float(count)), "all_reduce_async")
        _assert_equal(whole[rank], np.repeat(all_values, np.arange(1, count + 1)), "all_gather")
        _assert_equal(root[rank], np.full(width, float(count)), "broadcast")
        expected = np.array_split(np.full(width, all_values.sum()), count)[rank]
        _assert_equal(part[rank], expected, "reduce_scatter")
        _assert_equal(plain[rank], int(all_values.sum()), "all_reduce of a number")
        _assert_equal(into[rank], np.full(width, all_values.sum()), "all_reduce into out")
        _assert_equal(same[rank], np.full(width, all_values.sum()), "all_reduce, shared")


def _values_are_reduced_and_gathered(strategy: Strategy, count: int) -> None:
    value = strategy.run(lambda: _on_device(np.array([_rank(), 1.0])))
    ranks = float(sum(range(count)))
    _assert_equal(strategy.reduce("sum", value), [ranks, count], "reduce")
    _assert_equal(
        strategy.reduce("mean", value, axis=0), (ranks + count) / (2 * count), "reduce, axis 0"
    )
    _assert_equal(
        strategy.gather(value), [x for rank in range(count) for x in (rank, 1.0)], "gather"
    )
    wide = strategy.run(lambda: _on_device(np.full((2, _rank() + 1), _rank())))
    expected = np.concatenate([np.full((2, rank + 1), rank) for rank in range(count)], 1)
    _assert_equal(strategy.gather(wide, axis=1), expected, "gather, axis 1")
    _assert_equal(strategy.gather(wide, axis=-1), expected, "gather, axis -1")
    local = _local(strategy)
    for rank, result in zip(local, strategy.local_results(value), strict=True):
        _assert_equal(result, [rank, 1.0], "local_results, in replica order")
    made = strategy.distribute_values_from_function(
        lambda here: (here.replica_id_in_sync_group, here.num_replicas_in_sync)
    )
    assert made[0].values == local, "distribute_values_from_function, ids"
    assert made[1].values == (count,) * len(local), "distribute_values_from_function, count"
    mirrored = strategy.reduce_to("sum", value, value)
    assert isinstance(mirrored, Mirrored), "reduce_to gives Mirrored"
    _assert_equal(strategy.broadcast_to(3.0, value).values[0], 3.0, "broadcast_to")


def _writes_follow_the_modes(strategy: Strategy, count: int) -> None:
    ranks = np.arange(1.0, count + 1)
    expected_by_case = {"sum": ranks.sum(), "mean": ranks.mean(), "only_first_replica": 1.0}
    for aggregation, expected in expected_by_case.items():
        with strategy.scope():
            variable = Variable(_kept(strategy, np.zeros(2)), aggregation=aggregation)
        strategy.run(lambda v=variable: v.assign(_on_device(np.full(2, _rank() + 1.0))))
        for copy in variable.values:
            _assert_equal(copy, [expected, expected], f"ON_WRITE, {aggregation}")
        variable.assign_add(np.ones(2))
        strategy.update(variable, lambda copy: copy.assign_sub(np.ones(2)))
        _assert_equal(variable.numpy(), [expected, expected], "writes across replicas, and update")
        with strategy.scope():
            try:
                metric = Variable(0.0, synchronization="on_read", aggregation=aggregation)
            except SynchronizationError:
                continue  # a strategy of a single copy
        strategy.run(lambda m=metric: m.assign_add(_rank() + 1.0))
        _assert_equal(metric.numpy(), expected, f"ON_READ, {aggregation}")
        with strategy.scope():
            own = Variable(0.0, synchronization="none")
        strategy.run(lambda v=own: v.assign(float(_rank())))
        local = _local(strategy)
        assert [float(copy) for copy in own.values] == [*local], (
            "NONE: each copy is written by its own replica"
        )
        sync(own, "max")
        assert [float(copy) for copy in own.values] == [count - 1.0] * len(local), "sync"


def _scatter_writes_rows(strategy: Strategy, count: int) -> None:
    expected_by_case = {
        "scatter_add": [6.0 + count * (count + 1) / 2, 8.0 + count, 6.0],
        "scatter_sub": [6.0 - count * (count + 1) / 2, 8.0 - count, 6.0],
        "scatter_mul": [6.0 * np.prod(np.arange(1.0, count + 1)), 8.0, 6.0],
        "scatter_div": [6.0 / np.prod(np.arange(1.0, count + 1)), 8.0, 6.0],
    }
    for verb, expected in expected_by_case.items():
        with strategy.scope():
            table = Variable([6.0, 8.0, 6.0], aggregation="sum")

        def step(table: Variable = table, verb: str = verb) -> None:
            updates = _on_device(np.array([_rank() + 1.0, 1.0]))
            getattr(table, verb)([0, 1], updates)

        strategy.run(step)
        for copy in table.values:
            rounding = 45 * np.finfo(table.dtype).eps
            np.testing.assert_allclose(_on_host(copy), expected, rtol=rounding, err_msg=verb)
    with strategy.scope():
        empty = _kept(strategy, np.zeros((3, 2), np.int64))
        table = Variable(empty, aggregation="only_first_replica")
    rows = np.array([[1, 1], [2, 2], [3, 3]])
    strategy.run(lambda: table.scatter_update([2, 0, 2], _on_device(rows)))
    _assert_equal(table.numpy(), [[2, 2], [0, 0], [3, 3]], "scatter_update: the last update stays")
    table.scatter_max([0, 0, 0], np.array([[5, 1], [4, 9], [0, 0]]))
    _assert_equal(table.numpy(), [[5, 9], [0, 0], [3, 3]], "scatter_max: all updates count")


def _merge_call_runs_once(strategy: Strategy, count: int) -> None:
    calls: list[int] = []

    def merge(merging: Strategy, value: Any) -> Any:
        calls.append(1)
        assert merging is strategy, "merge_call passes its strategy"
        assert context.in_cross_replica_context(), "merge_call is cross-replica context"
        again = merging.run(lambda x: x + 1, (value,))
        return merging.reduce("sum", again)

    result = strategy.run(lambda: _replica_context().merge_call(merge, (_rank(),)))
    assert len(calls) == 1, "merge_call calls once in a process"
    expected = sum(range(count)) + count
    assert [int(v) for v in result.values] == [expected] * len(result.values), "merge_call"


def _every_element_is_delivered_once(strategy: Strategy, count: int) -> None:
    data = Dataset.range(11).batch(4)
    seen: list[int] = []
    for batch in strategy.distribute_dataset(data):
        seen += strategy.gather(batch).tolist()
    assert seen == [*range(11)], f"a dataset of 0 to 10 gave {seen}"


def _each_item_is_mapped_once(strategy: Strategy, count: int) -> None:
    local, squares = _local(strategy), [k * k for k in range(7)]
    found = list(strategy.map(lambda k: (k * k, _rank() in local), range(7)))
    assert found == [(square, True) for square in squares], f"map of 0 to 6 gave {found}"
    assert sorted(strategy.map(lambda k: k * k, range(7), ordered=False)) == squares, "unordered"
    _assert_raises(ContextError, lambda: list(strategy.map(lambda _: _meet(), [0])))
    with strategy.map(lambda k: k, range(7)):
        _assert_raises(ContextError, lambda: strategy.run(_rank))


def _meet() -> None:
    _replica_context().barrier()


def _failures_end_the_step_only(strategy: Strategy, count: int) -> None:
    with strategy.scope():
        variable = Variable(1.0, aggregation="sum")

    def fails() -> None:
        if _rank() == count - 1:
            raise ZeroDivisionError("of a replica")
        variable.assign(2.0)

    def disagrees() -> None:
        if _rank() == count - 1:
            _replica_context().barrier()
        else:
            variable.assign(2.0)

    has_failed = count - 1 in _local(strategy)
    kind = ZeroDivisionError if has_failed else CollectiveMismatchError
    error = _assert_raises(kind, lambda: strategy.run(fails))
    assert "of a replica" in str(error), "a replica's exception comes out as it is"
    if count > 1:
        _assert_raises(CollectiveMismatchError, lambda: strategy.run(disagrees))
    _assert_equal(variable.numpy(), 1.0, "a variable after failed steps")
    strategy.run(lambda: variable.assign_add(1.0))
    _assert_equal(variable.numpy(), 1.0 + count, "the next step")
    _assert_raises(ContextError, lambda: strategy.run(lambda: strategy.run(_rank)))


def _draws_depend_on_seed_step_and_replica(strategy: Strategy, count: int) -> None:
    def draw() -> Any:
        return _replica_context().rng("of this law").integers(2**62)

    def two_steps() -> list[Any]:
        return [_on_host(strategy.gather(strategy.run(draw))).tolist() for _ in range(2)]

    before = strategy.state_dict()
    drawn = two_steps()
    assert len({*drawn[0], *drawn[1]}) == 2 * count, f"draws are not independent: {drawn}"
    strategy.load_state_dict(before)
    again = two_steps()
    assert again == drawn, f"draws after a resume are {again}, and were {drawn}"


_LAWS = (
    _run_calls_each_replica_once,
    _collectives_combine_all_replicas,
    _values_are_reduced_and_gathered,
    _writes_follow_the_modes,
    _scatter_writes_rows,
    _merge_call_runs_once,
    _every_element_is_delivered_once,
    _each_item_is_mapped_once,
    _draws_depend_on_seed_step_and_replica,
    _failures_end_the_step_only,
)
