"""What every strategy must do, ours and others'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dvkernels import context
from dvkernels.data.dataset import Dataset
from dvkernels.devices import array_memory, interop
from dvkernels.errors import CollectiveMismatchError, ContextError, SynchronizationError
from dvkernels.strategies.base import Strategy
from dvkernels.values.distributed import Mirrored, PerReplica
from dvkernels.variables.variable import Variable, sync

__all__ = ["check_strategy"]


def check_strategy(make: Callable[[int], Strategy], replicas: Sequence[int] = (1, 2, 3)) -> None:
    """Assert the laws of a strategy.

    Parameters
    ----------
    make : callable
        Makes a strategy of so many replicas. It is closed in the end. They may be spread over
        several processes, of which each calls this.
    replicas : sequence of int
        Numbers of replicas to try.

    Raises
    ------
    AssertionError
        A law is broken; the message names it and the number of replicas.

    Notes
    -----
    Contexts, collectives, values, every kind of variable that the strategy allows, merges with a
    run inside, datasets, and failures: a replica's exception comes out as it is, replicas that
    disagree are told so, variables are as before, and the next step works.

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
        _expect(ContextError, lambda: strategy.run(_rank))


def _here() -> context.ReplicaContext:
    replica = context.get_replica_context()
    assert replica is not None, "there is no replica context in run"
    return replica


def _rank() -> int:
    return _here().replica_id_in_sync_group


def _local(strategy: Strategy) -> tuple[int, ...]:
    """Return the ids of the replicas of this process."""
    made = strategy.distribute_values_from_function(lambda here: here.replica_id_in_sync_group)
    ids: tuple[int, ...] = made.values
    assert ids == tuple(range(ids[0], ids[0] + len(ids))), f"local ids are {ids}"
    return ids


def _expect(kind: type[BaseException], call: Callable[[], Any]) -> BaseException:
    try:
        found = call()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, and {found!r} was returned")


def _on_device(value: Any) -> Any:
    """Return an array where this replica computes."""
    return array_memory.on_device(np.asarray(value), _here().device)


def _on_host(value: Any) -> Any:
    return array_memory.gpu().to_host(value) if interop.is_on_gpu(value) else np.asarray(value)


def _same(found: Any, right: Any, what: str) -> None:
    np.testing.assert_array_equal(_on_host(found), _on_host(right), err_msg=what)


def _run_calls_each_replica_once(strategy: Strategy, count: int) -> None:
    local = _local(strategy)
    assert strategy.num_replicas_in_sync == count, "num_replicas_in_sync"
    assert len(strategy.worker_devices) == len(local), "worker_devices"
    found = strategy.run(lambda x: (_rank(), x, _here().num_replicas_in_sync), (7,))
    assert isinstance(found[0], PerReplica), "run returns PerReplica leaves"
    assert found[0].values == local, f"ids are {found[0].values}"
    assert [found[0].on(rank) for rank in local] == [*local], "ids of components are global"
    assert found[1].values == (7,) * len(local), "arguments"
    assert strategy.run(lambda: None) is None, "None from all replicas is None"
    with strategy.scope():
        assert context.get_strategy() is strategy, "scope sets the strategy"
        assert context.in_cross_replica_context(), "scope is cross-replica context"


