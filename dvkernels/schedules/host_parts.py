"""Who speaks with whom between hosts: each worker reduces one part of the array for all of them.

    1   every host reduces what its workers hold, in memory that they share
    2   of each host, part j goes to worker j, which adds up the hosts' parts
    3   and the result goes back to each host, where all its workers read it

Part j enters and leaves a host by one worker, its door. Doors are dealt out evenly, so that all
workers of a host send at the same time:

    workers 0 1 | 2 3       parts 0 2 enter the first host by worker 0, parts 1 3 by worker 1,
                            parts 0 2 enter the second by worker 2, parts 1 3 by worker 3

A host of m of n workers sends, and receives, (1 - m/n) S + (H - 1) m/n S bytes of an array of S;
with as many workers on each of H hosts that is 2 (H - 1)/H S, the least possible.

In an exchange all hosts send their part j to worker j at once, and it sends the result to all of
them. In a ring each part goes around instead, twice, through the same doors, and every worker hears
only from those of the host before its own. Part j starts at the host after worker j's. Each host
adds its own, and worker j has the sum, which then goes around once more:

    3 hosts of a worker      part 0        part 1        part 2
    tick 0    add            1->2          2->0          0->1
         1    add            2->0          0->1          1->2
         2    result         0->1          1->2          2->0
         3    result         1->2          2->0          0->1

So the hosts' parts of part j are added in the order of the hosts, from the one after worker j's on.
As many bytes, in 2 (H - 1) messages one after another where an exchange has two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Roles", "Stop", "numbered", "ring", "roles"]


class Roles(NamedTuple):
    """What one worker does between hosts.

    Attributes
    ----------
    host : int
        Its own, counted in the order of their first workers.
    doors : tuple of int
        Of each host, the worker that speaks with this one: on its own host that is itself.
    carried : tuple of int
        The workers whose parts enter and leave this host by this one, itself among them.
    """

    host: int
    doors: tuple[int, ...]
    carried: tuple[int, ...]


def numbered(hosts: Sequence[object]) -> list[int]:
    """Return the number of each worker's host, hosts counted in the order in which they come.

    >>> numbered(["b", "a", "b"])
    [0, 1, 0]
    """
    numbers: dict[object, int] = {}
    return [numbers.setdefault(host, len(numbers)) for host in hosts]


def roles(hosts: Sequence[int], worker: int) -> Roles:
    """Return what a worker does; ``hosts`` has the number of each worker's host.

    >>> roles([0, 0, 1, 1], 1)
    Roles(host=0, doors=(1, 3), carried=(1, 3))
    >>> roles([0, 0, 0, 1], 3)
    Roles(host=1, doors=(0, 3), carried=(0, 1, 2, 3))
    """
    doors = _Doors(hosts)
    own = hosts[worker]
    carried = tuple(w for w in range(len(hosts)) if doors.of(own, w) == worker)
    return Roles(own, tuple(doors.of(host, worker) for host in range(doors.num_hosts)), carried)


class Stop(NamedTuple):
    """Where a part comes by this worker on its way around the hosts.

    Attributes
    ----------
    part : int
    place : int
        How many hosts have added theirs before: at 0 the part starts, at H - 1 is its worker.
    before, after : int
        The workers from whom it comes and to whom it goes.
    """

    part: int
    place: int
    before: int
    after: int


def ring(hosts: Sequence[int], worker: int) -> list[Stop]:
    """Return where parts come by a worker, those that come first first.

    >>> ring([0, 1, 2], 1)
    [Stop(part=0, place=0, before=0, after=2), Stop(part=2, place=1, before=0, after=2), \
Stop(part=1, place=2, before=0, after=2)]
    """
    doors = _Doors(hosts)
    own, count = hosts[worker], doors.num_hosts
    stops = [
        Stop(
            part,
            (own - hosts[part] - 1) % count,
            doors.of((own - 1) % count, part),
            doors.of((own + 1) % count, part),
        )
        for part in roles(hosts, worker).carried
    ]
    return sorted(stops, key=lambda stop: stop.place)


class _Doors:
    """Through whom parts enter hosts."""

    def __init__(self, hosts: Sequence[int]) -> None:
        self.num_hosts = max(hosts) + 1
        self._members: list[list[int]] = [[] for _ in range(self.num_hosts)]
        self._places: list[int] = []  # of each worker among those of its host
        for worker, host in enumerate(hosts):
            self._places.append(len(self._members[host]))
            self._members[host].append(worker)

    def of(self, host: int, part: int) -> int:
        """Return the worker through whom a part enters a host."""
        members = self._members[host]
        return members[self._places[part] % len(members)]
