"""Gradient accumulation: k micro-batches without a collective, one collective at the end.

A batch that does not fit into memory is computed in micro-batches. The result is the gradient of
the whole batch, with one all-reduce instead of k.
"""

import numpy as np

import dvkernels as dv

MICRO_BATCH, STEPS = 16, 25

rng = np.random.default_rng(0)
features = rng.standard_normal((203, 7))
targets = features @ rng.standard_normal(7)


def squares_and_gradient(weights, x, y):
    """Return loss and gradient as sums over the rows, so that micro-batches of any size add up."""
    error = x @ weights - y
    return error @ error, 2 * x.T @ error


def step(weights, x, y, optimizer, micro_batch):
    loss, gradient = 0.0, np.zeros(weights.shape)
    for start in range(0, len(y), micro_batch):  # 7 micro-batches per replica, or 1
        rows = slice(start, start + micro_batch)
        more = squares_and_gradient(weights.read_value(), x[rows], y[rows])
        loss, gradient = loss + more[0], gradient + more[1]
    # The sum over the micro-batches, divided by the global batch size, is summed over replicas.
    optimizer.apply_gradients([(gradient / len(features), weights)], op="sum")
    return loss / len(features)


def train(strategy, micro_batch):
    with strategy, strategy.scope():
        weights = dv.Variable(np.zeros(7))
        optimizer = dv.optimizers.SGD(0.1, momentum=0.5)
        dataset = dv.Dataset.from_arrays((features, targets)).batch(len(targets))
        distributed = strategy.distribute_dataset(dataset)
        for _ in range(STEPS):
            for x, y in distributed:  # 102 and 101 rows
                losses = strategy.run(step, args=(weights, x, y, optimizer, micro_batch))
        return weights.numpy(), float(strategy.reduce("sum", losses))


accumulated, loss = train(dv.MirroredStrategy(["cpu:0", "cpu:1"]), MICRO_BATCH)
whole, loss_of_whole = train(dv.OneDeviceStrategy("cpu:0"), len(targets))
np.testing.assert_allclose(accumulated, whole, rtol=1e-9)
np.testing.assert_allclose(loss, loss_of_whole, rtol=1e-6)
print(f"micro-batches of {MICRO_BATCH} on two replicas: loss {loss:.2e}, as of the whole batch")
