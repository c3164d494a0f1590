"""Worker that trains the digits network by JAX, data parallel over several CPU devices."""

from __future__ import annotations

import functools
import os
import sys

import numpy as np
import program_server

size = int(sys.argv[1])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={size}"

import jax  # noqa: E402 - reads the variables above
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

RATE, MOMENTUM = 0.05, 0.9


def write(data):
    """Set up the training; yield the function that runs it."""
    mesh = jax.make_mesh((size,), ("replicas",), devices=jax.devices()[:size])
    split = NamedSharding(mesh, PartitionSpec("replicas"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    images, labels = data["images"], data["labels"].astype(np.int32)
    initial = program_server.layers(data["weights"])

    def loss(weights, x, y):
        kernel, bias, output_kernel, output_bias = weights
        logits = jax.nn.relu(x @ kernel + bias) @ output_kernel + output_bias
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights, velocities, x, y):
        gradients = jax.grad(loss)(weights, x, y)
        velocities = [MOMENTUM * v + g for v, g in zip(velocities, gradients, strict=True)]
        weights = [w - RATE * v for w, v in zip(weights, velocities, strict=True)]
        return weights, velocities

    def program():
        weights = jax.device_put(initial, everywhere)
        velocities = jax.device_put([np.zeros_like(w) for w in initial], everywhere)
        for rows in data["rows"]:
            x, y = jax.device_put((images[rows], labels[rows]), split)
            weights, velocities = step(weights, velocities, x, y)
        return [np.asarray(w) for w in weights]

    yield program


if __name__ == "__main__":
    program_server.serve(write)
