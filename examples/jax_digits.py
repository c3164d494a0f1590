"""Digits on JAX devices: jax.grad in a step that strategy.jit compiles for all replicas.

Batches that two replicas do not divide evenly are padded with rows of weight 0.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"  # before JAX starts

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import dvkernels as dv

DEVICES, BATCH, EPOCHS = ["jax:cpu:0", "jax:cpu:1"], 100, 4
pixels, digits = load_digits(return_X_y=True)
pixels, digits = (pixels / 16).astype(np.float32), digits.astype(np.int32)


def loss(weights, x, y, counts):
    hidden = jnp.tanh(x @ weights["hidden"])
    scores = jax.nn.log_softmax(hidden @ weights["out"])
    losses = -jnp.take_along_axis(scores, y[:, None], 1)[:, 0]
    return jnp.sum(losses * counts) / jnp.maximum(1, jnp.sum(counts))


draw = np.random.default_rng(0).standard_normal
with dv.TPUStrategy(DEVICES) as strategy:
    with strategy.scope():
        model = {
            "hidden": dv.Variable(0.2 * draw((64, 32)).astype(np.float32)),
            "out": dv.Variable(0.2 * draw((32, 10)).astype(np.float32)),
        }
    adam = dv.optimizers.Adam(0.01)

    @strategy.jit
    def step(batch, counts):
        weights = {name: variable.read_value() for name, variable in model.items()}
        value, gradient = jax.value_and_grad(loss)(weights, *batch, counts)
        rows = jnp.sum(counts)  # the mean over the rows of all replicas, however many each has
        adam.apply_gradients([(gradient[name], model[name]) for name in model], weight=rows)
        return dv.get_replica_context().all_reduce("mean", value, weight=rows)

    data = dv.Dataset.from_arrays((pixels, digits)).shuffle(seed=1).batch(BATCH)
    batches = strategy.distribute_dataset(data, dv.InputOptions(pad=True))
    for _ in range(EPOCHS):
        for batch, counts in batches:
            losses = strategy.run(step, args=(batch, counts))

weights = {name: variable.numpy() for name, variable in model.items()}
found = (np.tanh(pixels @ weights["hidden"]) @ weights["out"]).argmax(1)
accuracy = np.mean(found == digits)
assert accuracy > 0.95
assert float(losses[0]) == float(losses[1])
assert step.traces == 1  # the last batch of an epoch is shorter: it is padded
print(f"{accuracy:.1%} of the digits are right; the step was traced {step.traces} time")
