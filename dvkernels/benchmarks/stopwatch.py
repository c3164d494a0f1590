"""Alternating rounds of several contestants in one run: medians, and their spread.

On a shared machine a neighbour can halve the bandwidth for minutes. What is measured in turn meets
the same neighbours, so the ratio of two times holds where neither time does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dvkernels.benchmarks.failures import ContestantLostError

__all__: list[str] = []


class Contestant(NamedTuple):
    """Something that says how long so many calls took; ``max_calls`` at a time, if not None."""

    run: Callable[[int], float]
    max_calls: int | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one entry a round."""

    seconds: tuple[float, ...]
    calls_a_round: int

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def over(self, other: Timing) -> float:
        """Return the median of the ratios, round by round, of these times to the others."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


class Result(NamedTuple):
    """Timings by name, and why the contestants that are not among them were lost."""

    timings: dict[str, Timing]
    lost: dict[str, ContestantLostError]


def alternate(
    contestants: Mapping[str, Contestant], num_rounds: int, batch_seconds: float = 2e-3
) -> Result:
    """Let the contestants take turns, each with as many calls as fill ``batch_seconds``."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    calls: dict[str, int] = {}
    lost: dict[str, ContestantLostError] = {}
    for turn in range(-1, num_rounds):  # the turn -1 finds out how many calls fill the time
        for name, contestant in contestants.items():
            if name in lost:
                continue
            try:
                if turn < 0:
                    calls[name] = _num_calls(contestant, batch_seconds)
                else:
                    seconds[name].append(contestant.run(calls[name]) / calls[name])
            except ContestantLostError as error:
                lost[name] = error
    timings = {
        name: Timing(tuple(times), calls[name])
        for name, times in seconds.items()
        if name not in lost
    }
    return Result(timings, lost)


def _num_calls(contestant: Contestant, batch_seconds: float) -> int:
    limit = contestant.max_calls or 1 << 20
    calls = 1
    contestant.run(1)
    while True:  # until a batch is long enough to be divided
        seconds = contestant.run(calls)
        if seconds >= batch_seconds / 4 or calls == limit:
            break
        calls = min(4 * calls, limit)
    return max(1, min(limit, round(calls * batch_seconds / max(seconds, 1e-9))))


def median_seconds(
    call: Callable[[], object], *, min_calls: int = 7, budget_seconds: float = 0.5
) -> float:
    """Return the median time of ``call``, over at least ``min_calls`` and about the budget."""
    durations_ns: list[int] = []
    end = time.perf_counter() + budget_seconds
    while len(durations_ns) < min_calls or time.perf_counter() < end:
        start = time.perf_counter_ns()
        call()
        durations_ns.append(time.perf_counter_ns() - start)
    return statistics.median(durations_ns) / 1e9
