"""Asynchronous SGD on the digits: workers that do not wait for each other, and one server.

Two threads; or processes, of which the last one serves the variables:
``python -m dvkernels launch -n 4 --engine local asynchronous_sgd.py 1``
"""

import sys

import numpy as np
from sklearn.datasets import load_digits

import dvkernels as dv

BATCH, STEPS, RATE = 32, 600, 0.1

# In a job of processes all but the first one end here, when that has closed the strategy.
how = {"num_servers": int(sys.argv[1])} if sys.argv[1:] else {"num_workers": 2}
strategy = dv.ParameterServerStrategy(**how)

pictures, numbers = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(numbers))
x, y = (pictures / 16.0).astype(np.float32)[order], numbers[order]
(x, unseen), (y, truth) = np.split(x, [1400]), np.split(y, [1400])


def initial_weights():
    random = np.random.default_rng(1)
    w1, w2 = random.normal(size=(64, 32)) / 8, random.normal(size=(32, 10)) / 6
    return [array.astype(np.float32) for array in (w1, np.zeros(32), w2, np.zeros(10))]


def gradients(weights, x, y):
    w1, b1, w2, b2 = weights
    hidden = np.maximum(x @ w1 + b1, 0)
    scores = hidden @ w2 + b2
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    slope = odds / odds.sum(axis=1, keepdims=True)
    slope[np.arange(len(y)), y] -= 1
    slope /= len(y)
    back = (slope @ w2.T) * (hidden > 0)
    return x.T @ back, back.sum(axis=0), hidden.T @ slope, slope.sum(axis=0)


def accuracy(weights):
    w1, b1, w2, b2 = weights
    scores = np.maximum(unseen @ w1 + b1, 0) @ w2 + b2
    return (scores.argmax(axis=1) == truth).mean()


def batches(steps):
    return dv.Dataset.from_arrays((x, y)).shuffle(seed=2).repeat().batch(BATCH).take(steps)


# One after another, as a strategy whose replicas wait for each other does.
weights = initial_weights()
for batch in batches(STEPS):
    for weight, slope in zip(weights, gradients(weights, *batch), strict=True):
        weight -= RATE * slope

with strategy:
    with strategy.scope():
        variables = [dv.Variable(weight) for weight in initial_weights()]
    sgd = dv.optimizers.SGD(RATE)
    coordinator = dv.ClusterCoordinator(strategy)

    def step(batch):
        read = [variable.read_value() for variable in variables]
        slopes = gradients(read, *batch)  # meanwhile other workers write the variables
        sgd.apply_gradients(zip(slopes, variables, strict=True))

    for batch in batches(int(1.3 * STEPS)):
        coordinator.schedule(step, (batch,))
    coordinator.join()
    reached = accuracy([variable.numpy() for variable in variables])
    print(coordinator.stats())

assert reached >= accuracy(weights) - 0.01
print(f"accuracy on digits not seen: {accuracy(weights):.3f} in step, {reached:.3f} out of step")
