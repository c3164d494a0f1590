"""Synchronization modes: each cell of the table, on several numbers of replicas."""

from __future__ import annotations

import numpy as np
import pytest
from kinds import devices

import dvkernels as dv
from dvkernels.errors import BufferMismatchError, ContextError

SIZES = [1, 2, 3]
AGGREGATIONS = ["none", "sum", "mean", "only_first_replica"]


@pytest.fixture(params=SIZES)
def strategy(request):
    with dv.MirroredStrategy(devices(request.param)) as strategy:
        yield strategy


def rank():
    return dv.get_replica_context().replica_id_in_sync_group


def make(strategy, value, **modes):
    with strategy.scope():
        return dv.Variable(value, **modes)


def copies(variable):
    return [value.tolist() for value in variable.values]


AGGREGATED = {
    "sum": lambda n: sum(range(1, n + 1)),
    "mean": lambda n: (n + 1) / 2,
    "only_first_replica": lambda n: 1,
}


@pytest.mark.parametrize("aggregation", AGGREGATED)
@pytest.mark.parametrize(
    ("verb", "result"),
    [
        ("assign", lambda old, x: x),
        ("assign_add", lambda old, x: old + x),
        ("assign_sub", lambda old, x: old - x),
    ],
)
def test_on_write_in_a_replica_writes_the_aggregate_to_every_copy(
    strategy, aggregation, verb, result
):
    n = strategy.num_replicas_in_sync
    variable = make(strategy, [10.0, 20.0], aggregation=aggregation)
    assert strategy.run(lambda: getattr(variable, verb)(np.full(2, rank() + 1.0))) is None
    x = AGGREGATED[aggregation](n)
    assert copies(variable) == [[result(10.0, x), result(20.0, x)]] * n


@pytest.mark.parametrize("number", [5.0, 0.0, 5])
def test_a_number_is_each_replicas_contribution(strategy, number):
    variable = make(strategy, 1.0, aggregation="sum")
    strategy.run(lambda: variable.assign(number))
    assert float(variable) == number * strategy.num_replicas_in_sync


def test_on_write_without_aggregation(strategy):
    variable = make(strategy, 1.0)
    if strategy.num_replicas_in_sync == 1:
        strategy.run(lambda: variable.assign(2.0))
        assert float(variable) == 2.0
        return
    with pytest.raises(ValueError, match="aggregation='none'"):
        strategy.run(lambda: variable.assign(2.0))
    assert copies(variable) == [1.0] * strategy.num_replicas_in_sync


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_on_write_across_replicas(strategy, aggregation):
    n = strategy.num_replicas_in_sync
    variable = make(strategy, 1.0, aggregation=aggregation)
    variable.assign(6.0)
    variable.assign_add(2.0)
    with strategy.scope():
        variable.assign_sub(1.0)
    assert copies(variable) == [7.0] * n
    with pytest.raises(ValueError, match="reduce"):
        variable.assign(dv.PerReplica([1.0] * n))
    assert copies(variable) == [7.0] * n


