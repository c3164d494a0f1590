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
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Roles", "numbered", "roles"]


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
    members = [[w for w, h in enumerate(hosts) if h == host] for host in range(max(hosts) + 1)]
    place = [members[host].index(w) for w, host in enumerate(hosts)]

    def door(host: int, of: int) -> int:
        return members[host][place[of] % len(members[host])]

    own = hosts[worker]
    doors = tuple(door(host, worker) for host in range(len(members)))
    carried = tuple(w for w in range(len(hosts)) if door(own, w) == worker)
    return Roles(own, doors, carried)
