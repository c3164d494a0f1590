"""Hierarchical all-reduce between hosts, split into parts: each worker reduces one part.

    1   every host reduces the arrays of its workers, in memory that they share
    2   reduce-scatter: each host sends part j to worker j, which adds up the hosts' parts
    3   all-gather: worker j sends the result to each host, where all its workers read it

This is the reduce-scatter followed by an all-gather of R. Thakur, R. Rabenseifner, W. Gropp, Int.
J. High Perform. Comput. Appl. 19(1), 49-66 (2005), doi:10.1177/1094342005051521, here by direct
exchanges instead of recursive halving and doubling.

Part j enters and leaves a host through one worker, its gateway. Gateways are assigned evenly, so
that all workers of a host send at the same time:

    workers 0 1 | 2 3       parts 0 2 enter the first host through worker 0, 1 3 through worker 1,
                            parts 0 2 enter the second through worker 2, 1 3 through worker 3

A host with m of n workers sends, and receives, (1 - m/n) S + (H - 1) m/n S bytes of an array of S;
with equally many workers on each of H hosts that is 2 (H - 1)/H S, the least possible.

In an exchange all hosts send their part j to worker j at once, and it sends the result to all of
them. In a ring each part travels twice around the hosts instead, through the same gateways, and
every worker receives only from the gateways of the host before its own. Part j starts at the host
after worker j's. Each host adds its own contribution, and worker j has the sum, which then travels
around once more:

    3 hosts of a worker      part 0        part 1        part 2
    tick 0    add            1->2          2->0          0->1
         1    add            2->0          0->1          1->2
         2    result         0->1          1->2          2->0
         3    result         1->2          2->0          0->1

So the hosts' contributions to part j are added in the order of the hosts, from the one after
worker j's on. The bytes are the same, in 2 (H - 1) messages in sequence where an exchange has two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Hop", "Roles", "host_numbers", "ring", "roles"]


class Roles(NamedTuple):
    """Peers and parts of one worker."""

    host: int  # its own, numbered in the order of their first workers
    gateways: tuple[int, ...]  # of each host, the worker that exchanges this worker's part with it
    parts: tuple[int, ...]  # those for which it is the gateway of its host, its own among them


def host_numbers(hosts: Sequence[object]) -> list[int]:
    """Return the number of each worker's host, in the order of the hosts' first workers.

    >>> host_numbers(["b", "a", "b"])
    [0, 1, 0]
    """
    numbers: dict[object, int] = {}
    return [numbers.setdefault(host, len(numbers)) for host in hosts]


def roles(hosts: Sequence[int], worker: int) -> Roles:
    """Return the roles of a worker; ``hosts`` has the number of each worker's host.

    >>> roles([0, 0, 1, 1], 1)
    Roles(host=0, gateways=(1, 3), parts=(1, 3))
    >>> roles([0, 0, 0, 1], 3)
    Roles(host=1, gateways=(0, 3), parts=(0, 1, 2, 3))
    """
    gateways = _Gateways(hosts)
    own = hosts[worker]
    parts = tuple(w for w in range(len(hosts)) if gateways.of(own, w) == worker)
    return Roles(own, tuple(gateways.of(host, worker) for host in range(gateways.num_hosts)), parts)


class Hop(NamedTuple):
    """Hop of a part around the ring of hosts, at the gateway of one host."""

    part: int
    position: int  # hosts that have added their contributions before; H - 1 at the part's worker
    source: int  # the worker that sends it to the gateway
    target: int  # the worker to which the gateway sends it


def ring(hosts: Sequence[int], worker: int) -> list[Hop]:
    """Return the hops at a worker, in the order of the positions.

    >>> ring([0, 1, 2], 1)
    [Hop(part=0, position=0, source=0, target=2), Hop(part=2, position=1, source=0, target=2), \
Hop(part=1, position=2, source=0, target=2)]
    """
    gateways = _Gateways(hosts)
    own, count = hosts[worker], gateways.num_hosts
    hops = [
        Hop(
            part,
            (own - hosts[part] - 1) % count,
            gateways.of((own - 1) % count, part),
            gateways.of((own + 1) % count, part),
        )
        for part in roles(hosts, worker).parts
    ]
    return sorted(hops, key=lambda hop: hop.position)


class _Gateways:
    """Assignment of parts to the gateways of each host."""

    def __init__(self, hosts: Sequence[int]) -> None:
        self.num_hosts = max(hosts) + 1
        self._members: list[list[int]] = [[] for _ in range(self.num_hosts)]
        self._positions: list[int] = []  # of each worker among the workers of its host
        for worker, host in enumerate(hosts):
            self._positions.append(len(self._members[host]))
            self._members[host].append(worker)

    def of(self, host: int, part: int) -> int:
        """Return the gateway of a part on a host."""
        members = self._members[host]
        return members[self._positions[part] % len(members)]
