"""Replica contexts: collectives, disagreement, failures, and where contexts are valid."""

from __future__ import annotations

import contextvars
import threading
from decimal import Decimal
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from kinds import devices

import dvkernels as dv
from dvkernels.errors import (
    CollectiveMismatchError,
    ContextError,
)


@pytest.fixture(params=[1, 2, 3, 7])
def strategy(request):
    with dv.MirroredStrategy(devices(request.param)) as strategy:
        yield strategy


@pytest.fixture
def pair():
    with dv.MirroredStrategy(devices(2)) as strategy:
        yield strategy


def here():
    return dv.get_replica_context()


def rank():
    return here().replica_id_in_sync_group


def on_each(strategy, fn):
    return strategy.run(fn).values


# -- collectives ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "reduction"),
    [("sum", np.sum), ("MEAN", np.mean), ("min", np.min), ("Max", np.max), ("prod", np.prod)],
)
@pytest.mark.parametrize("algorithm", ["auto", "direct", "ring"])
def test_all_reduce(op, reduction, algorithm):
    n = 3
    inputs = np.random.default_rng(0).integers(1, 9, (n, 5, 2)).astype(np.float64)
    before = inputs.copy()
    devices = [f"cpu:{k}" for k in range(n)]
    with dv.MirroredStrategy(devices, cross_device_ops=algorithm) as strategy:
        results = on_each(strategy, lambda: here().all_reduce(op, inputs[rank()]))
    for result in results:
        np.testing.assert_array_equal(result, reduction(inputs, axis=0))
        assert not any(np.shares_memory(result, other) for other in (inputs, *inputs))
    np.testing.assert_array_equal(inputs, before)
    assert not np.shares_memory(results[0], results[1])


def test_a_pytree_keeps_its_structure(strategy):
    n = strategy.num_replicas_in_sync
    nest = {"a": np.arange(3.0), "b": [1.0, (np.int8(2), None)][:1], "c": ()}
    for result in on_each(strategy, lambda: [here().all_reduce("sum", nest)] and _seen(nest)):
        assert result == "a,b,c"
    reduced = strategy.run(lambda: here().all_reduce("sum", nest))
    assert reduced["a"].on(0).tolist() == [0, n, 2 * n]
    assert reduced["b"][0].on(0) == n
    assert reduced["b"][0].on(0).shape == ()


def _seen(nest):
    return ",".join(nest)


def test_weighted_mean_is_the_mean_of_all_examples(strategy):
    n = strategy.num_replicas_in_sync
    examples = np.random.default_rng(1).random(11)
    parts = np.array_split(examples, n + 1)[:n]
    expected = np.concatenate(parts).mean()

    def weighted():
        own = parts[rank()]
        mean = own.mean() if len(own) else np.nan
        return here().all_reduce("mean", mean, weight=len(own))

    np.testing.assert_allclose(on_each(strategy, weighted), expected, rtol=1e-14)


def test_gather_broadcast_scatter(strategy):
    n = strategy.num_replicas_in_sync
    gathered = on_each(strategy, lambda: here().all_gather(np.full((rank(), 2), rank())))
    expected = np.concatenate([np.full((r, 2), r) for r in range(n)])
    stacked = on_each(strategy, lambda: here().all_gather(rank()))
    sideways = on_each(strategy, lambda: here().all_gather(np.full((2, 1), rank()), axis=-1))
    last = on_each(strategy, lambda: here().broadcast(np.full(2, rank()), root=n - 1))
    whole = np.arange(10.0)
    parts = on_each(strategy, lambda: here().reduce_scatter("sum", whole))
    for r in range(n):
        np.testing.assert_array_equal(gathered[r], expected)
        assert stacked[r].tolist() == list(range(n))
        assert sideways[r].shape == (2, n)
        assert last[r].tolist() == [n - 1] * 2
        np.testing.assert_array_equal(parts[r], np.array_split(whole * n, n)[r])


