"""Data-parallel training of the digits network: the loop a user of the library would write."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvkernels import context
from dvkernels.checkpoint.checkpoint import Checkpoint
from dvkernels.checkpoint.manager import CheckpointManager
from dvkernels.checkpoint.preemption import PreemptionHandler
from dvkernels.cli import mlp, mlp_gpu
from dvkernels.cli.digits import Digits
from dvkernels.data.dataset import Dataset
from dvkernels.devices import array_memory
from dvkernels.strategies.base import Strategy
from dvkernels.variables.variable import Variable

__all__: list[str] = []


@dataclass(frozen=True)
class TrainingConfig:
    """What is trained, and how long; the same for every strategy."""

    epochs: int = 30
    batch_size: int = 128  # global
    num_hidden: int = 256
    learning_rate: float = 0.1
    momentum: float = 0.9
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True)
class TrainingResult:
    """The trained weights, and where the time went: seconds are means per step."""

    weights: Any  # flat, as in mlp.py
    steps: int
    resumed_at_step: int | None
    final_loss: float
    examples_per_second: float
    seconds_per_step: float
    compute_seconds: float
    communication_seconds: float
    input_seconds: float


@dataclass(frozen=True)
class Keeping:
    """Where checkpoints are kept, and what happens when the machine is taken away."""

    directory: str
    every: int | None  # steps; None: those of an epoch
    exit_code: int


_NETWORKS: dict[str, Any] = {"cpu": mlp, "cuda": mlp_gpu}  # twins
Report = Callable[[int, int, float, float], None]  # step, examples, loss, examples per second


def dataset(recipe: TrainingConfig, data: Digits) -> Dataset:
    """Return the batches of all epochs; repeat comes last, so that a resumed run may have more."""
    return (
        Dataset.from_arrays((data.train_images, data.train_labels))
        .shuffle(seed=recipe.seed)
        .batch(recipe.batch_size)
        .repeat(recipe.epochs)
    )


def num_steps(recipe: TrainingConfig, data: Digits) -> int:
    """Return how many batches the epochs make."""
    return recipe.epochs * _steps_of_an_epoch(recipe, data)


def _steps_of_an_epoch(recipe: TrainingConfig, data: Digits) -> int:
    return -(-len(data.train_images) // recipe.batch_size)


def _examples_until(step: int, recipe: TrainingConfig, data: Digits) -> int:
    """Return how many examples of all workers that many steps see: an epoch's last may be short."""
    num_examples = len(data.train_images)
    epochs, rest = divmod(step, _steps_of_an_epoch(recipe, data))
    return epochs * num_examples + min(rest * recipe.batch_size, num_examples)


