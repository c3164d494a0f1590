"""Training of the digits network of ``python -m dvkernels train``: SGD with momentum.

All ways begin with the same weights, read the same batches, and take their parts in the same order.
The rate is constant: libraries apply a changing one at different places of the velocity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import dvkernels as dv
from dvkernels.cli import digits, mlp
from dvkernels.devices.device import Device
from programs.program import OURS, Neighbour, Program, at_most, of_possible

__all__ = ["PROGRAMS"]

RATE, MOMENTUM, SEED = 0.05, 0.9, 0
Run = Iterator[Callable[[], Any]]
Arrays = list[Any]


class Training(NamedTuple):
    """Images with their labels, the rows of each batch, and the weights before the first step."""

    images: Any
    labels: Any
    rows: Any  # (steps, batch); what other libraries are given, ours shuffles itself
    weights: Any  # flat
    epochs: int

    @property
    def batch(self) -> int:
        """The examples of a batch."""
        return int(self.rows.shape[1])

    @property
    def num_hidden(self) -> int:
        """The units of the hidden layer."""
        return (len(self.weights) - digits.NUM_CLASSES) // (
            digits.NUM_PIXELS + 1 + digits.NUM_CLASSES
        )


def make(hidden: int, batch: int, epochs: int) -> Training:
    """Load the digits with their shifts, and draw the weights."""
    data = digits.with_shifts(digits.load("float32"))
    images, labels = data.train_images, data.train_labels.astype(np.int64)
    rows = np.stack(list(_batches(dv.Dataset.range(len(labels)), batch, epochs)))
    weights = mlp.initial_weights(hidden, "float32", SEED)
    return Training(np.ascontiguousarray(images), labels, rows, weights, epochs)


def _batches(examples: dv.Dataset, batch: int, epochs: int) -> dv.Dataset:
    return examples.shuffle(seed=SEED).batch(batch, drop_remainder=True).repeat(epochs)


def gradients(x: Any, y: Any, weights: Arrays) -> Arrays:
    """Return the gradients of the mean cross-entropy, by NumPy."""
    kernel, bias, output_kernel, output_bias = weights
    hidden = x @ kernel
    hidden += bias
    np.maximum(hidden, 0, out=hidden)
    slopes = hidden @ output_kernel
    slopes += output_bias
    slopes -= slopes.max(axis=1, keepdims=True)
    np.exp(slopes, out=slopes)
    slopes /= slopes.sum(axis=1, keepdims=True)
    slopes[np.arange(len(y)), y] -= 1
    slopes /= np.float32(len(y))
    below = slopes @ output_kernel.T
    below *= hidden > 0
    return [x.T @ below, below.sum(axis=0), hidden.T @ slopes, slopes.sum(axis=0)]


def numpy_alone(data: Training, count: int) -> Run:
    """Train in NumPy."""

    def program() -> Any:
        weights = mlp.layers(data.weights.copy(), data.num_hidden)
        velocities = [np.zeros_like(weight) for weight in weights]
        for rows in data.rows:
            found = gradients(data.images[rows], data.labels[rows], weights)
            for weight, velocity, gradient in zip(weights, velocities, found, strict=True):
                velocity *= MOMENTUM
                velocity += gradient
                weight -= RATE * velocity
        return weights

    yield program


def replicas(data: Training, count: int) -> Run:
    """Train on replicas of this library, with a compiled gradient: the loop of ``train``."""
    with dv.MirroredStrategy(count) as strategy:

        @functools.cache
        def workspace(replica: int, rows: int) -> mlp.Workspace:
            return mlp.Workspace(rows, data.num_hidden, "float32", Device("cpu", replica))

        def program() -> Any:
            with strategy.scope():
                weights = dv.Variable(data.weights)
            sgd = dv.optimizers.SGD(RATE, momentum=MOMENTUM)
            examples = dv.Dataset.from_arrays((data.images, data.labels))

            def step(x: Any, y: Any) -> None:
                context: Any = dv.get_replica_context()
                own = workspace(context.replica_id_in_sync_group, len(x))
                found = mlp.gradient_and_loss(weights.read_value(), x, y, own)
                sgd.apply_gradients([(found[:-1], weights)])

            for batch in strategy.distribute_dataset(_batches(examples, data.batch, data.epochs)):
                strategy.run(step, batch)
            return [weights.numpy()]

        yield program


def replicas_in_numpy(data: Training, count: int) -> Run:
    """Train on replicas of this library, with the gradient in NumPy."""
    with dv.MirroredStrategy(count) as strategy:

        def program() -> Any:
            with strategy.scope():
                layers = mlp.layers(data.weights, data.num_hidden)
                weights = [dv.Variable(layer) for layer in layers]
            sgd = dv.optimizers.SGD(RATE, momentum=MOMENTUM)
            examples = dv.Dataset.from_arrays((data.images, data.labels))

            def step(x: Any, y: Any) -> None:
                found = gradients(x, y, [weight.read_value() for weight in weights])
                sgd.apply_gradients(zip(found, weights, strict=True))

            for batch in strategy.distribute_dataset(_batches(examples, data.batch, data.epochs)):
                strategy.run(step, batch)
            return [weight.numpy() for weight in weights]

        yield program


def share(data: Training, rank: int, count: int) -> None:
    """Compute the gradients of one part of each batch, and update weights of one's own."""
    weights, velocity = data.weights.copy(), np.zeros_like(data.weights)
    parts = [np.array_split(rows, count)[rank] for rows in data.rows]
    own = mlp.Workspace(len(parts[0]), data.num_hidden, "float32", Device("cpu", rank))
    for part in parts:
        found = mlp.gradient_and_loss(weights, data.images[part], data.labels[part], own)[:-1]
        velocity *= MOMENTUM
        velocity += found
        weights -= RATE * velocity


def _flat(weights: Arrays) -> Any:
    return np.concatenate([np.ravel(each) for each in weights])


_COMPILED = (mlp.gradient_and_loss, mlp._forward_backward.py_func, mlp._layers.py_func)
_PEERS = {
    "TensorFlow MirroredStrategy": "tensorflow",
    "JAX, jit over devices": "jax",
    "PyTorch DDP, Gloo": "torch",
}


def _program(name: str, hidden: int, batch: int, epochs: int) -> Program:
    return Program(
        name,
        "digits network of {hidden} hidden units, float32, batches of {batch}, {epochs} epochs",
        {"hidden": hidden, "batch": batch, "epochs": epochs},
        make,
        (
            Neighbour("NumPy, 1 BLAS thread", numpy_alone, calls=(gradients,)),
            Neighbour(OURS, replicas, calls=(mlp.Workspace.__init__, *_COMPILED)),
            Neighbour("dvkernels, gradient in NumPy", replicas_in_numpy, calls=(gradients,)),
            Neighbour(
                "NumPy, all BLAS threads", numpy_alone, is_threaded_blas=True, calls=(gradients,)
            ),
            *(Neighbour(name, peer=peer) for name, peer in _PEERS.items()),
        ),
        "step",
        lambda sizes: _number_of_steps(sizes["batch"], sizes["epochs"]),
        _flat,
        1e-6,
        (of_possible(0.8), *(at_most(1.0, name) for name in _PEERS)),
        share,
        needs=("sklearn",),
    )


def _number_of_steps(batch: int, epochs: int) -> int:
    return epochs * (len(digits.with_shifts(digits.load("float32")).train_labels) // batch)


PROGRAMS = (_program("digits", 768, 2048, 4), _program("digits-1024", 1024, 1024, 2))
