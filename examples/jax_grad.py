"""jax.grad inside a replica: JAX differentiates and compiles, dvkernels all-reduces the gradients.

JAX arrays are immutable: the collectives return new ones.
"""

import jax
import jax.numpy as jnp
import numpy as np

import dvkernels as dv

jax.config.update("jax_platforms", "cpu")
RATE, STEPS = 0.5, 50

rng = np.random.default_rng(0)
features = rng.standard_normal((101, 5)).astype(np.float32)
labels = (features @ np.arange(5, dtype=np.float32) > 1).astype(np.float32)


def loss(weights, x, y):
    logits = x @ weights["slope"] + weights["offset"]
    return jnp.mean(jnp.logaddexp(0, logits) - y * logits)


value_and_gradient = jax.jit(jax.value_and_grad(loss))


def train(x, y):
    """Run all steps in one ``run``: the all-reduce of the gradients is the only barrier."""
    context = dv.get_replica_context()
    weights = {"slope": jnp.zeros(5), "offset": jnp.zeros(())}
    x, y = jnp.asarray(x), jnp.asarray(y)
    for _ in range(STEPS):
        # The all-reduce of a pytree returns the same pytree: the mean over all rows.
        own = value_and_gradient(weights, x, y)
        value, gradient = context.all_reduce("mean", own, weight=len(x))
        weights = jax.tree.map(lambda w, g: w - RATE * g, weights, gradient)
    return value, weights


with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy:
    dataset = dv.Dataset.from_arrays((features, labels)).batch(len(labels))
    (part,) = strategy.distribute_dataset(dataset)  # 51 and 50 rows
    value, weights = strategy.run(train, args=part)

# The same without replicas.
expected = {"slope": jnp.zeros(5), "offset": jnp.zeros(())}
for _ in range(STEPS):
    last, gradient = value_and_gradient(expected, features, labels)
    expected = jax.tree.map(lambda w, g: w - RATE * g, expected, gradient)

for name, weight in expected.items():
    for replica in range(2):
        assert isinstance(weights[name].on(replica), jax.Array)
        np.testing.assert_allclose(weights[name].on(replica), weight, rtol=1e-4, atol=1e-5)
np.testing.assert_allclose(value.on(0), last, rtol=1e-4)
print(f"loss {float(last):.4f} after {STEPS} steps, on one device and on two replicas")