def train(
    strategy: Strategy,
    recipe: TrainingConfig,
    data: Digits,
    report: Report,
    keeping: Keeping | None = None,
) -> TrainingResult:
    """Train under a strategy, with gradients averaged over all examples of each global batch."""
    with strategy.scope():
        initial = mlp.initial_weights(recipe.num_hidden, recipe.dtype, recipe.seed)
        weights = Variable(initial, name="weights")
        velocity = Variable(np.zeros_like(initial), trainable=False, name="velocity")
    number = np.dtype(recipe.dtype).type
    rate, momentum = number(recipe.learning_rate), number(recipe.momentum)
    net = _NETWORKS[strategy.worker_devices[0].kind]
    workspaces: dict[tuple[int, int], Any] = {}  # by replica and examples
    clock = time.perf_counter

    def update(_: Strategy, averaged: Any) -> float:
        started = clock()
        change = averaged.values[0][:-1]  # ours: all_reduce has written it into the workspace
        change *= -rate
        change += momentum * velocity
        velocity.assign(change)
        weights.assign_add(change)
        return clock() - started

    def step(images: Any, labels: Any) -> None:
        replica = context.get_replica_context()
        assert replica is not None
        started = clock()
        rank = replica.rank_in_process
        key = (rank, len(images))
        if key not in workspaces:
            workspaces[key] = net.Workspace(
                len(images), recipe.num_hidden, recipe.dtype, replica.device
            )
        own = net.gradient_and_loss(weights.read_value(), images, labels, workspaces[key])
        computed = clock()
        averaged = replica.all_reduce("mean", own, weight=len(images), out=own)
        losses[rank] = float(averaged[-1])  # which waits for a GPU
        updating = replica.merge_call(update, (averaged,))
        seconds[rank] += (computed - started + updating, clock() - computed - updating)

    def warm_up() -> None:
        """Compile or load what a step needs before the clock runs; changes nothing."""
        replica = context.get_replica_context()
        assert replica is not None
        workspace = net.Workspace(1, recipe.num_hidden, recipe.dtype, replica.device)
        images, labels = (
            array_memory.on_device(array[:1], replica.device)
            for array in (data.train_images, data.train_labels)
        )
        own = net.gradient_and_loss(weights.read_value(), images, labels, workspace)
        replica.all_reduce("mean", own, weight=1, out=own)

    strategy.run(warm_up)
    num_local = len(strategy.worker_devices)
    seconds = np.zeros((num_local, 2))  # compute, communication
    losses = np.zeros(num_local)
    progress: dict[str, Any] = {"steps": 0, "loss": math.nan}
    resumed_at_step = None
    resumed_at_example, waiting = 0, 0.0
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(iter(strategy.distribute_dataset(dataset(recipe, data))))
        if keeping is not None:
            checkpoint = Checkpoint(
                weights=weights, velocity=velocity, batches=batches, progress=progress
            )
            manager = stack.enter_context(CheckpointManager(checkpoint, keeping.directory))
            restored = manager.restore_latest()
            resumed_at_step = None if restored is None else restored.step
            resumed_at_example = _examples_until(progress["steps"], recipe, data)
            if restored is not None:
                report(progress["steps"], 0, progress["loss"], 0.0)
            preemption = stack.enter_context(
                PreemptionHandler(manager, exit_code=keeping.exit_code, agree=_any_of(strategy))
            )
            every = keeping.every or _steps_of_an_epoch(recipe, data)
        began = clock()
        while True:
            asked = clock()
            images, labels = next(batches, (None, None))
            if images is None:
                break
            waiting += clock() - asked
            strategy.run(step, (images, labels))
            progress["steps"] += 1
            progress["loss"] = float(losses[0])
            steps = progress["steps"]
            seen = _examples_until(steps, recipe, data) - resumed_at_example
            report(steps, seen, losses[0], seen / (clock() - began))
            if keeping is not None:
                preemption.after_step(steps)
                if steps % every == 0:
                    manager.save(steps, background=True)
        elapsed = clock() - began
        if keeping is not None and (resumed_at_step or 0) < progress["steps"]:
            manager.save(progress["steps"])
    steps = progress["steps"]
    seen = _examples_until(steps, recipe, data) - resumed_at_example
    num_own = max(1, steps - (resumed_at_step or 0))  # of this process; 0 if all was done before
    compute, communication = seconds.mean(axis=0) / num_own
    return TrainingResult(
        weights=weights.numpy(),
        steps=steps,
        resumed_at_step=resumed_at_step,
        final_loss=progress["loss"],
        examples_per_second=seen / elapsed,
        seconds_per_step=elapsed / num_own,
        compute_seconds=float(compute),
        communication_seconds=float(communication),
        input_seconds=waiting / num_own,
    )


def _any_of(strategy: Strategy) -> Callable[[bool], bool]:
    """Return what tells whether any worker has been told to stop, the same on all of them."""

    def agree(is_requested: bool) -> bool:
        if len(strategy.worker_devices) == strategy.num_replicas_in_sync:
            return is_requested  # there are no others
        told = strategy.distribute_values_from_function(lambda _: np.int8(is_requested))
        return bool(strategy.reduce("max", told))

    return agree


def relative_difference(these: Any, those: Any) -> float:
    """Return the norm of the difference over the norm of the second."""
    reference = np.float64(those)
    return float(np.linalg.norm(these - reference) / np.linalg.norm(reference))
