"""Data-parallel training of the digits network: the loop a user of the library would write."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvkernels import context
from dvkernels.cli import network
from dvkernels.cli.digits import Digits
from dvkernels.data.dataset import Dataset
from dvkernels.strategies.base import Strategy
from dvkernels.variables.variable import Variable

__all__: list[str] = []


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how long; the same for every strategy."""

    epochs: int = 30
    batch_size: int = 128  # global
    num_hidden: int = 256
    learning_rate: float = 0.1
    momentum: float = 0.9
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """The trained weights, and where the time went: seconds are means per step."""

    weights: list[Any]
    steps: int
    final_loss: float
    examples_per_second: float
    seconds_per_step: float
    compute_seconds: float
    communication_seconds: float
    input_seconds: float


Report = Callable[[int, int, float, float], None]  # step, examples, loss, examples per second


def dataset(recipe: Recipe, data: Digits) -> Dataset:
    """Return the batches of all epochs; repeat before batch, so that all steps but one are full."""
    return (
        Dataset.from_arrays((data.train_images, data.train_labels))
        .shuffle(seed=recipe.seed)
        .repeat(recipe.epochs)
        .batch(recipe.batch_size)
    )


def num_steps(recipe: Recipe, data: Digits) -> int:
    """Return how many batches the epochs make."""
    return -(-len(data.train_images) * recipe.epochs // recipe.batch_size)


def train(strategy: Strategy, recipe: Recipe, data: Digits, report: Report) -> Outcome:
    """Train under a strategy, with gradients averaged over all examples of each global batch."""
    with strategy.scope():
        initial = network.initial_weights(recipe.num_hidden, recipe.dtype, recipe.seed)
        weights = [
            Variable(value, name=name)
            for name, value in zip(network.WEIGHT_NAMES, initial, strict=True)
        ]
        velocities = [
            Variable(np.zeros_like(value), trainable=False, name=f"{name}/velocity")
            for name, value in zip(network.WEIGHT_NAMES, initial, strict=True)
        ]
    rate, momentum = (
        np.dtype(recipe.dtype).type(x) for x in (recipe.learning_rate, recipe.momentum)
    )
    clock = time.perf_counter

    workspaces: dict[tuple[int, int], network.Workspace] = {}  # by replica and examples

    def update(_: Strategy, gradients: list[Any]) -> float:
        started = clock()
        for weight, velocity, gradient in zip(weights, velocities, gradients, strict=True):
            change = gradient.on(0)  # ours: all_reduce has written it into the workspace
            change *= -rate
            change += momentum * velocity
            velocity.assign(change)
            weight.assign_add(change)
        return clock() - started

    def step(images: Any, labels: Any) -> tuple[Any, float, float]:
        replica = context.get_replica_context()
        assert replica is not None
        started = clock()
        key = (replica.replica_id_in_sync_group, len(images))
        if key not in workspaces:
            workspaces[key] = network.Workspace(len(images), recipe.num_hidden, recipe.dtype)
        own = [weight.read_value() for weight in weights]
        loss, gradients = network.loss_and_gradients(own, images, labels, workspaces[key])
        computed = clock()
        averaged = (loss, gradients)
        loss, gradients = replica.all_reduce("mean", averaged, weight=len(images), out=averaged)
        updating = replica.merge_call(update, (gradients,))
        ended = clock()
        return loss, computed - started + updating, ended - computed - updating

    def warm_up() -> None:
        """Compile or load the kernels before the clock runs; changes nothing."""
        replica = context.get_replica_context()
        assert replica is not None
        zeros = [np.zeros_like(weight.read_value()) for weight in weights]
        replica.all_reduce("mean", (np.zeros((), recipe.dtype), zeros), weight=1)

    strategy.run(warm_up)
    compute = communication = waiting = 0.0
    steps, seen, loss = 0, 0, float("nan")
    began = clock()
    with iter(strategy.distribute_dataset(dataset(recipe, data))) as batches:
        while True:
            asked = clock()
            images, labels = next(batches, (None, None))
            if images is None:
                break
            waiting += clock() - asked
            losses, computing, communicating = strategy.run(step, (images, labels))
            compute += sum(computing.values) / len(computing)
            communication += sum(communicating.values) / len(communicating)
            steps += 1
            seen += sum(len(part) for part in images.values)
            loss = float(losses.on(0))
            report(steps, seen, loss, seen / (clock() - began))
    elapsed = clock() - began
    return Outcome(
        weights=[weight.numpy() for weight in weights],
        steps=steps,
        final_loss=loss,
        examples_per_second=seen / elapsed,
        seconds_per_step=elapsed / steps,
        compute_seconds=compute / steps,
        communication_seconds=communication / steps,
        input_seconds=waiting / steps,
    )


def relative_difference(these: list[Any], those: list[Any]) -> float:
    """Return the norm of the weights' difference over the norm of the second ones."""
    difference = sum(
        float(np.square(np.float64(a) - b).sum()) for a, b in zip(these, those, strict=True)
    )
    return float(np.sqrt(difference / sum(float(np.square(np.float64(b)).sum()) for b in those)))