def test_a_distributed_value_stands_for_the_own_component(pair):
    captured = pair.run(lambda: rank() + 1.0)
    with pair.scope():
        counter = dv.Variable(0.0, synchronization="on_read", aggregation="sum")

    def use():
        counter.assign(captured)
        return here().all_reduce("sum", captured), here().all_reduce("sum", counter)

    first, second = pair.run(use)
    assert (first.on(0), second.on(1)) == (3.0, 3.0)


def test_merge_call_runs_once_across_replicas(strategy):
    n = strategy.num_replicas_in_sync
    calls = []

    def merge(inner, own, scale):
        calls.append(threading.get_ident())
        assert inner is strategy
        assert dv.in_cross_replica_context()
        assert here() is None
        nested = inner.run(lambda x: x * 2, (own,))
        total = inner.reduce("sum", own)
        return inner.run(lambda x: x + 1, (own,)), {"total": total, "scale": scale}, nested

    def step():
        one, both, nested = here().merge_call(merge, (rank(),), {"scale": 3})
        assert here().replica_id_in_sync_group == rank()
        return one, both["total"], nested

    one, total, nested = strategy.run(step)
    assert len(calls) == 1
    assert one.values == tuple(r + 1 for r in range(n))
    assert nested.values == tuple(2 * r for r in range(n))
    assert all(value == sum(range(n)) for value in total.values)


# -- failures -------------------------------------------------------------------------------------


def test_an_error_caused_by_anothers_failure_does_not_hide_it(pair):
    def step():
        if rank() == 1:
            raise KeyError("the cause")
        try:
            here().barrier()
        except CollectiveMismatchError as error:
            raise RuntimeError("cleaning up") from error

    with pytest.raises(KeyError, match="the cause"):
        pair.run(step)


def test_an_exception_in_merge_call(strategy):
    def fail(_):
        raise LookupError("inside")

    with pytest.raises(LookupError, match="inside"):
        strategy.run(lambda: here().merge_call(fail))
    assert on_each(strategy, rank) == tuple(range(strategy.num_replicas_in_sync))


# -- the current context -------------------------------------------------------------------------


