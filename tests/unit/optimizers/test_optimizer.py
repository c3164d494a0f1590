"""Optimizers: all copies of variables and slots are equal, and as on a single device."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import numpy as np
import pytest
from kinds import devices

import dvkernels as dv
from dvkernels.errors import (
    BufferMismatchError,
    CollectiveMismatchError,
    ContextError,
    SynchronizationError,
    UnsupportedDTypeError,
)

MAKERS = [
    lambda: dv.optimizers.SGD(0.1),
    lambda: dv.optimizers.SGD(lambda step: 0.1 / (1 + step), momentum=0.9, nesterov=True),
    lambda: dv.optimizers.Adam(0.1, weight_decay=0.01),
    lambda: dv.optimizers.AdamW(0.1),
]


def gradients(replica, step):
    rng = np.random.default_rng((replica, step))
    return rng.standard_normal((4, 3)), rng.standard_normal(3)


def trained(strategy, make, num_replicas, in_replicas=True):
    optimizer = make()
    with strategy.scope():
        weights = dv.Variable(np.ones((4, 3))), dv.Variable(np.zeros(3))

    def step(number):
        own = gradients(dv.get_replica_context().replica_id_in_sync_group, number)
        optimizer.apply_gradients(zip(own, weights, strict=True))

    for number in range(5):
        if in_replicas:
            strategy.run(step, (number,))
        else:
            rows = [gradients(rank, number) for rank in range(num_replicas)]
            columns = [dv.PerReplica(list(column)) for column in zip(*rows, strict=True)]
            optimizer.apply_gradients(zip(columns, weights, strict=True))
    assert optimizer.iterations == 5
    for weight in weights:
        states = (weight, *optimizer.slots(weight))
        assert all(len({copy.tobytes() for copy in state.values}) == 1 for state in states)
        assert all(state.devices == weight.devices for state in states)
    return [weight.numpy() for weight in weights]


@pytest.mark.parametrize("make", MAKERS)
def test_replicas_take_the_step_of_the_mean_gradient(make):
    with dv.MirroredStrategy(devices(3)) as strategy:
        inside = trained(strategy, make, 3)
        across = trained(strategy, make, 3, in_replicas=False)
    optimizer, alone = make(), (dv.Variable(np.ones((4, 3))), dv.Variable(np.zeros(3)))
    for number in range(5):
        rows = [gradients(rank, number) for rank in range(3)]
        means = [np.mean(column, axis=0) for column in zip(*rows, strict=True)]
        optimizer.apply_gradients(zip(means, alone, strict=True))
    for one, other, expected in zip(inside, across, alone, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, expected.numpy(), rtol=1e-12, atol=1e-14)


def test_the_sum_of_gradients():
    weight = dv.Variable(1.0)
    dv.optimizers.SGD(1.0).apply_gradients([(0.5, weight)], op="sum")
    assert float(weight) == 0.5


@pytest.mark.parametrize(
    ("make", "pairs", "error"),
    [
        (dict, lambda v: [(np.ones(3), v)], BufferMismatchError),
        (dict, lambda v: [(np.ones(2, "f4"), v)], BufferMismatchError),
        (dict, lambda v: [(np.ones(2), v), (np.ones(2), v)], ContextError),
        (dict, lambda v: [np.ones(2)], TypeError),
        (dict, lambda v: [(v, np.ones(2))], TypeError),
        (lambda: {"synchronization": "none"}, lambda v: [(np.ones(2), v)], SynchronizationError),
        (lambda: {"dtype": "i8"}, lambda v: [(np.ones(2, "i8"), v)], UnsupportedDTypeError),
    ],
)
def test_bad_pairs_change_nothing(make, pairs, error):
    optimizer = dv.optimizers.Adam()
    with dv.MirroredStrategy(devices(2)) as strategy:
        with strategy.scope():
            variable = dv.Variable(np.ones(2), **make())
        with pytest.raises(error):
            strategy.run(lambda: optimizer.apply_gradients(pairs(variable)))
        with pytest.raises(error):
            optimizer.apply_gradients(pairs(variable))
        assert all((copy == 1).all() for copy in variable.values)
    assert optimizer.iterations == 0


def test_replicas_that_pass_different_variables_end_the_step():
    optimizer = dv.optimizers.SGD(0.1)
    with dv.MirroredStrategy(devices(2)) as strategy:
        with strategy.scope():
            pair = dv.Variable(1.0), dv.Variable(1.0)
        with pytest.raises(CollectiveMismatchError):
            strategy.run(
                lambda: optimizer.apply_gradients(
                    [(1.0, pair[dv.get_replica_context().replica_id_in_sync_group])]
                )
            )
        with pytest.raises(ContextError), dv.MirroredStrategy(devices(1)).scope():
            optimizer.apply_gradients([(1.0, pair[0])])
        assert [float(variable) for variable in pair] == [1.0, 1.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: dv.optimizers.SGD(-1),
        lambda: dv.optimizers.SGD("fast"),
        lambda: dv.optimizers.SGD(0.1, momentum=1),
        lambda: dv.optimizers.SGD(0.1, nesterov=True),
        lambda: dv.optimizers.Adam(beta_1=1.5),
        lambda: dv.optimizers.Adam(epsilon=float("nan")),
        lambda: dv.optimizers.SGD(10**400),
        lambda: dv.optimizers.SGD("0.1"),
        lambda: dv.optimizers.SGD(np.ma.masked),
        lambda: dv.optimizers.SGD(lambda step: None).apply_gradients([(1.0, dv.Variable(1.0))]),
        lambda: dv.optimizers.SGD(lambda step: -1.0).apply_gradients([(1.0, dv.Variable(1.0))]),
    ],
)
def test_settings_out_of_range(make):
    with pytest.raises(ValueError, match=r"must be|needs"):
        make()


def test_clipping_scales_all_gradients_by_one_factor():
    rng = np.random.default_rng(0)
    nest = {"a": rng.standard_normal((300, 400)), "b": [rng.standard_normal(7).astype(np.float32)]}
    norm = np.sqrt(sum((array.astype(float) ** 2).sum() for array in (nest["a"], nest["b"][0])))
    clipped, found = dv.optimizers.clip_by_global_norm(nest, norm / 4)
    assert found == pytest.approx(norm, rel=1e-12)
    np.testing.assert_allclose(clipped["a"], nest["a"] / 4, rtol=1e-12)
    assert clipped["b"][0].dtype == np.float32
    same, _ = dv.optimizers.clip_by_global_norm(nest, norm * 2)
    np.testing.assert_array_equal(same["a"], nest["a"])
    assert not np.shares_memory(same["a"], nest["a"])


def test_clipping_gives_nan_for_an_infinite_norm_and_refuses_integers():
    clipped, norm = dv.optimizers.clip_by_global_norm([np.array([1.0, np.inf])], 1.0)
    assert np.isinf(norm)
    assert np.isnan(clipped[0]).all()
    with pytest.raises(ValueError, match="above 0"):
        dv.optimizers.clip_by_global_norm([np.ones(1)], 0.0)
    with pytest.raises(dv.errors.UnsupportedDTypeError):
        dv.optimizers.clip_by_global_norm([np.ones(1, int)], 1.0)


# -- each variable has its own count of steps ------------------------------------------------------


def apply_in(strategy, in_replicas, apply):
    """Call ``apply``, in cross-replica context or in each replica."""
    if in_replicas:
        strategy.run(apply)
    else:
        apply()


@pytest.mark.parametrize("in_replicas", [True, False])
@pytest.mark.parametrize(
    "plan",
    [
        ["a"] * 5 + ["ab"] * 3,  # frozen at first
        ["a", "b"] * 4,  # one call per variable
        ["a", "ab", "b", "ab", "a"],  # irregular
    ],
    ids=str,
)
@pytest.mark.parametrize("make", MAKERS)
def test_each_variable_is_updated_as_if_it_were_the_only_one(make, plan, in_replicas):
    gradient = np.linspace(-1, 1, 3)
    with dv.MirroredStrategy(devices(2)) as strategy:
        optimizer = make()
        with strategy.scope():
            variables = {name: dv.Variable(np.ones(3), name=name) for name in "ab"}
        for names in plan:
            apply_in(
                strategy,
                in_replicas,
                lambda names=names: optimizer.apply_gradients(
                    [(gradient, variables[name]) for name in names]
                ),
            )
        for name, variable in variables.items():
            alone, count = dv.Variable(np.ones(3)), "".join(plan).count(name)
            of_its_own = make()
            for _ in range(count):
                of_its_own.apply_gradients([(gradient, alone)])
            np.testing.assert_array_equal(variable.numpy(), alone.numpy())
            assert int(optimizer.steps(variable)) == count
    assert optimizer.iterations == max("".join(plan).count(name) for name in "ab")


def test_a_callable_learning_rate_is_called_once_per_step_count():
    asked = []

    def rate(steps):
        asked.append(steps)
        return 0.1

    a, b, c = (dv.Variable(1.0) for _ in range(3))
    sgd = dv.optimizers.SGD(rate)
    sgd.apply_gradients([(1.0, a), (1.0, b)])
    sgd.apply_gradients([(1.0, a), (1.0, b), (1.0, c)])
    assert asked == [0, 1, 0]


# -- gradients of None -----------------------------------------------------------------------------


@pytest.mark.parametrize("in_replicas", [True, False])
def test_a_gradient_of_none_leaves_its_variable_unchanged(in_replicas):
    with dv.MirroredStrategy(devices(2)) as strategy:
        with strategy.scope():
            a, b = dv.Variable(np.ones(2)), dv.Variable(np.ones(2))
            metric = dv.Variable(0, synchronization="on_read", aggregation="sum")
        adam = dv.optimizers.Adam(0.25)
        pairs = [(np.ones(2), a), (None, b), (None, metric)]
        apply_in(strategy, in_replicas, lambda: adam.apply_gradients(pairs))
        apply_in(strategy, in_replicas, lambda: adam.apply_gradients([(None, a)]))
        assert a.numpy().round(6).tolist() == [0.75, 0.75]
        assert b.numpy().tolist() == [1, 1]
        assert adam.slotted[0] is a
        assert len(adam.slotted) == adam.iterations == 1


def test_none_on_some_replicas_names_the_variable():
    with dv.MirroredStrategy(devices(2)) as strategy:
        with strategy.scope():
            a, b = dv.Variable(1.0, name="a"), dv.Variable(1.0, name="bias")
        sgd = dv.optimizers.SGD(0.1)

        def step():
            rank = dv.get_replica_context().replica_id_in_sync_group
            sgd.apply_gradients([(1.0, a), (None if rank else 1.0, b)])

        with pytest.raises(CollectiveMismatchError, match="bias without a gradient"):
            strategy.run(step)
        with pytest.raises(CollectiveMismatchError, match=r"'bias' .*replicas \[1\]"):
            sgd.apply_gradients([(1.0, a), (dv.PerReplica([1.0, None]), b)])
        sgd.apply_gradients([(1.0, a), (dv.PerReplica([None, None]), b)])
        assert float(b) == 1.0
        assert sgd.iterations == 1


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("count", [(3, 1, 2), (5, 5, 5), (4, 0, 1), (1e308, 1.5e308, 1e308)])
@pytest.mark.parametrize("make", MAKERS)
def test_weights_give_the_weighted_mean(make, count, dtype):
    rng = np.random.default_rng(0)
    given = [rng.standard_normal((2, 20_000)).astype(dtype) for _ in count]
    given = [g if c else np.full_like(g, np.nan) for g, c in zip(given, count, strict=True)]
    if devices(1) != ["cpu:0"]:  # the simulator is slow
        given = [g[:, :50] for g in given]
    results = {}
    with dv.MirroredStrategy(devices(3)) as strategy:
        for how in ("reduced before", "in a replica", "across"):
            optimizer = make()
            with strategy.scope():
                weight = dv.Variable(np.ones_like(given[0]))

            def step(how=how, optimizer=optimizer, weight=weight):
                replica = dv.get_replica_context()
                rank = replica.replica_id_in_sync_group
                if how == "in a replica":
                    optimizer.apply_gradients([(given[rank], weight)], weight=count[rank])
                else:
                    mean = replica.all_reduce("mean", given[rank], weight=count[rank])
                    optimizer.apply_gradients([(mean, weight)], op="mean")

            for _ in range(2):
                if how == "across":
                    pairs = [(dv.PerReplica(given), weight)]
                    optimizer.apply_gradients(pairs, weight=dv.PerReplica(count))
                else:
                    strategy.run(step)
            assert len({copy.tobytes() for copy in weight.values}) == 1
            results[how] = weight.numpy()
    np.testing.assert_array_equal(results["in a replica"], results["across"])
    tolerance = 1e-5 if dtype == "f4" else 1e-13
    np.testing.assert_allclose(
        results["in a replica"], results["reduced before"], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("weight", "op", "error"),
    [
        ([0, 0], "mean", ValueError),
        ([1, -1], "mean", ValueError),
        ([1, np.nan], "mean", ValueError),
        ([1, 10**400], "mean", ValueError),
        ([1, "1"], "mean", ValueError),
        ([1, 1], "sum", ValueError),
        ([1, None], "mean", CollectiveMismatchError),
    ],
)
def test_invalid_weights_change_nothing(weight, op, error):
    with dv.MirroredStrategy(devices(2)) as strategy:
        with strategy.scope():
            variable = dv.Variable(np.ones(2))
        adam = dv.optimizers.Adam()

        def step():
            own = weight[dv.get_replica_context().replica_id_in_sync_group]
            adam.apply_gradients([(np.ones(2), variable)], op=op, weight=own)

        with pytest.raises(error):
            strategy.run(step)
        if error is ValueError:
            for gradient in (np.ones(2), dv.PerReplica([np.ones(2)] * 2)):
                with pytest.raises(error, match="weight"):
                    adam.apply_gradients(
                        [(gradient, variable)], op=op, weight=dv.PerReplica(weight)
                    )
        with pytest.raises(ContextError, match="weight"):
            adam.apply_gradients([(np.ones(2), variable)], weight=dv.PerReplica([1, 1, 1]))
        assert variable.numpy().tolist() == [1, 1]
        assert adam.iterations == 0
        assert adam.slotted == ()


# -- slots belong to variables ---------------------------------------------------------------------


def stepped(optimizer, variables, count=1):
    for _ in range(count):
        optimizer.apply_gradients([(np.arange(1.0, 3.0), v) for v in variables])


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("order", ["model first", "optimizer first", "nested", "holder"])
def test_a_deep_copy_of_model_and_optimizer_continues_like_the_original(make, order):
    class Run:
        pass

    with dv.MirroredStrategy(devices(2)) as strategy:
        with strategy.scope():
            model = [dv.Variable(np.ones(2)) for _ in range(2)]
        optimizer = make()
        stepped(optimizer, model, 3)
        stepped(optimizer, model[:1])
        if order == "model first":
            twins, other = copy.deepcopy((model, optimizer))
        elif order == "optimizer first":
            other, twins = copy.deepcopy((optimizer, model))
        elif order == "nested":
            copied = copy.deepcopy({"optimizers": [optimizer], "model": {"w": model}})
            (other,), twins = copied["optimizers"], copied["model"]["w"]
        else:
            run = Run()
            run.optimizer, run.model, run.again = optimizer, model, optimizer
            run = copy.deepcopy(run)
            other, twins = run.optimizer, run.model
            assert run.again is other
        assert [int(other.steps(v)) for v in twins] == [4, 3]
        assert all(one is not two for one, two in zip(other.slotted, model, strict=True))
        stepped(optimizer, model)
        before = [v.numpy() for v in model]
        stepped(other, twins)
        for one, two, seen in zip(model, twins, before, strict=True):
            np.testing.assert_array_equal(one.numpy(), two.numpy())
            np.testing.assert_array_equal(one.numpy(), seen)


@pytest.mark.parametrize("make", MAKERS)
def test_a_deep_copy_of_the_optimizer_alone_updates_the_same_variables(make):
    weight = dv.Variable(np.ones(2))
    optimizer = make()
    stepped(optimizer, [weight], 3)
    held, snapshot = weight.numpy(), copy.deepcopy(optimizer)
    stepped(optimizer, [weight], 2)
    expected = weight.numpy()
    weight.assign(held)  # back to where the snapshot was taken
    stepped(snapshot, [weight], 2)
    np.testing.assert_array_equal(weight.numpy(), expected)


def test_slots_are_deleted_with_their_variable_and_never_reused():
    optimizer = dv.optimizers.SGD(0.1, momentum=0.9)
    for _ in range(8):
        old = dv.Variable(np.ones(3))
        optimizer.apply_gradients([(np.full(3, 100.0), old)])
        twin, slots = copy.deepcopy(optimizer), [weakref.ref(s) for s in optimizer.slots(old)]
        gone, address = weakref.ref(old), id(old)
        del old
        gc.collect()
        assert gone() is None
        assert all(slot() is None for slot in slots)
        assert optimizer.slotted == twin.slotted == ()
        new = [dv.Variable(np.zeros(3)) for _ in range(20)]
        for variable in [one for one in new if id(one) == address] or new[:1]:
            for each in (optimizer, twin):
                each.apply_gradients([(np.zeros(3), variable)])
                assert not variable.numpy().any()
        del new, variable


def test_slots_are_deleted_with_the_optimizer_without_a_collection():
    weight, adam = dv.Variable(np.ones(3)), dv.optimizers.Adam()
    adam.apply_gradients([(np.ones(3), weight)])
    slots = [weakref.ref(slot) for slot in adam.slots(weight)]
    gc.disable()
    try:
        del adam
        assert all(slot() is None for slot in slots)
    finally:
        gc.enable()


def test_shallow_copies_and_pickles_are_refused():
    for attempt in (copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=r"deepcopy|state_dict"):
            attempt(dv.optimizers.Adam())


def test_momentum_may_be_set_later():
    weight, sgd = dv.Variable(np.ones(2)), dv.optimizers.SGD(0.1)
    stepped(sgd, [weight])
    sgd.momentum = 0.5
    stepped(sgd, [weight], 2)
    np.testing.assert_allclose(weight.numpy(), 1 - 0.1 * np.arange(1, 3) * (1 + 1 + 1.5))


# -- states ----------------------------------------------------------------------------------------


def named(*names, shape=2):
    return [dv.Variable(np.ones(shape), name=name) for name in names]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("how", ["before the first step", "after some", "by order", "as JSON"])
def test_a_state_continues_in_another_optimizer(make, how):
    first, second = named("w", "b"), named("w", "b")
    one, two = make(), make()
    stepped(one, first, 3)
    stepped(one, first[:1], 2)
    if how == "after some":
        stepped(two, second[::-1], 4)
    state = one.state_dict()
    if how == "as JSON":
        plain = json.loads(json.dumps(state, default=lambda array: array.tolist()))
        assert plain["variables"][0]["steps"] == 5
        state = plain
    if how == "by order":
        second = named("x", "y")
        two.load_state_dict(state, variables=second)
    else:
        two.load_state_dict(state)
    for variable, value in zip(second, first, strict=True):
        variable.assign(value.numpy())
    stepped(one, first, 2)
    stepped(two, second[:1])  # their first steps, one by one
    stepped(two, second[1:])
    stepped(two, second)
    for variable, value in zip(second, first, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value.numpy())
    assert two.iterations == one.iterations == 7


def test_a_state_is_a_copy_and_can_be_loaded_again():
    weights, adam = named("same", "same"), dv.optimizers.Adam(0.1)  # matched in order
    stepped(adam, weights, 2)
    stepped(adam, weights[1:])
    state, held = adam.state_dict(), [w.numpy() for w in weights]
    moments = [array.copy() for one in state["variables"] for array in one["slots"].values()]
    stepped(adam, weights, 3)
    expected = [w.numpy() for w in weights]
    for array, before in zip(
        (a for one in state["variables"] for a in one["slots"].values()), moments, strict=True
    ):
        np.testing.assert_array_equal(array, before)
    adam.load_state_dict(state)
    for weight, value in zip(weights, held, strict=True):
        weight.assign(value)
    stepped(adam, weights, 3)
    for weight, value in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)


def altered(state, **changes):
    first, *others = state["variables"]
    return {**state, "variables": [{**first, **changes}, *others]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: None, "state of an optimizer"),
        (lambda state: {**state, "iterations": -1}, "state of an optimizer"),
        (lambda state: {**state, "slot_names": ["velocity"]}, "slots"),
        (lambda state: {k: v for k, v in state.items() if k != "variables"}, "holds 'variables'"),
        (lambda state: altered(state, steps=-1), "-1 steps"),
        (lambda state: altered(state, slots={}), "first_moment"),
        (lambda state: altered(state, shape=[3]), "first_moment"),
        (lambda state: {**state, "variables": [3]}, "name, shape"),
    ],
)
def test_an_invalid_state_changes_nothing(spoil, message):
    (weight,), adam = named("w"), dv.optimizers.Adam(0.1)
    stepped(adam, [weight], 2)
    before = adam.state_dict()
    with pytest.raises(ValueError, match=message):
        adam.load_state_dict(spoil(adam.state_dict()))
    after = adam.state_dict()
    assert repr(after) == repr(before)


def test_a_variable_that_may_have_been_renamed_is_an_error():
    weights, adam = named("w", "b"), dv.optimizers.Adam(0.1)
    stepped(adam, weights, 2)
    state = adam.state_dict()
    other = dv.optimizers.Adam(0.1)
    other.load_state_dict(state)
    (stranger,), (wide,) = named("x"), named("head", shape=(3, 2))
    with pytest.raises(ValueError, match=r"'x'.*'w', 'b'.*variables="):
        stepped(other, [stranger])
    other.apply_gradients([(np.ones((3, 2)), wide)])  # it cannot be one of them
    assert int(other.steps(wide)) == 1
    assert stranger.numpy().tolist() == [1, 1]
    twice = dv.optimizers.Adam(0.1)
    same_name = named("w", "w")
    stepped(twice, same_name)
    with pytest.raises(ValueError, match="2 variables named 'w'"):
        stepped(_loaded(twice.state_dict()), named("w"))
    with pytest.raises(ValueError, match="holds 2 variables"):
        twice.load_state_dict(twice.state_dict(), variables=same_name[:1])
    with pytest.raises(ValueError, match=r"float64\[2\].*float64\[3\]|\[2\].*\[3\]"):
        twice.load_state_dict(state, variables=named("w", "b", shape=3))


def _loaded(state):
    optimizer = dv.optimizers.Adam(0.1)
    optimizer.load_state_dict(state)
    return optimizer


def test_an_async_learning_rate_is_refused():
    async def rate(steps):
        return 0.1

    with pytest.raises(TypeError, match="learning_rate expected a function"):
        dv.optimizers.Adam(rate)
    with pytest.raises(TypeError, match="nesterov is True or False"):
        dv.optimizers.SGD(0.1, momentum=0.9, nesterov="no")


def test_slots_are_not_created_inside_a_replica():
    adam = dv.optimizers.Adam()
    with dv.MirroredStrategy(devices(2)) as strategy:
        with strategy.scope():
            weight = dv.Variable(np.ones(2), name="w")
        state = adam.state_dict()
        for attempt in (adam.slots, adam.steps, lambda _: adam.load_state_dict(state)):
            with pytest.raises(ContextError, match="each replica would make its own"):
                strategy.run(attempt, (weight,))
        stepped(adam, [weight])
        strategy.run(lambda: adam.slots(weight))
        assert adam.steps(weight) == 1
    for ask in (adam.slots, adam.steps):
        with pytest.raises(TypeError, match="belong to variables"):
            ask(np.ones(2))
    with pytest.raises(ValueError, match="expected variables"):
        adam.load_state_dict(adam.state_dict(), variables=[3])
