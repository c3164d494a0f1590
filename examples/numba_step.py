"""A step compiled by Numba with nogil=True: the replicas' threads run in parallel."""

import numba
import numpy as np

import dvkernels as dv

ROWS, COLUMNS, EPOCHS, RATE = 4001, 20, 30, 1.0


@numba.njit(nogil=True)
def gradient_of(weights, features, labels, gradient):
    """Write the gradient of the logistic loss, and return the loss; both are sums over the rows."""
    gradient[:] = 0.0
    loss = 0.0
    for row in range(len(labels)):
        logit = 0.0
        for k in range(len(weights)):
            logit += weights[k] * features[row, k]
        loss += np.log1p(np.exp(logit)) - labels[row] * logit
        error = 1.0 / (1.0 + np.exp(-logit)) - labels[row]
        for k in range(len(weights)):
            gradient[k] += error * features[row, k]
    return loss


def train(strategy, features, labels):
    with strategy.scope():
        weights = dv.Variable(np.zeros(COLUMNS), aggregation="sum")
        loss = dv.Variable(0.0, synchronization="on_read", aggregation="sum")

    def step(x, y):
        gradient = np.empty(COLUMNS)
        # The view is valid until the write below, at which the replicas communicate.
        loss.assign(gradient_of(weights.read_value(), x, y, gradient) / ROWS)
        weights.assign_sub(RATE / ROWS * gradient)

    dataset = dv.Dataset.from_arrays((features, labels)).batch(ROWS)
    distributed = strategy.distribute_dataset(dataset)
    for _ in range(EPOCHS):
        for part in distributed:
            strategy.run(step, args=part)
    return weights.numpy(), float(loss.numpy())


rng = np.random.default_rng(0)
features = rng.standard_normal((ROWS, COLUMNS))
labels = (features @ rng.standard_normal(COLUMNS) > 0).astype(np.float64)

with dv.OneDeviceStrategy("cpu:0") as one, dv.MirroredStrategy(["cpu:0", "cpu:1"]) as two:
    alone, loss_alone = train(one, features, labels)
    together, loss_together = train(two, features, labels)

np.testing.assert_allclose(together, alone, rtol=1e-10)
assert loss_together < 0.3
accuracy = ((features @ together > 0) == labels).mean()
print(f"loss {loss_together:.4f} (one device: {loss_alone:.4f}), accuracy {accuracy:.1%}")
