"""Variables: every cell of the table of modes, scatter, dtypes, shapes and copies."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from kinds import devices, host
from shorthands import replica, variable

import dvkernels as dv

WRITES = ("assign", "assign_add", "assign_sub")
ORDERED = ("scatter_min", "scatter_max", "scatter_update")
SCATTERS = ("scatter_add", "scatter_sub", "scatter_mul", "scatter_div", *ORDERED)
AGGREGATIONS = ("none", "sum", "mean", "only_first_replica")


@pytest.fixture(params=[1, 2, 3])
def strategy(request: pytest.FixtureRequest) -> Iterator[dv.Strategy]:
    with dv.MirroredStrategy(devices(request.param)) as strategy:
        yield strategy


@pytest.fixture
def central() -> Iterator[dv.Strategy]:
    with dv.CentralStorageStrategy(devices(2), devices(1)[0]) as strategy:
        yield strategy


def held(of: dv.Variable) -> list[Any]:
    return [one.tolist() for one in of.values]


def own(strategy: dv.Strategy, *values: Any) -> dv.PerReplica:
    return strategy.distribute_values_from_function(
        lambda context: values[context.replica_id_in_sync_group]
    )


# Replica r of n writes r + 1.
AGGREGATED: dict[str, Callable[[int], float]] = {
    "sum": lambda n: n * (n + 1) / 2,
    "mean": lambda n: (n + 1) / 2,
    "only_first_replica": lambda n: 1.0,
}
WRITTEN: dict[str, Callable[[float, float], float]] = {
    "assign": lambda old, x: x,
    "assign_add": operator.add,
    "assign_sub": operator.sub,
}


@pytest.mark.parametrize("aggregation", AGGREGATED)
@pytest.mark.parametrize("mode", ["auto", "on_write"])
def test_on_write_in_replicas(strategy: dv.Strategy, mode: str, aggregation: str) -> None:
    n = strategy.num_replicas_in_sync
    for method, written in WRITTEN.items():
        v = variable(strategy, [10.0, 20.0], synchronization=mode, aggregation=aggregation)
        seen = strategy.run(
            lambda v=v, m=method: (getattr(v, m)(np.full(2, replica() + 1.0)), v.numpy())
        )
        expected = [written(old, AGGREGATED[aggregation](n)) for old in (10.0, 20.0)]
        assert held(v) == [expected] * n
        assert seen[0] is None
        assert [one.tolist() for one in seen[1].values] == [expected] * n


@pytest.mark.parametrize("number", [5.0, 0.0, 5, np.float64(5)])
def test_a_literal_is_the_contribution_of_each_replica(strategy: dv.Strategy, number: Any) -> None:
    n = strategy.num_replicas_in_sync
    v = variable(strategy, 1.0, aggregation="sum")
    strategy.run(lambda: v.assign(number))
    assert held(v) == [n * number] * n


def test_a_captured_value_means_the_own_component(two: dv.Strategy) -> None:
    v = variable(two, 1.0, aggregation="sum")
    given = own(two, *np.array([1, 2], v.dtype))
    two.run(lambda: v.assign(given))
    assert held(v) == [3.0, 3.0]
    other = variable(two, 3.0, aggregation="mean")
    two.run(lambda: v.assign(other))
    assert held(v) == [6.0, 6.0]


@pytest.mark.parametrize("method", WRITES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_on_write_across_replicas(strategy: dv.Strategy, aggregation: str, method: str) -> None:
    n, expected = strategy.num_replicas_in_sync, WRITTEN[method](1.0, 6.0)
    v = variable(strategy, 1.0, aggregation=aggregation)
    with strategy.scope():
        assert getattr(v, method)(6.0) is None
    assert held(v) == [expected] * n
    v.assign(dv.Mirrored([1.0] * n))
    assert getattr(v, method)(6.0) is None  # outside every scope
    assert held(v) == [expected] * n
    with pytest.raises(ValueError, match="reduce"):
        getattr(v, method)(own(strategy, *[2.0] * n))
    assert held(v) == [expected] * n


@pytest.mark.parametrize("method", WRITES)
def test_on_write_without_aggregation_is_refused_in_replicas(two: dv.Strategy, method: str) -> None:
    v = variable(two, 1.0, name="bare")
    with pytest.raises(ValueError, match="bare"):
        two.run(lambda: getattr(v, method)(1.0))
    assert held(v) == [1.0, 1.0]


def test_a_single_replica_needs_no_aggregation() -> None:
    for strategy in (dv.MirroredStrategy(devices(1)), dv.OneDeviceStrategy(devices(1)[0])):
        with strategy:
            v = variable(strategy, 1.0)
            strategy.run(lambda v=v: v.assign_add(1.0))
            assert held(v) == [2.0]
    lone = dv.Variable(1.0)
    lone.assign_add(1.0)
    assert held(lone) == [2.0]


@pytest.mark.parametrize("mode", ["on_read", "none"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_own_copy_only_in_replicas(strategy: dv.Strategy, mode: str, aggregation: str) -> None:
    n = strategy.num_replicas_in_sync
    v = variable(strategy, 1.0, synchronization=mode, aggregation=aggregation)
    for method, written in WRITTEN.items():
        v.assign(own(strategy, *np.ones(n)))
        seen = strategy.run(lambda m=method: (getattr(v, m)(replica() + 1.0), float(v)))
        expected = [written(1.0, at + 1.0) for at in range(n)]
        assert held(v) == expected
        assert list(seen[1].values) == expected


@pytest.mark.parametrize("aggregation", AGGREGATED)
def test_on_read_reads_the_aggregate(strategy: dv.Strategy, aggregation: str) -> None:
    n = strategy.num_replicas_in_sync
    v = variable(strategy, 0.0, synchronization="on_read", aggregation=aggregation)
    strategy.run(lambda: v.assign(replica() + 1.0))
    with strategy.scope():
        assert v.read_value() == AGGREGATED[aggregation](n)
    assert v.numpy() == float(v) == v + 0 == AGGREGATED[aggregation](n)
    assert v.numpy().dtype == v.dtype
    assert held(v) == [at + 1.0 for at in range(n)]


def test_on_read_without_aggregation_reads_nothing_across(two: dv.Strategy) -> None:
    v = variable(two, 0.0, synchronization="on_read", name="bare")
    two.run(lambda: v.assign(replica() + 1.0))
    with pytest.raises(ValueError, match="bare"):
        v.read_value()
    assert held(v) == [1.0, 2.0]  # but each copy can be read
    assert two.reduce("sum", v) == 3.0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_on_read_written_across(strategy: dv.Strategy, aggregation: str) -> None:
    n = strategy.num_replicas_in_sync
    for method, written in WRITTEN.items():
        v = variable(strategy, 1.0, synchronization="on_read", aggregation=aggregation)
        if aggregation != "sum":
            getattr(v, method)(6.0)
            assert held(v) == [written(1.0, 6.0)] * n
        elif method != "assign":
            for value in (6.0, own(strategy, *[6.0] * n)):
                with pytest.raises(ValueError, match=f"{method}.*ON_READ with aggregation SUM"):
                    getattr(v, method)(value)
            assert held(v) == [1.0] * n
    v.assign(6.0)
    if aggregation != "none":
        np.testing.assert_allclose(v.numpy(), 6.0, rtol=1e-15)
    assert max(held(v)) == min(held(v))


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i4", "i8", "u8"])
def test_shares_of_an_integer_add_up_to_it(replicas: int, dtype: str) -> None:
    limits = np.iinfo(dtype)
    totals = np.array([0, 1, 7, limits.min, limits.max, limits.max - 1], dtype)
    with dv.MirroredStrategy(devices(replicas)) as strategy:
        v = variable(strategy, np.zeros(6, dtype), synchronization="on_read", aggregation="sum")
        v.assign(totals)
        assert np.array_equal(v.numpy(), totals)
        shares = np.array(held(v), object)
        assert np.all(shares.sum(0) == totals.astype(object))  # without wrapping
        assert np.all(shares.max(0) - shares.min(0) <= 1)


@pytest.mark.parametrize("mode", ["on_read", "none"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_per_replica_sets_each_copy(strategy: dv.Strategy, mode: str, aggregation: str) -> None:
    n = strategy.num_replicas_in_sync
    v = variable(strategy, np.zeros(2), synchronization=mode, aggregation=aggregation)
    given = own(strategy, *(np.array([at, at + 2.0]) for at in range(n)))
    with strategy.scope():
        v.assign(given)
    given[0][:] = 9.0
    assert held(v) == [[at, at + 2.0] for at in range(n)]
    with pytest.raises(dv.errors.ContextError, match="replicas"):
        v.assign(dv.PerReplica([np.ones(2)] * (n + 1)))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_copies_of_a_none_variable_differ_until_sync(
    strategy: dv.Strategy, aggregation: str
) -> None:
    n = strategy.num_replicas_in_sync
    v = variable(strategy, 0.0, synchronization="none", aggregation=aggregation)
    apart = [at + 1.0 for at in range(n)]
    strategy.run(lambda: v.assign(replica() + 1.0))
    both = v.read_value()
    assert isinstance(both, dv.PerReplica)
    assert [float(one) for one in both.values] == apart
    v.sync()
    assert held(v) == [(n + 1) / 2] * n
    v.assign(4.0)
    assert held(v) == [4.0] * n
    v.assign_add(own(strategy, *np.array(apart)))
    assert held(v) == [4.0 + one for one in apart]
    v.sync("max")
    assert held(v) == [4.0 + n] * n
    with pytest.raises(ValueError, match=r"(?i)mean"):
        v.sync("mode")
    assert held(v) == [4.0 + n] * n

    def write_and_sync() -> None:
        v.assign(replica() + 1.0)
        v.sync("mean")

    strategy.run(write_and_sync)
    assert held(v) == [(n + 1) / 2] * n


def test_sync_of_several_variables_is_one_collective(two: dv.Strategy) -> None:
    loose = [variable(two, np.zeros(size), synchronization="none") for size in (1, 2, 3)]
    fixed = variable(two, 0.0)
    two.run(lambda: [v.assign(np.full(v.shape, replica() + 1.0)) for v in loose])
    dv.sync(loose)
    assert [held(v) for v in loose] == [[[1.5] * size] * 2 for size in (1, 2, 3)]
    two.run(lambda: [v.assign(np.full(v.shape, replica() + 1.0)) for v in loose] and None)
    two.run(lambda: dv.sync(loose, "max"))
    assert [held(v) for v in loose] == [[[2.0] * size] * 2 for size in (1, 2, 3)]
    integer = variable(two, 1, dtype="i4", synchronization="none")
    two.run(lambda: [v.assign(np.full(v.shape, replica() + 1.0)) for v in loose])
    with pytest.raises((ValueError, TypeError)):
        dv.sync([*loose, integer], "mean")  # all or none
    assert [held(v) for v in loose] == [[[1.0] * size, [2.0] * size] for size in (1, 2, 3)]
    with dv.MirroredStrategy(devices(2)) as other:
        foreign = variable(other, 0.0, synchronization="none")
    for wrong, error, words in (
        (fixed, ValueError, "sync is for synchronization='none'"),
        (foreign, dv.errors.ContextError, "sync them apart"),
        (np.zeros(1), TypeError, "sync needs variables"),
    ):
        with pytest.raises(error, match=words):
            dv.sync([*loose, wrong])
    assert dv.sync([]) is None
    assert [held(v) for v in loose] == [[[1.0] * size, [2.0] * size] for size in (1, 2, 3)]


@pytest.mark.parametrize("dtype", ["i1", "i4", "u8", "?"])
@pytest.mark.parametrize("mode", ["auto", "on_write", "on_read", "none"])
def test_mean_of_integers_is_refused_at_creation(two: dv.Strategy, mode: str, dtype: str) -> None:
    with two.scope(), pytest.raises(ValueError, match=r"(?i)mean"):
        dv.Variable(np.ones(2, dtype), aggregation="mean", synchronization=mode)


@pytest.mark.parametrize("mode", ["on_read", "none"])
def test_central_storage_refuses_modes_with_a_copy_per_replica(
    central: dv.Strategy, mode: str
) -> None:
    with central.scope(), pytest.raises(ValueError, match="(?i)" + mode):
        dv.Variable(1.0, synchronization=mode)
    with central.scope(), pytest.raises(ValueError, match=r"(?i)mean"):
        dv.Variable(1, aggregation="mean")


def test_central_storage_aggregates_the_values_of_all_replicas(central: dv.Strategy) -> None:
    for aggregation, expected in (("sum", 3.0), ("mean", 1.5), ("only_first_replica", 1.0)):
        v = variable(central, 1.0, aggregation=aggregation)
        seen = central.run(lambda v=v: (v.assign(replica() + 1.0), float(v)))
        assert held(v) == [expected]
        assert list(seen[1].values) == [expected] * 2
        v.assign_add(1.0)
        assert float(v) == expected + 1
        with pytest.raises(ValueError, match="reduce"):
            v.assign(own(central, 1.0, 2.0))
        assert held(v) == [expected + 1]
    bare = variable(central, 1.0)
    with pytest.raises(ValueError, match=r"(?i)aggregation"):
        central.run(lambda: bare.assign(2.0))
    assert held(bare) == [1.0]


# Replica i writes value i + 2 at index i; the copies start at [4, 8].
@pytest.mark.parametrize(
    ("method", "summed", "averaged", "first"),
    [
        ("scatter_add", [6, 11], [5, 9.5], [6, 8]),
        ("scatter_sub", [2, 5], [3, 6.5], [2, 8]),
        ("scatter_mul", [8, 24], [4, 12], [8, 8]),
        ("scatter_div", [2, 8 / 3], [4, 8 / 1.5], [2, 8]),
        ("scatter_min", None, None, [2, 8]),
        ("scatter_max", None, None, [4, 8]),
        ("scatter_update", None, None, [2, 8]),
    ],
)
@pytest.mark.parametrize("one_copy", [False, True])
def test_scatter_of_all_replicas(
    two: dv.Strategy,
    central: dv.Strategy,
    one_copy: bool,
    method: str,
    summed: Any,
    averaged: Any,
    first: Any,
) -> None:
    strategy = central if one_copy else two
    expected = {"sum": summed, "mean": averaged, "only_first_replica": first, "none": None}
    for aggregation, result in expected.items():
        v = variable(strategy, np.array([4.0, 8.0]), aggregation=aggregation)

        def write(v: dv.Variable = v) -> None:
            at = replica()
            assert getattr(v, method)(np.array([at]), np.array([at + 2.0])) is None

        if result is None:
            with pytest.raises(ValueError, match=f"(?i){aggregation}"):
                strategy.run(write)
            result = [4.0, 8.0]
        else:
            strategy.run(write)
        for one in v.values:
            np.testing.assert_allclose(one.tolist(), result, rtol=1e-15)
        assert len({one.tobytes() for one in v.values}) == 1


def test_scatter_of_different_lengths_with_duplicate_rows(two: dv.Strategy) -> None:
    v = variable(two, np.zeros((3, 2)), aggregation="sum")

    def write() -> None:
        indices = [[0, 0, 2], []][replica()]
        v.scatter_add(np.array(indices, int), np.ones((len(indices), 2)))

    two.run(write)
    assert held(v) == [[[2, 2], [0, 0], [1, 1]]] * 2
    two.run(lambda: v.scatter_sub([0] * (replica() + 1), np.ones((replica() + 1, 2))))
    assert held(v) == [[[-1, -1], [0, 0], [1, 1]]] * 2


@pytest.mark.parametrize(("value", "by"), [(7, 2), (-7, 2), (7, -2), (-7, -2)])
def test_integer_scatter_div_floors(two: dv.Strategy, value: int, by: int) -> None:
    v = variable(two, np.array([value, value], "i4"), aggregation="only_first_replica")
    two.run(lambda: v.scatter_div([0], np.array([by], "i4")))
    assert held(v) == [[value // by, value]] * 2


@pytest.mark.parametrize("method", SCATTERS)
def test_scatter_on_own_copies(two: dv.Strategy, method: str) -> None:
    loose = variable(two, np.array([4.0, 8.0]), synchronization="none")
    two.run(lambda: getattr(loose, method)([replica()], np.array([replica() + 2.0])))
    expected = {
        "scatter_add": [[6, 8], [4, 11]],
        "scatter_sub": [[2, 8], [4, 5]],
        "scatter_mul": [[8, 8], [4, 24]],
        "scatter_div": [[2, 8], [4, 8 / 3]],
        "scatter_min": [[2, 8], [4, 3]],
        "scatter_max": [[4, 8], [4, 8]],
        "scatter_update": [[2, 8], [4, 3]],
    }
    assert held(loose) == expected[method]


@pytest.mark.parametrize("method", SCATTERS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_scatter_on_metrics_is_refused(two: dv.Strategy, method: str, aggregation: str) -> None:
    metric = variable(two, np.array([4.0, 8.0]), synchronization="on_read", aggregation=aggregation)
    with pytest.raises(ValueError, match=r"(?i)on_read"):
        two.run(lambda: getattr(metric, method)([0], np.ones(1)))
    with pytest.raises(ValueError, match=r"(?i)on_read"):
        getattr(metric, method)([0], np.ones(1))
    assert held(metric) == [[4.0, 8.0]] * 2


@pytest.mark.parametrize(
    ("method", "aggregation"),
    [
        *itertools.product(SCATTERS, ["only_first_replica"]),
        *itertools.product(SCATTERS[:4], ["sum", "mean"]),
    ],
)
@pytest.mark.parametrize("wrong", [2, 100, -3])
def test_scatter_out_of_range(two: dv.Strategy, method: str, aggregation: str, wrong: int) -> None:
    v = variable(two, np.array([4.0, 8.0]), aggregation=aggregation, name="rows")

    def write() -> None:
        getattr(v, method)([0, wrong], np.ones(2))

    for act in (write, lambda: two.run(write)):
        with pytest.raises(IndexError, match=rf"(?s)rows.*{wrong}|{wrong}.*rows"):
            act()
        assert held(v) == [[4.0, 8.0]] * 2


def test_scatter_with_wrong_indices_on_one_replica(two: dv.Strategy) -> None:
    v = variable(two, np.array([4.0, 8.0]), aggregation="sum")
    good = np.array([0]), np.ones(1)
    for wrong, error in (
        ((np.array([5]), np.ones(1)), IndexError),
        ((np.array([0]), np.ones(2)), ValueError),
        ((np.array([0]), np.ones(1, "f4")), ValueError),
        ((np.array([0.5]), np.ones(1)), (TypeError, IndexError, ValueError)),
        ((np.array([0]), np.ones((1, 1))), ValueError),
    ):
        with pytest.raises(error) as caught:
            two.run(lambda wrong=wrong: v.scatter_add(*(wrong if replica() == 1 else good)))
        notes = " ".join(getattr(caught.value, "__notes__", ()))
        assert "replica 1" in f"{caught.value} {notes}"
        assert held(v) == [[4.0, 8.0]] * 2


def test_scatter_across_replicas_reaches_every_copy(two: dv.Strategy) -> None:
    for mode in ("on_write", "none"):
        v = variable(two, np.array([4.0, 8.0]), synchronization=mode)
        v.scatter_add([1, 1], np.array([1.0, 2.0]))
        with two.scope():
            v.scatter_mul([0], np.array([3.0]))
        assert held(v) == [[12.0, 11.0]] * 2


@pytest.mark.parametrize("mode", ["on_write", "on_read", "none"])
@pytest.mark.parametrize("method", WRITES)
@pytest.mark.parametrize(
    "wrong", [np.zeros(3, "f4"), np.zeros((2, 1), "f4"), np.zeros(2, "f8"), np.zeros(2, "i4")]
)
def test_a_value_that_does_not_fit_is_named(
    two: dv.Strategy, mode: str, method: str, wrong: Any
) -> None:
    v = variable(
        two, np.ones(2, "f4"), name="w", synchronization=mode, aggregation="only_first_replica"
    )
    for write in (
        lambda: getattr(v, method)(wrong),
        lambda: two.run(lambda: getattr(v, method)(wrong)),
        lambda: two.run(
            lambda: (
                getattr(v, method)(wrong if replica() == 1 else np.zeros(2, "f4"))
                or (mode == "on_write" or replica() == 1)
            )
        ),
    ):
        before = held(v)
        with pytest.raises((ValueError, TypeError)) as caught:
            write()
        assert isinstance(caught.value, dv.errors.DvKernelsError)
        said = str(caught.value)
        assert "'w'" in said
        assert "float32" in said
        assert str(wrong.dtype) in said
        assert all(str(length) in said for length in wrong.shape)
        if mode == "on_write":
            assert held(v) == before
        else:  # the replica with valid input may have written its own copy
            assert held(v)[1] == before[1]
            assert held(v)[0] in (before[0], [0.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i8", "u1", "c8", "c16"])
def test_numbers_take_the_dtype(two: dv.Strategy, dtype: str) -> None:
    v = variable(two, np.ones((), dtype), aggregation="sum")
    v.assign(3)
    two.run(lambda: v.assign_add(1))
    assert held(v) == [5, 5]
    assert {one.dtype for one in v.values} == {np.dtype(dtype)}


@pytest.mark.parametrize(("dtype", "number"), [("i4", 1.5), ("u1", -1), ("i1", 300), ("f4", 1j)])
def test_a_number_that_the_dtype_cannot_hold(two: dv.Strategy, dtype: str, number: Any) -> None:
    v = variable(two, np.ones((), dtype), aggregation="sum")
    for write in (lambda: v.assign(number), lambda: two.run(lambda: v.assign(number))):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            write()
        assert held(v) == [1, 1]


@pytest.mark.parametrize("wrong", ["text", None, object(), [[1.0], [1.0, 2.0]], 1.0, [1.0]])
def test_not_an_array_of_this_shape(strategy: dv.Strategy, wrong: Any) -> None:
    v = variable(strategy, [1.0, 2.0], aggregation="sum")
    error = (dv.errors.BufferMismatchError, dv.errors.NotABufferError)
    for write in (v.assign, v.assign_add):
        for act in (write, lambda x, write=write: strategy.run(write, (x,))):
            with pytest.raises(error, match=r"float64\[2\]"):
                act(wrong)
    assert held(v) == [[1.0, 2.0]] * strategy.num_replicas_in_sync
    if wrong not in (1.0, [1.0]):
        with strategy.scope(), pytest.raises(dv.errors.NotABufferError):
            dv.Variable(wrong)


def test_views_are_read_only_and_copies_are_new_arrays(two: dv.Strategy) -> None:
    first = np.ones(3)
    v = variable(two, first)
    first[:] = 9.0
    for view in (v.read_value(), *v.values, v.on(0), v.on(1)):
        assert np.all(view == 1.0)
        with pytest.raises(ValueError, match="read-only"):
            view[:] = 2.0
        assert not view.flags.writeable
    copied = v.numpy()
    copied[:] = 5.0
    assert held(v) == [[1.0] * 3] * 2
    given = np.full(3, 2.0)
    v.assign(given)
    given[:] = 7.0
    assert held(v) == [[2.0] * 3] * 2
    assert not np.shares_memory(v.values[0], v.values[1])
    with pytest.raises((IndexError, dv.errors.DvKernelsError)):
        v.on(2)


def test_a_variable_is_a_distributed_value(two: dv.Strategy) -> None:
    v = variable(two, np.arange(6.0).reshape(2, 3), name="w")
    assert isinstance(v, dv.Variable)
    assert isinstance(v, dv.DistributedValues)
    assert (v.name, v.shape, v.dtype, v.trainable) == ("w", (2, 3), np.dtype("f8"), True)
    assert v.synchronization is dv.VariableSynchronization.ON_WRITE
    assert v.aggregation is dv.VariableAggregation.NONE
    assert [str(device) for device in v.devices] == devices(2)
    assert len(v) == 2
    assert v[1, 2] == 5.0
    assert np.array_equal(np.asarray(v), np.arange(6.0).reshape(2, 3))
    assert np.array_equal(host(2 * v + 1), np.arange(1.0, 13, 2).reshape(2, 3))
    assert np.array_equal(host(1 - v), 1 - v.numpy())
    assert np.array_equal(host(np.sqrt(v)), np.sqrt(v.numpy()))
    assert np.array_equal(host(v @ v.read_value().T), v.numpy() @ v.numpy().T)
    assert (v == v).all()
    with pytest.raises(AttributeError):
        v.values = ()


def test_trainable_unless_on_read(two: dv.Strategy) -> None:
    for mode in ("auto", "none", "on_write", "on_read"):
        assert variable(two, 1.0, synchronization=mode).trainable is (mode != "on_read")
        for given in (True, False):
            assert variable(two, 1.0, synchronization=mode, trainable=given).trainable is given


def test_modes_are_taken_by_name_and_wrong_ones_list_the_right_ones(two: dv.Strategy) -> None:
    for name, given in itertools.product(("ON_READ", "on_read", "On_Read"), ("SUM", "sum")):
        v = variable(two, 1.0, synchronization=name, aggregation=given)
        assert v.synchronization is dv.VariableSynchronization.ON_READ
        assert v.aggregation is dv.VariableAggregation.SUM
    with two.scope():
        with pytest.raises(ValueError, match=r"(?is)on_write.*on_read|on_read.*on_write"):
            dv.Variable(1.0, synchronization="sometimes")
        with pytest.raises(ValueError, match=r"(?is)only_first_replica"):
            dv.Variable(1.0, aggregation="median")


def test_the_initial_value_is_computed_once(two: dv.Strategy) -> None:
    calls: list[int] = []

    def initial() -> Any:
        calls.append(1)
        return np.random.default_rng().normal(size=4)

    v = variable(two, initial)
    made: list[dv.Variable] = []
    two.run(lambda: made.append(dv.Variable(initial, aggregation="sum")))
    assert len(calls) == 2
    assert made[0] is made[1]
    assert held(v)[0] == held(v)[1]
    assert held(made[0])[0] == held(made[0])[1]


def test_different_creations_inside_run(two: dv.Strategy) -> None:
    for make in (
        lambda: dv.Variable(1.0, name=f"name_{replica()}"),
        lambda: dv.Variable(1.0, aggregation=["sum", "mean"][replica()]),
        lambda: dv.Variable(1.0) if replica() == 0 else None,
        lambda: dv.Variable(1.0) if replica() else dv.get_replica_context().barrier(),
    ):
        with pytest.raises(dv.errors.CollectiveMismatchError, match="replica 1"):
            two.run(make)
    assert two.run(replica).values == (0, 1)


def test_a_variable_created_outside_every_scope(two: dv.Strategy) -> None:
    counter = dv.Variable(0.0, synchronization="on_read", aggregation="sum")
    counter.assign_add(3.0)
    assert float(counter) == 3.0
    lone = dv.Variable(np.ones(2))
    assert [one.tolist() for one in two.run(lambda: lone.numpy()).values] == [[1.0, 1.0]] * 2
    for write in (
        lambda: lone.assign(np.zeros(2)),
        lambda: lone.assign_add(np.ones(2)),
        lambda: lone.scatter_add([0], np.ones(1)),
    ):
        with pytest.raises(dv.errors.ContextError, match="outside every scope"):
            two.run(write)
        assert lone.numpy().tolist() == [1.0, 1.0]
    assert len(lone.values) == 1


@pytest.mark.parametrize("mode", ["on_write", "on_read", "none"])
def test_another_strategys_variable(two: dv.Strategy, mode: str) -> None:
    v = variable(two, 1.0, synchronization=mode, aggregation="sum")
    with dv.MirroredStrategy(devices(3)) as other:
        uses: list[Callable[[], Any]] = [
            lambda: v.assign(2.0),
            lambda: v.assign_add(2.0),
            lambda: v.read_value(),
            lambda: v.numpy(),
            lambda: v + 1,
        ]
        for use in uses:
            with pytest.raises(dv.errors.ContextError, match="belongs to"):
                other.run(use)
            with other.scope(), pytest.raises(dv.errors.ContextError, match="belongs to"):
                use()
        with pytest.raises(dv.errors.ContextError):
            other.reduce("sum", v)
        with pytest.raises(dv.errors.ContextError):
            other.run(lambda given: given.numpy(), args=(v,))
    assert held(v) == [1.0, 1.0]


def test_a_write_reaches_all_copies_or_none(two: dv.Strategy) -> None:
    v = variable(two, np.zeros(2), aggregation="sum")

    def body() -> None:
        if replica() == 1:
            raise RuntimeError("before the write")
        v.assign(np.ones(2))

    with pytest.raises(RuntimeError, match="before the write"):
        two.run(body)
    assert held(v) == [[0.0, 0.0]] * 2
    bad = own(two, np.ones(2), np.ones(3))
    for mode in ("on_read", "none"):
        loose = variable(two, np.zeros(2), synchronization=mode)
        with pytest.raises(ValueError, match="3"):
            loose.assign(bad)
        assert held(loose) == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("mode", ["on_write", "on_read", "none"])
def test_a_deep_copy_is_another_variable(two: dv.Strategy, mode: str) -> None:
    v = variable(
        two, np.zeros(2), synchronization=mode, aggregation="sum", name="w", trainable=False
    )
    if mode == "on_write":
        v.assign(np.ones(2))
    else:
        v.assign(own(two, np.ones(2), np.full(2, 2.0)))
    before = held(v)
    inside, outside = None, copy.deepcopy(v)
    with two.scope():
        inside = copy.deepcopy({"nested": [v, v]})["nested"]
    assert inside[0] is inside[1]
    for other in (inside[0], outside):
        assert other is not v
        assert held(other) == before
        assert (other.name, other.trainable) == ("w", False)
        assert (other.synchronization, other.aggregation) == (v.synchronization, v.aggregation)
        assert other.devices == v.devices
        two.run(lambda other=other: other.assign(np.full(2, 5.0)))
        assert held(v) == before
        v_before = held(other)
        v.assign(own(two, *v.values) if mode != "on_write" else v.numpy())
        assert held(other) == v_before
    with pytest.raises(dv.errors.ContextError):
        two.run(lambda: copy.deepcopy(v))


def test_truth_and_hash(two: dv.Strategy) -> None:
    v = variable(two, np.array([1.0, 2.0]))
    with pytest.raises((ValueError, TypeError)):
        bool(v)
    with pytest.raises(TypeError):
        hash(v)
    assert "1." in repr(variable(two, 1.0)) or "float" in repr(variable(two, 1.0))


@pytest.mark.parametrize("content", [2.0, [2.0], [1.0, 2.0]])
@pytest.mark.parametrize("make", [lambda: dv.OneDeviceStrategy("cpu:0"), dv.get_strategy])
def test_a_none_variable_of_one_replica_is_its_copy(content: Any, make: Any) -> None:
    strategy = make()
    one = variable(strategy, np.array(content), synchronization="none")
    np.testing.assert_array_equal(one.numpy(), content)
    np.testing.assert_array_equal(np.asarray(one), content)
    if one.shape == ():
        assert (float(one), int(one), complex(one), bool(one)) == (2, 2, 2, 1)
        assert [10, 20, 30][variable(strategy, np.array(1), synchronization="none")] == 20
    if isinstance(strategy, dv.OneDeviceStrategy):
        assert isinstance(one.read_value(), dv.PerReplica)
        assert len(one.read_value()) == 1


def test_a_none_variable_of_several_replicas_is_no_single_value(two: dv.Strategy) -> None:
    several = variable(two, 2.0, synchronization="none")
    for convert in (float, np.asarray, lambda v: v.numpy()):
        with pytest.raises(TypeError, match="local_results"):
            convert(several)


@pytest.mark.parametrize("mode", ["on_write", "on_read", "none"])
@pytest.mark.parametrize("indices", [[2, 0, 2], [], 1, [[0, 1], [1, 2]], np.array([1], "u1")])
def test_gather_rows_are_those_of_the_value(two: dv.Strategy, mode: str, indices: Any) -> None:
    table = np.arange(6.0).reshape(3, 2)
    of = variable(two, table, synchronization=mode, aggregation="mean")
    expected = table[np.asarray(indices, int)]
    inside = two.run(lambda: of.gather_rows(indices))
    across = of.gather_rows(indices)
    found = [*inside.values, *(across.values if mode == "none" else [across])]
    for one in found:
        np.testing.assert_array_equal(host(one), expected)
        assert host(one).shape == expected.shape
        one[...] = 7.0  # owned by the caller
    assert held(of) == [table.tolist()] * 2
    own_rows = two.run(
        lambda rows: of.gather_rows(rows), (own(two, np.array([0]), np.array([1, 2])),)
    )
    assert [len(one) for one in own_rows.values] == [1, 2]


@pytest.mark.parametrize(
    ("indices", "error"),
    [
        ([3], IndexError),
        ([-1], IndexError),
        ([0.5], dv.errors.NotABufferError),
        (["0"], dv.errors.NotABufferError),
        ([True], dv.errors.NotABufferError),
        (np.ma.array([0], mask=[1]), dv.errors.NotABufferError),
    ],
)
def test_gather_rows_refuses(two: dv.Strategy, indices: Any, error: type[Exception]) -> None:
    of = variable(two, np.zeros((3, 2)))
    for ask in (lambda: of.gather_rows(indices), lambda: two.run(lambda: of.gather_rows(indices))):
        with pytest.raises(error, match="gather_rows of variable"):
            ask()
    with pytest.raises(dv.errors.BufferMismatchError, match="no rows"):
        variable(two, 1.0).gather_rows([0])