def test_an_independent_thread_is_outside_every_scope(pair):
    seen = []
    with pair.scope():
        thread = threading.Thread(target=lambda: seen.append(dv.has_strategy()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_replicas_see_the_callers_context_variables(pair):
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("set")
    assert on_each(pair, variable.get) == ("set", "set")
    on_each(pair, lambda: variable.set("changed") and rank())
    assert variable.get() == "set"


def test_a_shared_result_is_one_read_only_array():
    with dv.MirroredStrategy(devices(3)) as strategy:

        def step(op, value, **options):
            return dv.get_replica_context().all_reduce(op, value, shared=True, **options)

        ones = dv.PerReplica([np.full(5, 2.0 * k) for k in range(3)])
        first, *others = strategy.run(step, ("sum", ones)).values
        assert all(other is first for other in others)
        np.testing.assert_array_equal(first, np.full(5, 6.0))
        assert not first.flags.writeable
        weighted = strategy.run(step, ("mean", ones), {"weight": dv.PerReplica([0, 1, 3])})
        np.testing.assert_array_equal(weighted.on(2), np.full(5, 3.5))
        with pytest.raises(ValueError, match="cannot be shared"):
            strategy.run(lambda: step("sum", np.ones(2), out=np.ones(2)))


@pytest.mark.parametrize("dtype", ["f2", "bfloat16"])
def test_16_bit_floats_are_weighted_in_float32(dtype):
    half = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    values = [np.array([3.0, 257.0, 2049.0]).astype(half) for _ in range(3)]
    weights = (1.0, 2.0, 4.0)
    expected = sum(
        np.multiply(value, np.float32(weight / 7))
        for value, weight in zip(values, weights, strict=True)
    ).astype(half)
    with dv.MirroredStrategy(devices(3)) as strategy:
        for in_place in (False, True):

            def step(value, weight, in_place=in_place):
                out = {"out": value.copy()} if in_place else {}
                return dv.get_replica_context().all_reduce("mean", value, weight=weight, **out)

            results = strategy.run(step, (dv.PerReplica(values), dv.PerReplica(weights))).values
            for result in results:
                assert result.dtype == half
                np.testing.assert_array_equal(result, expected)
        total = strategy.reduce("sum", dv.PerReplica(values), axis=0)
        assert total == np.sum(np.array(values, "f4"), dtype="f4").astype(half)


@pytest.mark.parametrize(
    "weights",
    [
        (1e308, 1.5e308),
        (np.finfo(float).max,) * 2,
        (np.finfo(float).max, np.nextafter(np.finfo(float).max, 0)),
        (5e-324, 1e-323),
        (1e-310, 2.0),
        (2, 3),
        (Fraction(1, 3), Decimal("0.5")),
        (np.array([2.0]), np.float32(3)),
        (True, 10**300),
    ],
    ids=str,
)
def test_weights_of_any_size_give_the_mean(pair, weights):
    exact = [Fraction(w.item() if isinstance(w, (np.ndarray, np.generic)) else w) for w in weights]
    expected = float((exact[0] * 1 + exact[1] * 5) / sum(exact))
    for dtype, tolerance in (("f8", 1e-15), ("f4", 1e-6), ("f2", 1e-3)):
        found = on_each(
            pair,
            lambda dtype=dtype: here().all_reduce(
                "mean", np.array([1.0, 5.0][rank()], dtype), weight=weights[rank()]
            ),
        )
        np.testing.assert_allclose(found, expected, rtol=tolerance)


@pytest.mark.parametrize(
    "weight",
    [10**400, 10**5000, Decimal("1e400"), "2", b"2", np.ones(2), [], None.__class__, 1j, -1e-300,
     np.inf, np.nan, -(10**5000)],
    ids=lambda weight: f"{type(weight).__name__}",
)  # fmt: skip
def test_a_weight_that_is_not_a_finite_number_is_named(pair, weight):
    with pytest.raises(ValueError, match="a weight is a finite number of at least 0"):
        pair.run(lambda: here().all_reduce("mean", 1.0, weight=weight))


def test_merge_call_of_the_default_strategy_is_outside_every_scope(pair):
    with pair.scope():
        scoped = dv.Variable(1.0, aggregation="sum")
    default = dv.get_strategy()

    def look(strategy, value):
        scoped.assign_add(1.0)
        total = pair.reduce("sum", pair.run(lambda: scoped.assign_add(rank() + 1.0) or 1))
        with pair.scope():
            assert dv.get_strategy() is pair
            assert dv.has_strategy()
        made = dv.Variable(value.on(0))
        return (
            strategy is default,
            dv.get_strategy() is default,
            dv.has_strategy(),
            dv.in_cross_replica_context(),
            here() is None,
            int(total),
            made.owner is scoped.owner,
        )

    expected = (True, True, False, True, True, 2, False)
    assert here().merge_call(look, (2.0,)) == expected
    assert float(scoped) == 5.0
    seen = default.run(lambda: (dv.get_strategy() is default, dv.has_strategy()))
    assert [part.on(0) for part in seen] == [True, False]
    assert default.update(dv.Variable(1.0), lambda copy: dv.has_strategy()).on(0) is False


STRANGE = {
    "too long": lambda other: dv.PerReplica([1.0, 2.0, 3.0]),
    "too short": lambda other: dv.Mirrored([1.0]),
    "of another strategy": lambda other: other.run(lambda: 1.0),
}
USES = {
    "all_reduce": lambda v, x: here().all_reduce("sum", x),
    "all_gather": lambda v, x: here().all_gather({"in": [x]}),
    "all_reduce_async": lambda v, x: here().all_reduce_async("sum", x),
    "weight": lambda v, x: here().all_reduce("mean", 1.0, weight=x),
    "assign": lambda v, x: v.assign(x),
    "gradient": lambda v, x: dv.optimizers.SGD(1.0).apply_gradients([(x, v)]),
    "weight of gradients": lambda v, x: dv.optimizers.SGD(1.0).apply_gradients(
        [(1.0, v)], weight=x
    ),
}


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("use", USES)
def test_a_captured_value_must_have_a_component_per_local_replica(pair, use, strange):
    with pair.scope():
        variable = dv.Variable(1.0, aggregation="sum")
    with dv.MirroredStrategy(devices(2)) as other:
        value = STRANGE[strange](other)
    with pytest.raises(ContextError, match="a value for each of the 2 replicas"):
        pair.run(lambda: USES[use](variable, value))
    assert float(variable) == 1.0


@pytest.mark.parametrize("strange", STRANGE)
def test_merge_call_returns_components_of_one_per_replica_only(pair, strange):
    with dv.MirroredStrategy(devices(2)) as other:
        value = STRANGE[strange](other)
    if isinstance(value, dv.Mirrored):
        value = dv.PerReplica(value.values)
    with pytest.raises(ContextError, match="a value for each of the 2 replicas"):
        pair.run(lambda: here().merge_call(lambda _: [value]))


def test_another_strategys_variable_is_refused_in_a_replica(pair):
    with dv.OneDeviceStrategy(devices(1)[0]) as other, other.scope():
        variable = dv.Variable(1.0)
    with pytest.raises(ContextError, match="OneDeviceStrategy"):
        pair.run(lambda: here().all_reduce("sum", variable))
    unscoped = dv.Variable(1.0)
    assert pair.run(lambda: here().all_reduce("sum", unscoped))[0] == 2.0


@pytest.mark.parametrize(("mode", "value"), [("on_write", 3.0), ("on_read", 5.0), ("none", None)])
def test_outside_every_scope_another_strategys_variable_is_read_across_its_replicas(mode, value):
    # On the host, as the default strategy is.
    with dv.MirroredStrategy(2) as pair, pair.scope():
        variable = dv.Variable(3.0, synchronization=mode, aggregation="sum")
    if mode != "on_write":
        variable.assign(dv.PerReplica([1.0, 4.0]))
    lone, default = dv.Variable(0.0), dv.get_strategy()
    uses = (
        lambda: float(here().all_reduce("sum", variable)),
        lambda: lone.assign(variable) or float(lone),
    )
    for use in uses:
        if value is None:
            with pytest.raises((TypeError, ContextError), match="PerReplica"):
                use()  # which of its copies?
        else:
            assert use() == value
        # In a run of the default strategy they are under another strategy than their own.
        with pytest.raises(ContextError, match="belongs to"):
            default.run(use)
    for verb in (default.reduce, default.reduce_to):
        with pytest.raises(ContextError, match="of MirroredStrategy"):
            verb("sum", variable, *[lone][: verb == default.reduce_to])


def test_broadcast_to_takes_variables_of_its_strategy_and_of_none(pair):
    with pair.scope():
        own = dv.Variable(3.0)
    with dv.MirroredStrategy(devices(2)) as other, other.scope():
        alien = dv.Variable(4.0)
    assert float(pair.broadcast_to(own, devices(1)[0])[0]) == 3.0
    assert float(pair.broadcast_to(dv.Variable(5.0), own)[1]) == 5.0
    with pytest.raises(ContextError, match="a value for each of the 2 replicas"):
        pair.broadcast_to(alien, own)


def test_leaving_a_scope_that_was_not_entered_raises(pair):
    scope = pair.scope()
    with pytest.raises(ContextError, match="without having been entered"):
        scope.__exit__(None, None, None)
    with scope:
        pass
    with pytest.raises(ContextError, match="without having been entered"):
        scope.__exit__(None, None, None)
