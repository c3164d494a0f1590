"""Comparison of a training with the same on one device, in alternating blocks of the same run.

So a slow phase of the machine slows both. Beside them runs the compute alone: the speed-up that is
possible.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dvkernels.cli.compute_alone import ComputeAlone
from dvkernels.cli.training_loop import Training
from dvkernels.profiler.core_usage import CoreUsage

__all__: list[str] = []

_MOST_STEPS_IN_A_BLOCK = 64
_NUM_BLOCKS = 20
_STEPS_PER_REPEAT = 2  # of the compute alone
_LEAST_SECONDS = 0.01  # of the compute alone
_REST_SECONDS = 0.002  # until the replicas that spin for the next step sleep

AfterStep = Callable[[], bool]  # whether to stop


@dataclass
class Comparison:
    """Blocks of a training, of the same on one device, and of the compute alone.

    ``alone`` is None on the workers that are not the chief, ``compute`` where replicas are not
    threads on cores. All workers run the same blocks.
    """

    training: Training
    alone: Training | None
    compute: ComputeAlone | None
    speed_ups: list[float] = field(default_factory=list)
    possible: list[float] = field(default_factory=list)
    share_of_others: float | None = None

    def run(self, after_step: AfterStep, after_step_alone: AfterStep) -> None:
        """Train to the end, or until ``after_step`` says stop."""
        if self.alone is not None:  # of a resumed run
            self.alone.advance(self.training.steps - self.alone.steps, after_step_alone)
        self._block(1, after_step, after_step_alone)  # compiles, starts threads, fills pipelines
        if not self.training.is_over:
            self._start_the_clock()
        left = self.training.num_steps - self.training.steps
        size = min(_MOST_STEPS_IN_A_BLOCK, max(1, left // _NUM_BLOCKS))
        usage = CoreUsage()
        while not self.training.is_over:
            self._block(size, after_step, after_step_alone)
        self.share_of_others = usage.share_of_others()

    def _start_the_clock(self) -> None:
        for each in (self.training, self.alone):
            if each is not None:
                each.times.clear()
        self.speed_ups.clear()
        self.possible.clear()

    def _block(self, size: int, after_step: AfterStep, after_step_alone: AfterStep) -> None:
        together = _advance(self.training, size, after_step)
        self._measure_possible(size)
        if self.alone is not None:
            time.sleep(_REST_SECONDS)
            alone = _advance(self.alone, self.training.steps - self.alone.steps, after_step_alone)
            if together > 0 < alone:
                self.speed_ups.append(alone / together)

    def _measure_possible(self, size: int) -> None:
        if self.compute is None or not self.training.times.num_steps:
            return
        seconds = self.training.times.by_part()["compute"]
        repeats = max(1, size // _STEPS_PER_REPEAT, math.ceil(_LEAST_SECONDS / seconds))
        weights = self.training.weights.read_value()
        time.sleep(_REST_SECONDS)
        on_all = self.training.sum_over_workers(self.compute.on_all_threads(weights, repeats))
        if self.alone is not None:
            self.possible.append(on_all / self.compute.on_one_thread(weights, repeats))


def _advance(training: Training, num_steps: int, after_step: AfterStep) -> float:
    """Return the seconds per step of a block; 0 if it had none."""
    before, elapsed = training.steps, training.times.elapsed
    training.advance(num_steps, after_step)
    num_taken = training.steps - before
    return (training.times.elapsed - elapsed) / num_taken if num_taken else 0.0
