"""Parameter-server strategy: a strategy of one replica, whose tables are saved and trained."""

from __future__ import annotations

import numpy as np
import pytest
from kinds import daily

import dvkernels as dv
from dvkernels.errors import ClusterError, DeviceError


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_servers": 1}, ClusterError),
        ({"num_servers": -1}, ClusterError),
        ({"cluster_resolver": object()}, ClusterError),
        ({"variable_partitioner": 3}, ClusterError),
        ({"num_workers": 0}, DeviceError),
        ({"num_workers": True}, DeviceError),
        ({"threads": "some"}, ValueError),
    ],
)
def test_what_does_not_exist_is_refused(options, error):
    with pytest.raises(error):
        dv.ParameterServerStrategy(**options)


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_a_table_and_its_slots_are_restored_on_another_number_of_shards(tmp_path, shards):
    def made(partitioner):
        strategy = dv.ParameterServerStrategy(variable_partitioner=partitioner, num_workers=2)
        with strategy.scope():
            return strategy, dv.Variable(np.arange(20.0).reshape(10, 2)), dv.optimizers.Adagrad(0.5)

    ids, slopes = [1, 9, 1], np.ones((3, 2))
    strategy, table, adagrad = made(dv.partitioners.FixedShards(4))
    adagrad.apply_gradients([((ids, slopes), table)])
    dv.Checkpoint(table=table, adagrad=adagrad, strategy=strategy).save(tmp_path / "saved")
    adagrad.apply_gradients([((ids, slopes), table)])
    other, restored, twin = made(dv.partitioners.FixedShards(shards))
    dv.Checkpoint(table=restored, adagrad=twin, strategy=other).restore(tmp_path / "saved")
    twin.apply_gradients([((ids, slopes), restored)])
    assert np.array_equal(table, restored)
    plain = dv.Variable(np.zeros((10, 2)))
    dv.Checkpoint(table=plain).restore(tmp_path / "saved", partial=True)
    assert plain.numpy().any()
    strategy.close()
    other.close()


def digits():
    """Return pictures and numbers of digits, apart those that are not learned from."""
    from sklearn.datasets import load_digits

    pictures, numbers = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(numbers))
    x, y = (pictures / 16.0).astype(np.float32)[order], numbers[order]
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def gradients(weights, x, y):
    """Return the gradients of a network with one hidden layer."""
    w1, b1, w2, b2 = weights
    hidden = np.maximum(x @ w1 + b1, 0)
    scores = hidden @ w2 + b2
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    slope = odds / odds.sum(axis=1, keepdims=True)
    slope[np.arange(len(y)), y] -= 1
    slope /= len(y)
    back = (slope @ w2.T) * (hidden > 0)
    return x.T @ back, back.sum(axis=0), hidden.T @ slope, slope.sum(axis=0)


def accuracy(weights, x, y):
    w1, b1, w2, b2 = weights
    return float(((np.maximum(x @ w1 + b1, 0) @ w2 + b2).argmax(axis=1) == y).mean())


def initial_weights():
    random = np.random.default_rng(1)
    w1, w2 = random.normal(size=(64, 32)) / 8, random.normal(size=(32, 10)) / 6
    return [array.astype(np.float32) for array in (w1, np.zeros(32), w2, np.zeros(10))]


@pytest.mark.parametrize("num_workers", daily([1, 2, 4], 2))
def test_asynchronous_training_reaches_the_synchronous_accuracy(num_workers):
    """On digits not seen, less 0.01, with at most 1.3 times the examples."""
    pytest.importorskip("sklearn")
    train, unseen = digits()
    batch, num_steps, rate = 32, 400, 0.2

    def batches(seed):
        random = np.random.default_rng(seed)
        while True:
            rows = random.integers(0, len(train[0]), batch)
            yield train[0][rows], train[1][rows]

    weights, source = initial_weights(), batches(2)
    for _ in range(num_steps):
        for weight, slope in zip(weights, gradients(weights, *next(source)), strict=True):
            weight -= rate * slope
    synchronous = accuracy(weights, *unseen)
    assert synchronous > 0.9

    with dv.ParameterServerStrategy(num_workers=num_workers) as strategy:
        with strategy.scope():
            variables = [dv.Variable(weight) for weight in initial_weights()]
        sgd = dv.optimizers.SGD(rate)
        coordinator = dv.ClusterCoordinator(strategy)
        numbers = iter(range(num_workers))
        own = iter(coordinator.create_per_worker_dataset(lambda: batches(3 + next(numbers))))

        def step(iterator):
            read = [variable.read_value() for variable in variables]
            slopes = gradients(read, *next(iterator))
            sgd.apply_gradients(zip(slopes, variables, strict=True))

        for _ in range(int(1.3 * num_steps)):
            coordinator.schedule(step, (own,))
        coordinator.join()
        reached = accuracy([variable.numpy() for variable in variables], *unseen)
    assert reached >= synchronous - 0.01
