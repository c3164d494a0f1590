"""Compute of a training alone: its gradient function in plain threads, without the library.

What all cores gain over one here is the speed-up that is possible: no reduction, no input, no
synchronization. Virtual cores that share a physical one gain little, whoever divides the work.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dvkernels.cli import mlp
from dvkernels.cli.digits import Digits
from dvkernels.cli.step_times import clock
from dvkernels.cli.training_config import TrainingConfig
from dvkernels.devices.device import Device

__all__: list[str] = []

Part = tuple[Any, Any, mlp.Workspace]  # images, labels, workspace


class ComputeAlone:
    """Gradients of a batch, by one thread with all of it, or by several with a part each."""

    def __init__(
        self, config: TrainingConfig, data: Digits, num_replicas: int, num_local: int
    ) -> None:
        size = min(config.batch_size, len(data.train_images))

        def part(rows: Any) -> Part:
            workspace = mlp.Workspace(len(rows), config.num_hidden, config.dtype, Device("cpu", 0))
            return data.train_images[rows], data.train_labels[rows], workspace

        self._whole = [part(np.arange(size))]
        split = np.array_split(np.arange(size), num_replicas)
        self._parts = [part(rows) for rows in split[:num_local] if len(rows)]

    def on_one_thread(self, weights: Any, repeats: int) -> float:
        """Return the examples per second of one thread with the whole batch."""
        return _rate(self._whole, weights, repeats)

    def on_all_threads(self, weights: Any, repeats: int) -> float:
        """Return the examples per second of a thread for each replica of this process."""
        return _rate(self._parts, weights, repeats)


def _rate(parts: list[Part], weights: Any, repeats: int) -> float:
    """Return the examples of all parts over the mean time of the threads.

    Each thread measures its own time, so that their start and their end are off the clock.
    """
    together = threading.Barrier(len(parts))

    def compute(part: Part) -> float:
        images, labels, workspace = part
        together.wait()
        started = clock()
        for _ in range(repeats):
            if together.broken:
                break
            mlp.gradient_and_loss(weights, images, labels, workspace)
        return clock() - started

    with ThreadPoolExecutor(len(parts)) as pool:
        try:
            seconds = list(pool.map(compute, parts))
        finally:
            together.abort()  # an interrupt ends what runs, and what waits for others to start
    num_examples = repeats * sum(len(images) for images, _, _ in parts)
    return num_examples * len(parts) / sum(seconds)