@pytest.mark.parametrize("synchronization", ["on_read", "none"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_own_copy_only(strategy, synchronization, aggregation):
    n = strategy.num_replicas_in_sync
    variable = make(strategy, 1.0, synchronization=synchronization, aggregation=aggregation)

    def write_and_read():
        variable.assign(float(rank()))
        variable.assign_add(2.0)
        variable.assign_sub(1.0)
        return float(variable.read_value())

    assert strategy.run(write_and_read).values == tuple(r + 1.0 for r in range(n))
    assert copies(variable) == [r + 1.0 for r in range(n)]


def test_on_read_across_replicas_aggregates(strategy):
    n = strategy.num_replicas_in_sync
    for aggregation, expected in AGGREGATED.items():
        variable = make(strategy, 0.0, synchronization="on_read", aggregation=aggregation)
        strategy.run(lambda v=variable: v.assign(rank() + 1.0))
        assert float(variable) == expected(n)
    variable = make(strategy, 0.0, synchronization="on_read")
    with pytest.raises(ValueError, match="not defined"):
        variable.read_value()


@pytest.mark.parametrize("aggregation", ["mean", "only_first_replica", "none"])
def test_on_read_assigned_across_replicas(strategy, aggregation):
    variable = make(strategy, 1.0, synchronization="on_read", aggregation=aggregation)
    variable.assign(6.0)
    variable.assign_add(1.0)
    assert copies(variable) == [7.0] * strategy.num_replicas_in_sync


@pytest.mark.parametrize(("dtype", "total"), [(np.float64, 7), (np.int64, 7), (np.int64, -7)])
def test_shares_of_an_on_read_sum_add_up(strategy, dtype, total):
    variable = make(strategy, np.zeros(2, dtype), synchronization="on_read", aggregation="sum")
    variable.assign(np.full(2, total, dtype))
    np.testing.assert_allclose(variable.numpy(), total, rtol=1e-15)
    assert max(map(max, copies(variable))) - min(map(min, copies(variable))) <= 1
    for verb in ("assign_add", "assign_sub"):
        with pytest.raises(ValueError, match="ON_READ with aggregation SUM"):
            getattr(variable, verb)(np.ones(2, dtype))


@pytest.mark.parametrize("synchronization", ["on_read", "none"])
def test_a_per_replica_sets_each_copy(strategy, synchronization):
    n = strategy.num_replicas_in_sync
    variable = make(strategy, 0.0, synchronization=synchronization, aggregation="sum")
    variable.assign(dv.PerReplica([float(r) for r in range(n)]))
    assert copies(variable) == [float(r) for r in range(n)]
    with pytest.raises(ContextError, match="replicas"):
        variable.assign(dv.PerReplica([1.0] * (n + 1)))


def test_a_none_variable_reads_as_all_copies_until_sync(strategy):
    n = strategy.num_replicas_in_sync
    variable = make(strategy, 0.0, synchronization="none")
    strategy.run(lambda: variable.assign(rank() + 1.0))
    assert isinstance(variable.read_value(), dv.PerReplica)
    variable.sync("max")
    assert copies(variable) == [float(n)] * n

    def write_and_sync():
        variable.assign(rank() + 1.0)
        variable.sync("mean")

    strategy.run(write_and_sync)
    assert copies(variable) == [(n + 1) / 2] * n
    with pytest.raises(ValueError, match="sync is for"):
        make(strategy, 0.0).sync()


@pytest.mark.parametrize("synchronization", ["on_write", "on_read", "none"])
def test_mean_of_integers_is_refused_at_creation(strategy, synchronization):
    with pytest.raises(ValueError, match="int64"):
        make(strategy, 1, synchronization=synchronization, aggregation="mean")


def test_the_initial_value_is_computed_once(strategy):
    calls = []

    def initial():
        calls.append(1)
        return np.random.default_rng().random(3)

    variable = make(strategy, initial)
    assert len(calls) == 1
    assert copies(variable) == [copies(variable)[0]] * strategy.num_replicas_in_sync
    made = []
    strategy.run(lambda: made.append(dv.Variable(initial)))
    assert len(calls) == 2
    assert all(variable is made[0] for variable in made)
    assert len(made[0].values) == strategy.num_replicas_in_sync


@pytest.mark.parametrize(
    "value", [np.ones(3), np.ones(2, np.float32), 1.0, [1.0], "ab", None, [[1.0], [2.0, 3.0]]]
)
def test_a_value_that_does_not_fit_changes_nothing(strategy, value):
    variable = make(strategy, [1.0, 2.0], aggregation="sum")
    for write in (variable.assign, variable.assign_add):
        with pytest.raises((BufferMismatchError, dv.errors.NotABufferError), match=r"float64\[2\]"):
            write(value)
        with pytest.raises((BufferMismatchError, dv.errors.NotABufferError), match=r"float64\[2\]"):
            strategy.run(write, (value,))
    assert copies(variable) == [[1.0, 2.0]] * strategy.num_replicas_in_sync


def test_numbers_take_the_dtype(strategy):
    variable = make(strategy, np.int8(1))
    variable.assign(7)
    assert variable.dtype == np.int8
    for wrong in (1.5, 300, 1j):
        with pytest.raises(TypeError, match="int8"):
            variable.assign(wrong)
    assert int(variable) == 7


def test_views_are_read_only(strategy):
    variable = make(strategy, [1.0, 2.0])
    for view in (variable.read_value(), *variable.values):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 9
    own = variable.numpy()
    own[0] = 9
    assert variable[0] == 1.0


def test_arithmetic_acts_on_the_value(strategy):
    variable = make(strategy, [1.0, 2.0])
    assert (variable + 1).tolist() == [2.0, 3.0]
    assert (1 - variable).tolist() == [0.0, -1.0]
    assert np.sqrt(variable).tolist() == np.sqrt([1.0, 2.0]).tolist()
    assert (variable == variable).all()
    assert len(variable) == 2
    assert float(variable @ variable) == 5.0
    with pytest.raises(TypeError):
        hash(variable)


def test_outside_every_scope_a_variable_has_one_copy():
    variable = dv.Variable(1.0)
    variable.assign_add(1.0)
    counter = dv.Variable(0.0, synchronization="on_read", aggregation="sum")
    counter.assign_add(3.0)
    assert (float(variable), float(counter)) == (2.0, 3.0)
    assert len(variable.values) == 1
    with dv.MirroredStrategy(devices(2)) as strategy:
        assert strategy.run(lambda: float(variable)).values == (2.0, 2.0)
        with pytest.raises(ContextError, match="outside every scope"):
            strategy.run(lambda: variable.assign(5.0))
    assert float(variable) == 2.0


def test_another_strategys_variable(strategy):
    variable = make(strategy, 1.0)
    with dv.MirroredStrategy(devices(2)) as other, other.scope():
        for use in (variable.read_value, lambda: variable.assign(2.0), lambda: variable + 1):
            with pytest.raises(ContextError, match="belongs to"):
                use()
    assert float(variable) == 1.0


@pytest.mark.parametrize("modes", [{"synchronization": "often"}, {"aggregation": "median"}])
def test_a_wrong_name_lists_the_right_ones(modes):
    with pytest.raises(ValueError, match="'none'"):
        dv.Variable(1.0, **modes)


def test_trainable_unless_on_read():
    assert dv.Variable(1.0).trainable
    assert not dv.Variable(1.0, synchronization="on_read").trainable
    assert dv.Variable(1.0, synchronization="on_read", trainable=True).trainable
    assert dv.Variable(1.0).synchronization is dv.VariableSynchronization.ON_WRITE
