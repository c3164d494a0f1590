"""What a collective costs by its schedule, and which algorithm is cheapest: a model in seconds.

A machine is described by a handful of constants. Those of ``CPU`` were measured on one machine by
``python -m dvkernels bench --calibrate``, which prints those of yours; they set where sharing a
call pays, and choose between algorithms. Choices that are near each other cost about the same, so
constants that are off by a half cost little.

In one memory domain, for R replicas of S bytes:

    direct   t = call + moved / rate,   moved = 2 R S        each byte read once, written once
    ring     t = call + moved / rate + carried / cached,     carried = 5 (R - 1) S through a cache

``rate`` is that of one thread, or, with other threads that must join first, of all of them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CPU", "Machine", "cheapest", "direct_seconds", "ring_seconds"]


class Machine(NamedTuple):
    """What a memory domain and its threads can do; times in s, rates in bytes read or written/s."""

    call_seconds: float  # what a call costs before it moves anything
    join_seconds: float  # what it costs more when threads that are awake share it
    wake_seconds: float  # what it costs the caller still more to wake them, if they sleep
    rate_of_one: float  # what one thread moves, in the sizes where the choice matters
    rate_of_all: float  # what all threads move together
    cached_rate: float  # what one thread moves within its own cache

    def sharing_pays_from(self, asleep: bool = False) -> int:
        """Return from how many bytes moved on it pays to share a call.

        call + m/one = call + join + m/all, solved for m.

        >>> Machine(0, 1e-6, 0, 50e9, 100e9, 0).sharing_pays_from()
        100000
        """
        extra = self.join_seconds + (self.wake_seconds if asleep else 0)
        return round(extra / (1 / self.rate_of_one - 1 / self.rate_of_all))

    def seconds_to_move(self, moved: int) -> float:
        """Return how long a call takes that moves so many bytes, alone or shared."""
        alone = moved / self.rate_of_one
        shared = self.join_seconds + moved / self.rate_of_all
        return self.call_seconds + min(alone, shared)


# Two cores of an AMD EPYC, November 2026: near the middle of three calibrations, whose rates lay
# within 10 % of each other, join between 0.1 and 0.5 us (taken as 1, since helpers are not always
# as prompt as in a loop) and wake was 2 us.
CPU = Machine(
    call_seconds=0.75e-6,
    join_seconds=1e-6,
    wake_seconds=2e-6,
    rate_of_one=190e9,
    rate_of_all=420e9,
    cached_rate=130e9,
)


def direct_seconds(machine: Machine, num_replicas: int, nbytes: int) -> float:
    """Return what the direct all-reduce of ``nbytes`` a replica takes."""
    return machine.seconds_to_move(2 * num_replicas * nbytes)


def ring_seconds(machine: Machine, num_replicas: int, nbytes: int) -> float:
    """Return what the ring takes whose segments stay in a cache: the same, and what it carries."""
    carried = 5 * (num_replicas - 1) * nbytes / machine.cached_rate
    return direct_seconds(machine, num_replicas, nbytes) + carried


_SECONDS = {"direct": direct_seconds, "ring": ring_seconds}


def cheapest(machine: Machine, num_replicas: int, nbytes: int) -> str:
    """Return the algorithm of the least modelled time; of two alike, the first.

    >>> cheapest(CPU, 4, 1 << 20)
    'direct'
    """
    return min(_SECONDS, key=lambda name: _SECONDS[name](machine, num_replicas, nbytes))
