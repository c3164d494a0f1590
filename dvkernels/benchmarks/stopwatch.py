"""Several contestants in one run: alternating rounds, medians and quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["Samples", "alternate", "median_seconds", "ratio", "timed"]


class Samples(NamedTuple):
    """Seconds a call, one number a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the rounds was faster than the first, a quarter slower than the second."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def ratio(one: Samples, other: Samples) -> float:
    """Return the median over the rounds of one's time divided by the other's in the same round.

    Not the ratio of the medians: the machine may change its pace between two rounds.
    """
    pairs = zip(one.seconds, other.seconds, strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def timed(
    call: Callable[[], object],
    iterations: int,
    renew: Callable[[], object] | None = None,
    most_repeats: int = 1 << 30,
) -> float:
    """Return the seconds that one of ``iterations`` calls takes, after one that does not count.

    Every ``most_repeats`` calls ``renew`` is called, off the clock, and again one more.
    """
    most_repeats = max(1, most_repeats - 1)
    elapsed = 0
    for begun in range(0, iterations, most_repeats):
        if renew is not None:
            renew()
        call()
        began = time.perf_counter_ns()
        for _ in range(min(most_repeats, iterations - begun)):
            call()
        elapsed += time.perf_counter_ns() - began
    return elapsed / iterations / 1e9


def alternate(
    contestants: Mapping[str, Callable[[], float]], num_rounds: int, rest_seconds: float = 0.0
) -> dict[str, Samples]:
    """Let each contestant measure itself (and return seconds) once a round, in turn.

    A neighbour that slows the machine for a while slows all of them. ``rest_seconds`` lets the
    threads of the one before fall asleep: some spin on after their work.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(num_rounds):
        for name, measure in contestants.items():
            time.sleep(rest_seconds)
            seconds[name].append(measure())
    return {name: Samples(tuple(found)) for name, found in seconds.items()}


def median_seconds(
    call: Callable[[], object], *, min_calls: int = 7, budget_seconds: float = 0.5
) -> float:
    """Return the median time of ``call``, over at least ``min_calls`` and about the budget."""
    durations: list[float] = []
    end = time.perf_counter() + budget_seconds
    while len(durations) < min_calls or time.perf_counter() < end:
        durations.append(timed(call, 1))
    return statistics.median(durations)
