"""Times of the steps of a training, by part; what has no name is a part too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__: list[str] = []

clock = time.perf_counter  # one clock for all threads

# In the order of a step. A replica waits from the end of its compute to that of the last one's.
PARTS = (
    "input", "start", "compute", "waiting", "reduce and update", "end", "loss", "checkpoint",
)  # fmt: skip


class StepTimes:
    """Sums of the seconds of all steps, by part; those of the replicas are means over them.

    ``marks`` of a replica are the times at which its function began, its gradient was computed,
    and the variables were updated.
    """

    def __init__(self, num_replicas: int) -> None:
        self.marks = [(0.0, 0.0, 0.0)] * num_replicas
        self.clear()

    def clear(self) -> None:
        """Start anew: what came before was the warm-up."""
        self.num_steps = 0
        self.num_examples = 0
        self._elapsed = 0.0
        self._running_since: float | None = None
        self._sums = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the time that the enclosed steps take, with whatever is between them."""
        self._running_since = clock()
        try:
            yield
        finally:
            self._elapsed, self._running_since = self.elapsed, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock, inside of ``running``."""
        started = clock()
        yield
        self._elapsed -= clock() - started

    @contextmanager
    def measured(self, part: str) -> Iterator[None]:
        """Add the enclosed time to a part."""
        started = clock()
        yield
        self._sums[part] += clock() - started

    def add(self, started: float, fetched: float, returned: float, num_examples: int) -> None:
        """Add a step: the times at which it started, had its input, and had run the replicas."""
        begins, computeds, dones = (
            sum(times) / len(times) for times in zip(*self.marks, strict=True)
        )
        last = max(computed for _, computed, _ in self.marks)
        sums = self._sums
        sums["input"] += fetched - started
        sums["start"] += begins - fetched
        sums["compute"] += computeds - begins
        sums["waiting"] += last - computeds
        sums["reduce and update"] += dones - last
        sums["end"] += returned - dones
        self.num_steps += 1
        self.num_examples += num_examples

    def by_part(self) -> dict[str, float]:
        """Return the seconds per step of each part; "unnamed" is the rest of the time."""
        parts = {part: seconds / self.num_steps for part, seconds in self._sums.items()}
        return {**parts, "unnamed": self.seconds_per_step - sum(parts.values())}

    @property
    def elapsed(self) -> float:
        """Seconds that the clock has run."""
        if self._running_since is None:
            return self._elapsed
        return self._elapsed + clock() - self._running_since

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a step."""
        return self.elapsed / self.num_steps

    @property
    def examples_per_second(self) -> float:
        """Number of examples over the time; 0 before the first step."""
        return self.num_examples / self.elapsed if self.num_examples else 0.0
