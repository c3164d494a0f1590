"""Optimizers update the copies of variables as one device would, and stay in step."""

from __future__ import annotations

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


def test_replicas_that_bring_other_variables_end_the_step():
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


def test_clipping_shows_what_is_not_finite_and_refuses_what_is_no_gradient():
    clipped, norm = dv.optimizers.clip_by_global_norm([np.array([1.0, np.inf])], 1.0)
    assert np.isinf(norm)
    assert np.isnan(clipped[0]).all()
    with pytest.raises(ValueError, match="above 0"):
        dv.optimizers.clip_by_global_norm([np.ones(1)], 0.0)
    with pytest.raises(dv.errors.UnsupportedDTypeError):
        dv.optimizers.clip_by_global_norm([np.ones(1, int)], 1.0)
