"""Corner cases: views of written variables, nested runs, and exceptions of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from shorthands import context, replica, variable

import dvkernels as dv

VIEWS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda view: view,
    "transposed": lambda view: view.T,
    "reversed": lambda view: view[::-1],
    "one row for all": lambda view: np.broadcast_to(view[1], view.shape),
}
MATRIX = np.arange(9.0).reshape(3, 3)


@pytest.fixture
def two() -> Iterator[dv.Strategy]:
    with dv.MirroredStrategy(["cpu:0"] * 2) as made:
        yield made


WRITTEN = {"assign": lambda old, new: new, "assign_add": np.add, "assign_sub": np.subtract}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("method", WRITTEN)
@pytest.mark.parametrize("mode", ["on_write", "none"])
def test_a_view_of_a_variable_written_to_it_across_replicas(
    two: dv.Strategy, mode: str, method: str, view: str
) -> None:
    v = variable(two, MATRIX, synchronization=mode)
    getattr(v, method)(VIEWS[view](v.values[0]))
    for copy in v.values:
        assert np.array_equal(copy, WRITTEN[method](MATRIX, VIEWS[view](MATRIX)))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("aggregation", ["sum", "mean", "only_first_replica"])
@pytest.mark.parametrize("method", WRITTEN)
def test_a_view_of_a_variable_written_to_it_in_replicas(
    two: dv.Strategy, method: str, aggregation: str, view: str
) -> None:
    v = variable(two, MATRIX, aggregation=aggregation)
    two.run(lambda: getattr(v, method)(VIEWS[view](v.read_value())))
    given = VIEWS[view](MATRIX) * (2 if aggregation == "sum" else 1)
    for copy in v.values:
        assert np.array_equal(copy, WRITTEN[method](MATRIX, given))


def test_a_per_replica_of_swapped_copies(two: dv.Strategy) -> None:
    v = variable(two, MATRIX, synchronization="none")
    two.run(lambda: v.assign(np.full((3, 3), float(replica()))))
    first, second = v.values
    v.assign(dv.PerReplica([second, first]))
    assert [copy[0, 0] for copy in v.values] == [1.0, 0.0]


@pytest.mark.parametrize("scatter", ["scatter_add", "scatter_update", "scatter_max"])
def test_rows_of_a_variable_scattered_to_it(two: dv.Strategy, scatter: str) -> None:
    for across in (True, False):
        v = variable(two, MATRIX, aggregation="only_first_replica")

        def write(v: dv.Variable = v) -> None:
            getattr(v, scatter)([0, 1, 2], v.read_value()[::-1])

        write() if across else two.run(write)
        ufunc = {"scatter_add": np.add, "scatter_max": np.maximum}.get(
            scatter, lambda old, new: new
        )
        for copy in v.values:
            assert np.array_equal(copy, ufunc(MATRIX, MATRIX[::-1]))


def test_out_that_overlaps_the_value(two: dv.Strategy) -> None:
    memory = [np.arange(5.0) + at for at in range(2)]
    kept = [one.copy() for one in memory]
    for value, out in (
        (lambda own: own[:-1], lambda own: own[1:]),
        (lambda own: own, lambda own: own[::-1]),
        (lambda own: own, lambda own: memory[1 - replica()]),
    ):
        with pytest.raises(dv.errors.BufferMismatchError, match="overlaps"):
            two.run(
                lambda value=value, out=out: context().all_reduce(
                    "sum", value(memory[replica()]), out=out(memory[replica()])
                )
            )
        assert all(map(np.array_equal, memory, kept))


def test_one_array_on_all_replicas_gives_the_same_result_as_copies(strategy: dv.Strategy) -> None:
    same = np.arange(4.0)
    count = strategy.num_replicas_in_sync
    results = strategy.run(lambda: context().all_reduce("sum", same)).values
    assert all(np.array_equal(one, np.arange(4.0) * count) for one in results)
    assert not any(np.shares_memory(one, same) for one in results)
    assert np.array_equal(same, np.arange(4.0))


@pytest.mark.parametrize(
    "kind", [KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, BaseException]
)
def test_every_exception_leaves_run_unchanged(strategy: dv.Strategy, kind: Any) -> None:
    error = kind("mine")
    last = strategy.num_replicas_in_sync - 1

    def body() -> None:
        if replica() == last:
            raise error
        context().barrier()

    with pytest.raises(kind) as caught:
        strategy.run(body)
    assert caught.value is error
    assert strategy.run(replica).values == tuple(range(last + 1))


def test_merge_calls_and_runs_nest(strategy: dv.Strategy) -> None:
    count = strategy.num_replicas_in_sync
    v = variable(strategy, 0.0, aggregation="sum")

    def inner() -> Any:
        v.assign_add(1.0)
        return context().merge_call(lambda s: s.run(lambda: context().all_reduce("sum", 1.0)))

    def body() -> Any:
        result = context().merge_call(lambda s: s.run(inner))
        return float(result), float(context().all_reduce("sum", 1.0))

    seen = strategy.run(body)
    assert [leaf.values for leaf in seen] == [(float(count),) * count] * 2
    assert [float(copy) for copy in v.values] == [float(count)] * count


def test_a_failure_in_a_nested_run(two: dv.Strategy) -> None:
    def fails(strategy: dv.Strategy) -> None:
        strategy.run(lambda: {}["missing"] if replica() else context().barrier())

    with pytest.raises(KeyError, match="missing"):
        two.run(lambda: context().merge_call(fails))

    def caught(strategy: dv.Strategy) -> str:
        with pytest.raises(KeyError):
            fails(strategy)
        return "went on"

    def body() -> Any:
        said = context().merge_call(caught)
        return said, float(context().all_reduce("sum", 1.0))

    seen = two.run(body)  # only the nested step failed
    assert seen[0].values == ("went on",) * 2
    assert seen[1].values == (2.0, 2.0)


def test_variables_are_created_in_any_context(two: dv.Strategy) -> None:
    made: list[dv.Variable] = []

    def make(*_: Any) -> None:
        made.append(dv.Variable(lambda: np.ones(2), aggregation="sum"))

    two.run(lambda: context().merge_call(make))
    two.run(lambda: context().merge_call(lambda strategy: strategy.run(make)))
    assert len(made) == 3
    assert made[1] is made[2]
    for v in made:
        two.run(lambda v=v: v.assign(np.ones(2)))
        assert [copy.tolist() for copy in v.values] == [[2.0, 2.0]] * 2
    with pytest.raises(ZeroDivisionError):
        two.run(lambda: dv.Variable(lambda: 1 / 0))
    with pytest.raises((TypeError, ValueError), match="PerReplica"):
        variable(two, dv.PerReplica([1.0, 2.0]))


def test_the_order_of_dict_keys_does_not_matter(two: dv.Strategy) -> None:
    def body() -> Any:
        given = {"a": 1.0, "b": 2.0} if replica() else {"b": 2.0, "a": 1.0}
        return context().all_reduce("sum", given)

    result = two.run(body)
    assert (float(result["a"][0]), float(result["b"][1])) == (2.0, 4.0)
    assert context().all_reduce("sum", {}) == {}
    assert two.run(lambda: context().all_reduce("sum", [])) == []


def test_a_captured_weight_means_the_own_component(two: dv.Strategy) -> None:
    weights = two.run(lambda: replica() + 1.0)
    result = two.run(
        lambda: context().all_reduce("mean", np.array(3.0 * replica()), weight=weights)
    )
    assert [float(one) for one in result.values] == [2.0, 2.0]


def test_weights_of_any_number_type(two: dv.Strategy) -> None:
    for weight in (True, 2, 2.5, np.float32(2), np.int8(3), np.array(1.5)):
        result = two.run(lambda w=weight: context().all_reduce("mean", np.ones(2), weight=w))
        assert result[1].tolist() == [1.0, 1.0]
    for weight in (np.ones(2), [1.0], 1j, "many"):
        with pytest.raises((ValueError, TypeError)):
            two.run(lambda w=weight: context().all_reduce("mean", np.ones(2), weight=w))
