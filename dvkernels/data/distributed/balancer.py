"""Balancer: the shares of a batch, which follow the measured speed of the replicas."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate, pairwise

from dvkernels.profiler.debugging import LOGGER
from dvkernels.replicas.work_meter import WorkMeter

__all__: list[str] = []

_WARM_UP = 2  # batches that are not measured: their steps compile, and fill caches
_AFTER_CHANGE = 1  # the same after new shares: parts of a new shape
# A median of 9 ignores 4 outliers: an evaluation, a checkpoint or a busy moment between batches.
_NUM_SAMPLES = 9
_LEAST_GAIN = 0.05  # of the time of the slowest replica: changes for less would follow the noise


class Balancer:
    """Balancer of the parts of batches among the replicas of one worker.

    It divides one batch after another. The work of all steps between two batches counts for the
    first of them. The seconds per element of a replica are the median over a few batches. Where
    other shares would relieve the slowest replica by a twentieth, the shares go halfway there:
    halfway, since then they settle even if the work grows with the square of the rows. If the
    slowest replica does not get faster by a quarter of what was predicted, the shares go back, and
    the next change must promise twice as much.

    Parameters
    ----------
    meter : WorkMeter
        Measures the work of the replicas.

    Examples
    --------
    >>> meter = WorkMeter(2)
    >>> balancer = Balancer(meter)
    >>> balancer.parts(6)
    [(0, 3), (3, 6)]
    >>> for _ in range(40):  # replica 0 takes 1 ms for an element, replica 1 takes 2 ms
    ...     (_, middle), (_, stop) = balancer.parts(6)
    ...     meter.add([0.001 * middle, 0.002 * (stop - middle)])
    >>> balancer.parts(6)
    [(0, 4), (4, 6)]
    """

    def __init__(self, meter: WorkMeter) -> None:
        self._meter = meter
        self._latest = meter.reading  # before the steps of the latest batch
        num_replicas = len(self._latest.seconds)
        self._counts = [0] * num_replicas  # elements of the latest batch
        # Seconds per element of the replicas, for each batch since the shares were last judged.
        self._samples: list[tuple[float, ...]] = []
        self._longest = 0  # of these batches: the shares are judged by it, not by a remainder
        self._num_to_skip = _WARM_UP
        self._least_gain = _LEAST_GAIN
        # The shares before the last change, and what it must achieve: seconds of the slowest
        # replica, per element of the batch.
        self._before: tuple[float, ...] = ()
        self._goal = math.inf
        self.shares = meter.shares or (1 / num_replicas,) * num_replicas
        self.seconds_per_element: tuple[float, ...] = ()  # empty until enough is measured

    def parts(self, length: int) -> list[tuple[int, int]]:
        """Return the start and the stop of each replica's part of the next batch."""
        reading = self._meter.reading
        if reading.num_steps > self._latest.num_steps:
            self._measure(reading.seconds)
            if len(self._samples) >= _NUM_SAMPLES:
                samples, self._samples = self._samples, []
                longest, self._longest = self._longest, 0
                self.seconds_per_element = tuple(map(statistics.median, zip(*samples, strict=True)))
                self._rebalance(longest, self.seconds_per_element)
        self._latest, self._counts = reading, divide(length, self.shares)
        return [*pairwise(accumulate(self._counts, initial=0))]

    def _measure(self, seconds: Sequence[float]) -> None:
        """Record the work on the latest batch, if every replica had some."""
        worked = [*map(float.__sub__, seconds, self._latest.seconds)]
        if min(self._counts) == 0 or min(worked) <= 0:
            return
        if self._num_to_skip:
            self._num_to_skip -= 1
            return
        self._longest = max(self._longest, sum(self._counts))
        self._samples.append(tuple(map(float.__truediv__, worked, map(float, self._counts))))

    def _rebalance(self, length: int, costs: tuple[float, ...]) -> None:
        """Change the shares if that would relieve the slowest replica by enough."""
        now = _slowest(costs, length, self.shares)
        if now > self._goal:
            self._least_gain *= 2
            self._change(self._before, math.inf)
            return
        if self._goal < math.inf:
            self._least_gain, self._goal = _LEAST_GAIN, math.inf
        wanted = _normalized([1 / cost for cost in costs])
        if now <= (1 + self._least_gain) * _slowest(costs, length, wanted):
            return
        target = _normalized([*map(math.sqrt, map(float.__mul__, self.shares, wanted))])
        if _slowest(costs, length, target) >= now:  # in small batches the counts may stay
            target = wanted
        self._before = self.shares
        self._change(target, now - (now - _slowest(costs, length, target)) / 4)

    def _change(self, shares: tuple[float, ...], goal: float) -> None:
        """Set the shares, with which the next dataset of the strategy begins, too."""
        self._num_to_skip = _AFTER_CHANGE
        self._goal = goal
        self.shares = self._meter.shares = shares
        LOGGER.info("shares of the local replicas: %s, at %s s per element", self,
                    self.seconds_per_element)  # fmt: skip

    def __str__(self) -> str:
        return ", ".join(f"{share:.3f}" for share in self.shares)


def divide(length: int, shares: Sequence[float]) -> list[int]:
    """Return the number of elements for each share; at least 1 where there are enough elements.

    The numbers are rounded by largest remainder. Equal remainders favour the first.

    >>> divide(10, [0.5, 0.26, 0.24])
    [5, 3, 2]
    >>> divide(10, [0.98, 0.01, 0.01])
    [8, 1, 1]
    """
    least = 1 if length >= len(shares) else 0
    exact = [length * share for share in shares]
    counts = [max(least, math.floor(each)) for each in exact]
    replicas = range(len(shares))
    while (left := length - sum(counts)) > 0:
        counts[max(replicas, key=lambda k: exact[k] - counts[k])] += 1
    for _ in range(-left):
        reducible = [k for k in replicas if counts[k] > least]
        counts[min(reducible, key=lambda k: exact[k] - counts[k])] -= 1
    return counts


def _normalized(shares: Sequence[float]) -> tuple[float, ...]:
    total = sum(shares)
    return tuple(share / total for share in shares)


def _slowest(costs: Sequence[float], length: int, shares: Sequence[float]) -> float:
    """Return the predicted time of the slowest replica for a batch, per element of the batch."""
    return max(map(float.__mul__, costs, map(float, divide(length, shares)))) / length