def _collectives_bring_replicas_together(strategy: Strategy, count: int) -> None:
    width = max(3, count)

    def step() -> Any:
        here, own = _here(), _on_device(np.full(width, float(_rank() + 1)))
        total = here.all_reduce("sum", own)
        mean = here.all_reduce("mean", own, weight=float(_rank() == 0))
        pending = here.all_reduce_async("max", {"own": own})
        whole = here.all_gather(own[: _rank() + 1])
        root = here.broadcast(own, root=count - 1)
        here.barrier()
        part = here.reduce_scatter("sum", own)
        plain = here.all_reduce("sum", _rank() + 1)
        into = _on_device(np.zeros(width))
        assert here.all_reduce("sum", own, out=into) is into, "out is returned"
        same = here.all_reduce("sum", own, shared=True)
        assert type(total) is type(own), "results are of the kind of what came"
        return total, mean, pending.wait()["own"], whole, root, part, plain, into, same

    total, mean, largest, whole, root, part, plain, into, same = strategy.run(step)
    all_values = np.arange(1.0, count + 1)
    for rank in _local(strategy):
        _same(total[rank], np.full(width, all_values.sum()), "all_reduce")
        _same(mean[rank], np.ones(width), "all_reduce of weight 0 but for replica 0")
        _same(largest[rank], np.full(width, float(count)), "all_reduce_async")
        _same(whole[rank], np.repeat(all_values, np.arange(1, count + 1)), "all_gather")
        _same(root[rank], np.full(width, float(count)), "broadcast")
        right = np.array_split(np.full(width, all_values.sum()), count)[rank]
        _same(part[rank], right, "reduce_scatter")
        _same(plain[rank], int(all_values.sum()), "all_reduce of a number")
        _same(into[rank], np.full(width, all_values.sum()), "all_reduce into out")
        _same(same[rank], np.full(width, all_values.sum()), "all_reduce, shared")


def _values_are_reduced_and_gathered(strategy: Strategy, count: int) -> None:
    value = strategy.run(lambda: _on_device(np.array([_rank(), 1.0])))
    ranks = float(sum(range(count)))
    _same(strategy.reduce("sum", value), [ranks, count], "reduce")
    _same(strategy.reduce("mean", value, axis=0), (ranks + count) / (2 * count), "reduce, axis 0")
    _same(strategy.gather(value), [x for rank in range(count) for x in (rank, 1.0)], "gather")
    wide = strategy.run(lambda: _on_device(np.full((2, _rank() + 1), _rank())))
    right = np.concatenate([np.full((2, rank + 1), rank) for rank in range(count)], 1)
    _same(strategy.gather(wide, axis=1), right, "gather, axis 1")
    _same(strategy.gather(wide, axis=-1), right, "gather, axis -1")
    local = _local(strategy)
    for rank, held in zip(local, strategy.local_results(value), strict=True):
        _same(held, [rank, 1.0], "local_results, in replica order")
    made = strategy.distribute_values_from_function(
        lambda here: (here.replica_id_in_sync_group, here.num_replicas_in_sync)
    )
    assert made[0].values == local, "distribute_values_from_function, ids"
    assert made[1].values == (count,) * len(local), "distribute_values_from_function, count"
    mirrored = strategy.reduce_to("sum", value, value)
    assert isinstance(mirrored, Mirrored), "reduce_to gives Mirrored"
    _same(strategy.broadcast_to(3.0, value).values[0], 3.0, "broadcast_to")


def _writes_follow_the_modes(strategy: Strategy, count: int) -> None:
    ranks = np.arange(1.0, count + 1)
    rights = {"sum": ranks.sum(), "mean": ranks.mean(), "only_first_replica": 1.0}
    for aggregation, right in rights.items():
        with strategy.scope():
            variable = Variable(np.zeros(2), aggregation=aggregation)
        strategy.run(lambda v=variable: v.assign(_on_device(np.full(2, _rank() + 1.0))))
        for copy in variable.values:
            _same(copy, [right, right], f"ON_WRITE, {aggregation}")
        variable.assign_add(np.ones(2))
        strategy.update(variable, lambda copy: copy.assign_sub(np.ones(2)))
        _same(variable.numpy(), [right, right], "writes across replicas, and update")
        with strategy.scope():
            try:
                metric = Variable(0.0, synchronization="on_read", aggregation=aggregation)
            except SynchronizationError:
                continue  # a strategy of a single copy
        strategy.run(lambda m=metric: m.assign_add(_rank() + 1.0))
        _same(metric.numpy(), right, f"ON_READ, {aggregation}")
        with strategy.scope():
            own = Variable(0.0, synchronization="none")
        strategy.run(lambda v=own: v.assign(float(_rank())))
        local = _local(strategy)
        assert [float(copy) for copy in own.values] == [*local], "NONE stays apart"
        sync(own, "max")
        assert [float(copy) for copy in own.values] == [count - 1.0] * len(local), "sync"


