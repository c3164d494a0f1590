"""Training loop of ``train``, written as a user of the library would write it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvkernels import replica_context
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
    """Hyperparameters of a training run; the same for every strategy."""

    epochs: int = 30
    batch_size: int = 128  # global
    num_hidden: int = 256
    learning_rate: float = 0.1
    momentum: float = 0.9
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True)
class TrainingResult:
    """Trained weights, and times: seconds are means per step."""

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
class CheckpointConfig:
    """Folder and period of the checkpoints, and the exit status after a preemption."""

    directory: str
    every: int | None  # steps; None: those of an epoch
    exit_code: int


_NETWORKS: dict[str, Any] = {"cpu": mlp, "cuda": mlp_gpu}  # twins
# Called with step, examples, loss, examples per second.
ProgressReport = Callable[[int, int, float, float], None]


def dataset(config: TrainingConfig, data: Digits) -> Dataset:
    """Return the batches of all epochs; repeat comes last, so that a resumed run may have more."""
    return (
        Dataset.from_arrays((data.train_images, data.train_labels))
        .shuffle(seed=config.seed)
        .batch(config.batch_size)
        .repeat(config.epochs)
    )


def num_steps(config: TrainingConfig, data: Digits) -> int:
    """Return the number of batches in all epochs."""
    return config.epochs * _steps_per_epoch(config, data)


def _steps_per_epoch(config: TrainingConfig, data: Digits) -> int:
    return -(-len(data.train_images) // config.batch_size)


def _num_examples(steps: int, config: TrainingConfig, data: Digits) -> int:
    """Return the number of examples in the first steps: an epoch's last batch may be short."""
    epoch_size = len(data.train_images)
    epochs, rest = divmod(steps, _steps_per_epoch(config, data))
    return epochs * epoch_size + min(rest * config.batch_size, epoch_size)


def train(
    strategy: Strategy,
    config: TrainingConfig,
    data: Digits,
    report: ProgressReport,
    checkpoints: CheckpointConfig | None = None,
) -> TrainingResult:
    """Train under a strategy, with gradients averaged over all examples of each global batch."""
    with strategy.scope():
        initial = mlp.initial_weights(config.num_hidden, config.dtype, config.seed)
        weights = Variable(initial, name="weights")
        velocity = Variable(np.zeros_like(initial), trainable=False, name="velocity")
    number = np.dtype(config.dtype).type
    rate, momentum = number(config.learning_rate), number(config.momentum)
    net = _NETWORKS[strategy.worker_devices[0].kind]
    workspaces: dict[tuple[int, int], Any] = {}  # by replica and number of examples
    clock = time.perf_counter

    def update(_: Strategy, averaged: Any) -> float:
        started = clock()
        delta = averaged.values[0][:-1]  # may be overwritten: a view of the workspace
        delta *= -rate
        delta += momentum * velocity
        velocity.assign(delta)
        weights.assign_add(delta)
        return clock() - started

    def step(images: Any, labels: Any) -> None:
        replica = replica_context.get_replica_context()
        assert replica is not None
        started = clock()
        rank = replica.rank_in_process
        key = (rank, len(images))
        if key not in workspaces:
            workspaces[key] = net.Workspace(
                len(images), config.num_hidden, config.dtype, replica.device
            )
        own = net.gradient_and_loss(weights.read_value(), images, labels, workspaces[key])
        computed = clock()
        averaged = replica.all_reduce("mean", own, weight=len(images), out=own)
        losses[rank] = float(averaged[-1])  # synchronizes with a GPU
        updating = replica.merge_call(update, (averaged,))
        seconds[rank] += (computed - started + updating, clock() - computed - updating)

    def warm_up() -> None:
        """Compile or load the code of a step before the clock starts; changes no variable."""
        replica = replica_context.get_replica_context()
        assert replica is not None
        workspace = net.Workspace(1, config.num_hidden, config.dtype, replica.device)
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
        batches = stack.enter_context(iter(strategy.distribute_dataset(dataset(config, data))))
        if checkpoints is not None:
            checkpoint = Checkpoint(
                weights=weights, velocity=velocity, batches=batches, progress=progress
            )
            manager = stack.enter_context(CheckpointManager(checkpoint, checkpoints.directory))
            restored = manager.restore_latest()
            resumed_at_step = None if restored is None else restored.step
            resumed_at_example = _num_examples(progress["steps"], config, data)
            if restored is not None:
                report(progress["steps"], 0, progress["loss"], 0.0)
            preemption = stack.enter_context(
                PreemptionHandler(manager, exit_code=checkpoints.exit_code, agree=_any_of(strategy))
            )
            every = checkpoints.every or _steps_per_epoch(config, data)
        loop_start = clock()
        while True:
            fetch_start = clock()
            images, labels = next(batches, (None, None))
            if images is None:
                break
            waiting += clock() - fetch_start
            strategy.run(step, (images, labels))
            progress["steps"] += 1
            progress["loss"] = float(losses[0])
            steps = progress["steps"]
            seen = _num_examples(steps, config, data) - resumed_at_example
            report(steps, seen, losses[0], seen / (clock() - loop_start))
            if checkpoints is not None:
                preemption.after_step(steps)
                if steps % every == 0:
                    manager.save(steps, background=True)
        elapsed = clock() - loop_start
        if checkpoints is not None and (resumed_at_step or 0) < progress["steps"]:
            manager.save(progress["steps"])
    steps = progress["steps"]
    seen = _num_examples(steps, config, data) - resumed_at_example
    num_timed = max(1, steps - (resumed_at_step or 0))  # without those before a resume
    compute, communication = seconds.mean(axis=0) / num_timed
    return TrainingResult(
        weights=weights.numpy(),
        steps=steps,
        resumed_at_step=resumed_at_step,
        final_loss=progress["loss"],
        examples_per_second=seen / elapsed,
        seconds_per_step=elapsed / num_timed,
        compute_seconds=float(compute),
        communication_seconds=float(communication),
        input_seconds=waiting / num_timed,
    )


def _any_of(strategy: Strategy) -> Callable[[bool], bool]:
    """Return a collective "or" over all workers, for requests to stop."""

    def agree(is_requested: bool) -> bool:
        if len(strategy.worker_devices) == strategy.num_replicas_in_sync:
            return is_requested  # a single worker
        requested = strategy.distribute_values_from_function(lambda _: np.int8(is_requested))
        return bool(strategy.reduce("max", requested))

    return agree


def relative_difference(values: Any, reference: Any) -> float:
    """Return the norm of the difference, divided by the norm of the reference."""
    reference = np.float64(reference)
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))
