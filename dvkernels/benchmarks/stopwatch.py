"""Timing of several implementations in alternating rounds, with medians and quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["Samples", "alternate", "median_seconds", "ratio", "timed"]


class Samples(NamedTuple):
    """Seconds per call, one sample per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile of the rounds."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def ratio(samples: Samples, reference: Samples) -> float:
    """Return the median over the rounds of the ratio to the reference's time in the same round.

    Not the ratio of the medians: the machine's speed may change between two rounds.
    """
    pairs = zip(samples.seconds, reference.seconds, strict=True)
    return statistics.median(seconds / other for seconds, other in pairs)


def timed(
    call: Callable[[], object],
    iterations: int,
    renew: Callable[[], object] | None = None,
    most_repeats: int = 1 << 30,
) -> float:
    """Return the seconds per call, the mean of ``iterations`` calls after an untimed one.

    ``renew`` restores the inputs, untimed, so that ``call`` runs at most ``most_repeats`` times
    on the same buffers; each time an untimed call follows.
    """
    most_repeats = max(1, most_repeats - 1)
    elapsed = 0
    for done in range(0, iterations, most_repeats):
        if renew is not None:
            renew()
        call()
        started = time.perf_counter_ns()
        for _ in range(min(most_repeats, iterations - done)):
            call()
        elapsed += time.perf_counter_ns() - started
    return elapsed / iterations / 1e9


def alternate(
    timers: Mapping[str, Callable[[], float]], num_rounds: int, rest_seconds: float = 0.0
) -> dict[str, Samples]:
    """Run every timer once per round, in turn, so that a slow phase of the machine hits all.

    Parameters
    ----------
    timers : mapping
        Name -> function that measures one implementation and returns the seconds per call.
    num_rounds : int
        Number of rounds.
    rest_seconds : float
        Pause before each timer, in which spinning threads of the one before go to sleep.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(num_rounds):
        for name, timer in timers.items():
            time.sleep(rest_seconds)
            seconds[name].append(timer())
    return {name: Samples(tuple(found)) for name, found in seconds.items()}


def median_seconds(
    call: Callable[[], object], *, min_calls: int = 7, budget_seconds: float = 0.5
) -> float:
    """Return the median time of a call, over at least ``min_calls`` and about the time budget."""
    durations: list[float] = []
    end = time.perf_counter() + budget_seconds
    while len(durations) < min_calls or time.perf_counter() < end:
        durations.append(timed(call, 1))
    return statistics.median(durations)