def _rows_are_written(strategy: Strategy, count: int) -> None:
    rights = {
        "scatter_add": [6.0 + count * (count + 1) / 2, 8.0 + count, 6.0],
        "scatter_sub": [6.0 - count * (count + 1) / 2, 8.0 - count, 6.0],
        "scatter_mul": [6.0 * np.prod(np.arange(1.0, count + 1)), 8.0, 6.0],
        "scatter_div": [6.0 / np.prod(np.arange(1.0, count + 1)), 8.0, 6.0],
    }
    for verb, right in rights.items():
        with strategy.scope():
            table = Variable([6.0, 8.0, 6.0], aggregation="sum")

        def step(table: Variable = table, verb: str = verb) -> None:
            updates = _on_device(np.array([_rank() + 1.0, 1.0]))
            getattr(table, verb)([0, 1], updates)

        strategy.run(step)
        for copy in table.values:
            np.testing.assert_allclose(_on_host(copy), right, rtol=1e-14, err_msg=verb)
    with strategy.scope():
        table = Variable(np.zeros((3, 2), np.int64), aggregation="only_first_replica")
    rows = np.array([[1, 1], [2, 2], [3, 3]])
    strategy.run(lambda: table.scatter_update([2, 0, 2], _on_device(rows)))
    _same(table.numpy(), [[2, 2], [0, 0], [3, 3]], "scatter_update: the last stays")
    table.scatter_max([0, 0, 0], np.array([[5, 1], [4, 9], [0, 0]]))
    _same(table.numpy(), [[5, 9], [0, 0], [3, 3]], "scatter_max: all count")


def _merges_run_once(strategy: Strategy, count: int) -> None:
    calls: list[int] = []

    def merge(merging: Strategy, value: Any) -> Any:
        calls.append(1)
        assert merging is strategy, "merge_call passes its strategy"
        assert context.in_cross_replica_context(), "merge_call is cross-replica context"
        again = merging.run(lambda x: x + 1, (value,))
        return merging.reduce("sum", again)

    found = strategy.run(lambda: _here().merge_call(merge, (_rank(),)))
    assert len(calls) == 1, "merge_call calls once in a process"
    right = sum(range(count)) + count
    assert [int(v) for v in found.values] == [right] * len(found.values), "merge_call"


def _every_element_comes_once(strategy: Strategy, count: int) -> None:
    data = Dataset.range(11).batch(4)
    seen: list[int] = []
    for batch in strategy.distribute_dataset(data):
        seen += strategy.gather(batch).tolist()
    assert seen == [*range(11)], f"a dataset of 0 to 10 gave {seen}"


def _failures_end_the_step_only(strategy: Strategy, count: int) -> None:
    with strategy.scope():
        variable = Variable(1.0, aggregation="sum")

    def fails() -> None:
        if _rank() == count - 1:
            raise ZeroDivisionError("of a replica")
        variable.assign(2.0)

    def disagrees() -> None:
        if _rank() == count - 1:
            _here().barrier()
        else:
            variable.assign(2.0)

    has_failed = count - 1 in _local(strategy)
    kind = ZeroDivisionError if has_failed else CollectiveMismatchError
    error = _expect(kind, lambda: strategy.run(fails))
    assert "of a replica" in str(error), "a replica's exception comes out as it is"
    if count > 1:
        _expect(CollectiveMismatchError, lambda: strategy.run(disagrees))
    _same(variable.numpy(), 1.0, "a variable after failed steps")
    strategy.run(lambda: variable.assign_add(1.0))
    _same(variable.numpy(), 1.0 + count, "the next step")
    _expect(ContextError, lambda: strategy.run(lambda: strategy.run(_rank)))


_LAWS = (
    _run_calls_each_replica_once,
    _collectives_bring_replicas_together,
    _values_are_reduced_and_gathered,
    _writes_follow_the_modes,
    _rows_are_written,
    _merges_run_once,
    _every_element_comes_once,
    _failures_end_the_step_only,
)
