"""Training loop of ``train``, written as a user of the library would write it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

import dvkernels as dv
from dvkernels.cli import mlp, mlp_gpu
from dvkernels.cli.digits import Digits
from dvkernels.cli.step_times import StepTimes, clock
from dvkernels.cli.training_config import TrainingConfig

__all__: list[str] = []


# The learning rate falls to half in so many steps, to a third in twice as many. Constant, it makes
# training chaotic: after 700 steps rounding errors were 2e-4 of the weights, now they are 5e-6.
_STEPS_TO_HALVE_THE_RATE = 300

_NETWORKS: dict[str, Any] = {"cpu": mlp, "cuda": mlp_gpu}  # twins


def dataset(config: TrainingConfig, data: Digits) -> dv.Dataset:
    """Return the batches of all epochs; repeat comes last, so that a resumed run may have more."""
    return (
        dv.Dataset.from_arrays((data.train_images, data.train_labels))
        .shuffle(seed=config.seed)
        .batch(config.batch_size)
        .repeat(config.epochs)
    )


def steps_per_epoch(config: TrainingConfig, data: Digits) -> int:
    """Return the number of batches in an epoch; the last one may be short."""
    return -(-len(data.train_images) // config.batch_size)


class Training:
    """Training under a strategy: its variables, its optimizer, its input, and its steps.

    Each step averages the gradients over all examples of a global batch, so the weights are those
    of the same training on one device, up to rounding.
    """

    def __init__(self, strategy: dv.Strategy, config: TrainingConfig, data: Digits) -> None:
        with strategy.scope():
            initial = mlp.initial_weights(config.num_hidden, config.dtype, config.seed)
            self.weights = dv.Variable(initial, name="weights")
        self.optimizer = dv.optimizers.SGD(
            lambda step: config.learning_rate / (1 + step / _STEPS_TO_HALVE_THE_RATE),
            momentum=config.momentum,
        )
        self.batches = iter(strategy.distribute_dataset(dataset(config, data)))
        self.progress: dict[str, Any] = {"steps": 0, "loss": math.nan}  # as checkpoints save it
        self.losses: list[float] = []  # of each step since the start or the resumption
        self.num_steps = config.epochs * steps_per_epoch(config, data)
        self.times = StepTimes(len(strategy.worker_devices))
        self.strategy = strategy
        self._config = config
        self._network = _NETWORKS[strategy.worker_devices[0].kind]
        self._workspaces: dict[tuple[int, int], Any] = {}  # by replica and number of examples

    @property
    def steps(self) -> int:
        """Number of steps taken, those before a resumption included."""
        return int(self.progress["steps"])

    @property
    def loss(self) -> float:
        """Mean loss over the examples of the last step; NaN before the first one."""
        return float(self.progress["loss"])

    @property
    def has_diverged(self) -> bool:
        """Whether the loss is no longer finite."""
        return self.steps > 0 and not math.isfinite(self.loss)

    @property
    def is_over(self) -> bool:
        """Whether all steps are taken, or no further one has a meaning."""
        return self.has_diverged or self.steps >= self.num_steps

    def advance(self, num_steps: int, after_step: Callable[[], bool] = lambda: False) -> None:
        """Take steps until so many are taken, the training is over, or ``after_step`` says stop."""
        with self.times.running():
            for _ in range(num_steps):
                if self.is_over:
                    return
                self._step()
                if after_step():
                    return

    def _step(self) -> None:
        started = clock()
        batch = next(self.batches)
        fetched = clock()
        sums = self.strategy.run(self._step_of_replica, batch)
        returned = clock()
        with self.times.measured("loss"):
            loss, num_examples = self.strategy.reduce("sum", sums)
        self.progress["steps"] += 1
        self.progress["loss"] = float(loss / num_examples)
        self.losses.append(self.loss)
        self.times.add(started, fetched, returned, int(num_examples))

    def _step_of_replica(self, images: Any, labels: Any) -> Any:
        """Take this replica's part of a step; return the sum of its losses, and their number."""
        began = clock()
        replica = dv.get_replica_context()
        assert replica is not None
        workspace = self._workspace(replica, len(images))
        gradient = self._network.gradient_and_loss(
            self.weights.read_value(), images, labels, workspace
        )
        sums = np.array([float(gradient[-1]) * len(images), len(images)])  # waits for a GPU
        computed = clock()
        self.optimizer.apply_gradients([(gradient[:-1], self.weights)], weight=len(images))
        self.times.marks[replica.rank_in_process] = (began, computed, clock())
        return sums

    def sum_over_workers(self, number: float) -> float:
        """Return the sum of the workers' numbers, on all of them; each must call it."""
        num_local = len(self.strategy.worker_devices)
        shares = self.strategy.distribute_values_from_function(lambda _: number / num_local)
        return float(self.strategy.reduce("sum", shares))

    def _workspace(self, replica: dv.ReplicaContext, num_examples: int) -> Any:
        key = (replica.rank_in_process, num_examples)
        if key not in self._workspaces:
            config = self._config
            self._workspaces[key] = self._network.Workspace(
                num_examples, config.num_hidden, config.dtype, replica.device
            )
        return self._workspaces[key]


def train(strategy: dv.Strategy, config: TrainingConfig, data: Digits) -> Training:
    """Return a training that has taken all of its steps; the first one is not in its times."""
    training = Training(strategy, config, data)
    with training.batches:
        training.advance(1)
        if not training.is_over:
            training.times.clear()
        training.advance(training.num_steps)
    return training


def relative_difference(values: Any, reference: Any) -> float:
    """Return the norm of the difference, divided by the norm of the reference."""
    reference = np.float64(reference)
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))
