"""Overlap: the gradient of a layer is all-reduced while the replica computes that of the next.

Backpropagation computes the last layer's gradient first. ``all_reduce_async`` starts its reduction
and returns at once; ``wait`` returns the result after the whole backward pass.
"""

import numpy as np

import dvkernels as dv

WIDTH, LAYERS, ROWS = 64, 4, 101

rng = np.random.default_rng(0)
layers = [rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH) for _ in range(LAYERS)]
inputs = rng.standard_normal((ROWS, WIDTH))
targets = np.sin(inputs)


def backward(x, y):
    """Yield each layer's gradient as a sum over the rows, the last layer's first."""
    activations = [x]
    for weights in layers:
        activations.append(np.tanh(activations[-1] @ weights))
    error = activations[-1] - y
    for k in reversed(range(LAYERS)):
        error = error * (1 - activations[k + 1] ** 2)
        yield k, activations[k].T @ error
        error = error @ layers[k].T


def one_by_one(x, y):
    context = dv.get_replica_context()
    return {k: context.all_reduce("sum", gradient) for k, gradient in backward(x, y)}


def overlapped(x, y):
    context = dv.get_replica_context()
    handles = {}
    for k, gradient in backward(x, y):
        # The gradient must not be written before wait(); each iteration makes a new array.
        # All replicas start the same collectives in the same order.
        handles[k] = context.all_reduce_async("sum", gradient)
    return {k: handle.wait() for k, handle in handles.items()}


with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    dataset = dv.Dataset.from_arrays((inputs, targets)).batch(ROWS)
    (part,) = strategy.distribute_dataset(dataset)
    expected = strategy.run(one_by_one, args=part)
    results = strategy.run(overlapped, args=part)

alone = dict(backward(inputs, targets))
for k in range(LAYERS):
    for replica in range(2):
        assert np.array_equal(results[k].on(replica), expected[k].on(replica)), "the same bits"
    np.testing.assert_allclose(results[k].on(0), alone[k], rtol=1e-9, atol=1e-9)
print(f"{LAYERS} gradients reduced during the backward pass: same bits as without overlap")
