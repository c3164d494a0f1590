"""Cost models of collectives, in seconds, and the choice of the cheapest algorithm.

The constants of ``CPU`` were measured on one machine by ``python -m dvkernels bench --calibrate``,
which prints those of yours. They determine from which size on threads share a call; those between
workers choose an algorithm. Near a crossover both choices cost about the same, so constants that
are off by a half cost little.

In one memory domain an all-reduce of R replicas of S bytes takes

    t = call + 2 R S / rate     each byte read once, written once: directly, and around a ring

``rate`` is that of one thread, or of all threads, if the call waits for the others to join.

Between n workers of H hosts, with a latency and a rate: R. Hockney's model, Parallel Comput. 20,
389-398 (1994), doi:10.1016/S0167-8191(06)80021-9.

    memory    t = latency + min(n + 3, 5 + 1/n) S / rate      one host; the latter from n = 4 on
    gathered  t = latency + (n - 1) S / rate                  messages; short arrays
    parts     t = latency + 2 (H - 1)/n S / rate              messages; each reduces a part
    ring      t = 2 (n - 1) latency + 2 (n - 1)/n S / rate    a step for each part and neighbour

``python -m dvkernels launch -n 2 -m dvkernels bench --calibrate`` measures latency and rate. A
``Network`` is a finer model of messages, to choose between an all-gather, an exchange of parts and
a ring. A training step hides a part of this time behind its backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "CPU",
    "NETWORK",
    "Link",
    "Machine",
    "Network",
    "Routing",
    "between_hosts",
    "exchange_seconds",
    "gather_seconds",
    "host_ring_seconds",
    "memory_seconds",
    "message_seconds",
    "seconds_by_algorithm",
]


class Machine(NamedTuple):
    """Constants of a memory domain and its threads; rates in bytes read or written per second."""

    call_seconds: float  # of a call that moves nothing
    join_seconds: float  # more, if threads that are awake share it
    wake_seconds: float  # still more, for the caller, if these threads sleep
    rate_of_one: float  # of one thread, in the sizes where the choice matters
    rate_of_all: float  # of all threads together

    def sharing_pays_from(self, asleep: bool = False) -> int:
        """Return the bytes moved from which on a shared call is faster.

        It solves call + m/one = call + join + m/all for m.

        >>> Machine(0, 1e-6, 0, 50e9, 100e9).sharing_pays_from()
        100000
        """
        extra = self.join_seconds + (self.wake_seconds if asleep else 0)
        return round(extra / (1 / self.rate_of_one - 1 / self.rate_of_all))

    def seconds_to_move(self, moved: int) -> float:
        """Return the time of a call that moves so many bytes, by one thread or shared."""
        alone = moved / self.rate_of_one
        shared = self.join_seconds + moved / self.rate_of_all
        return self.call_seconds + min(alone, shared)


# Two cores of an AMD EPYC, November 2026: near the middle of three calibrations, whose rates lay
# within 10 % of each other, join between 0.1 and 0.5 us (taken as 1, since helpers are slower
# outside a loop) and wake was 2 us.
CPU = Machine(
    call_seconds=0.75e-6,
    join_seconds=1e-6,
    wake_seconds=2e-6,
    rate_of_one=190e9,
    rate_of_all=420e9,
)


class Network(NamedTuple):
    """Constants of messages between workers; rates in bytes per second of one worker."""

    message_seconds: float  # from the send of an empty message to its receipt
    exchange_seconds: float  # of an exchange of parts that moves nothing
    hop_seconds: float  # of a part at each hop of a ring, if it moves nothing
    rate: float  # of sends, with simultaneous receives
    incast: float  # fraction of the rate if several workers send to one receiver at once
    memory_rate: float  # of reads and writes by kernels and copies


# Between two processes of one machine by MPICH 5.0.2, fastest of many: 2 cores of an AMD EPYC,
# November 2026. A network of 100 Gbit/s has about the same figures. A hop is half of an exchange,
# which has two: between three processes it took 60 to 100 us, but they waited for two cores. The
# incast is that of four hosts (network namespaces) of 100 Mbit/s each: 1 MiB took 149 ms in parts,
# 133 ms around the ring. Where one link of that rate joined two hosts and two, it was 0.75 and
# less (187 and 134 ms). At the rate of this table the ring is never chosen all the same: its
# additional reads and writes take longer than it saves. See docs/explanation/scaling.md.
NETWORK = Network(
    message_seconds=2e-6,
    exchange_seconds=17e-6,
    hop_seconds=9e-6,
    rate=7e9,
    incast=0.9,
    memory_rate=30e9,
)


def gather_seconds(network: Network, num_workers: int, nbytes: int) -> float:
    """Return the time of an all-gather of ``nbytes`` per worker, each of which reduces all.

    Log2 n messages in sequence, (n - 1) S received, (n + 1) S read and written: J. Bruck et al.,
    IEEE Trans. Parallel Distrib. Syst. 8(11), 1143-1156 (1997), doi:10.1109/71.642949.
    """
    num_messages = (num_workers - 1).bit_length()
    received, moved = (num_workers - 1) * nbytes, (num_workers + 1) * nbytes
    seconds = received / network.rate + moved / network.memory_rate
    return num_messages * network.message_seconds + seconds


def exchange_seconds(
    network: Network, num_workers: int, num_hosts: int, nbytes: int, wide_nbytes: int | None = None
) -> float:
    """Return the time of an all-reduce by an exchange of parts: see ``schedules/multi_leader.py``.

    Two messages in sequence. With m = n/H workers per host, each reads m shares of S/m and writes
    one, and the same of H parts of S/n; if m > 1, arrays are also copied to and from shared
    memory, and the hosts' parts are sent as ``wide_nbytes`` for the whole.

    2 (H - 1)/n S are received, as in a ring, but from H - 1 workers at once: where these compete
    for the receiver or a common link (incast), that takes 1/``incast`` as long.
    """
    members = num_workers / num_hosts
    wide = nbytes if wide_nbytes is None or members == 1 else wide_nbytes
    received = (num_hosts - 1) / num_workers * (wide + nbytes)
    moved = (num_hosts + 1) / num_workers * nbytes + _shared_nbytes(members, nbytes)
    rate = network.rate * (network.incast if num_hosts > 2 else 1.0)
    seconds = received / rate + moved / network.memory_rate
    return network.exchange_seconds + 2 * network.message_seconds + seconds


def host_ring_seconds(
    network: Network, num_workers: int, num_hosts: int, nbytes: int, wide_nbytes: int | None = None
) -> float:
    """Return the time of an all-reduce around a ring of hosts: see ``schedules/multi_leader.py``.

    2 (H - 1) messages in sequence, 2 (H - 1)/n S received from one worker at a time, half of it as
    ``wide_nbytes`` for the whole. Of each part, H - 1 hosts read the received sum and their own
    contribution, and write the new sum.
    """
    members = num_workers / num_hosts
    wide = nbytes if wide_nbytes is None else wide_nbytes
    received = (num_hosts - 1) / num_workers * (wide + nbytes)
    moved = 3 * (num_hosts - 1) / num_workers * nbytes + _shared_nbytes(members, nbytes)
    seconds = received / network.rate + moved / network.memory_rate
    hops = 2 * (num_hosts - 1)
    starting = network.exchange_seconds + (hops - 2) * network.hop_seconds
    return starting + hops * network.message_seconds + seconds


def _shared_nbytes(members: float, nbytes: int) -> float:
    """Return the bytes that a worker moves in its host's shared memory, besides its messages."""
    return (1 + 1 / members + 4) * nbytes if members > 1 else 0.0


def seconds_by_algorithm(
    network: Network, num_workers: int, num_hosts: int, nbytes: int, wide_nbytes: int | None = None
) -> dict[str, float]:
    """Return the time of each algorithm between hosts: ``"gather"``, ``"exchange"``, ``"ring"``.

    ``wide_nbytes`` are the bytes of an array of sums, whose dtype may be wider than that of the
    summands.
    """
    return {
        "gather": gather_seconds(network, num_workers, nbytes),
        "exchange": exchange_seconds(network, num_workers, num_hosts, nbytes, wide_nbytes),
        "ring": host_ring_seconds(network, num_workers, num_hosts, nbytes, wide_nbytes),
    }


def between_hosts(
    network: Network, num_workers: int, num_hosts: int, nbytes: int, wide_nbytes: int | None = None
) -> str:
    """Return the fastest algorithm between workers of several hosts; the first of equal ones.

    >>> [between_hosts(NETWORK, 4, 4, nbytes) for nbytes in (1 << 10, 1 << 20)]
    ['gather', 'exchange']
    >>> between_hosts(NETWORK._replace(rate=1e9), 4, 4, 1 << 24)
    'ring'
    """
    seconds = seconds_by_algorithm(network, num_workers, num_hosts, nbytes, wide_nbytes)
    return min(seconds, key=seconds.__getitem__)


class Routing(NamedTuple):
    """Choice of the algorithm of reductions between hosts.

    ``"auto"`` asks the cost model for each size; ``"gather"``, ``"exchange"`` and ``"ring"`` are
    used for every size.
    """

    algorithm: str = "auto"
    network: Network = NETWORK

    def algorithm_for(self, num_workers: int, num_hosts: int, nbytes: int, wide_nbytes: int) -> str:
        """Return the algorithm for an array; see :func:`between_hosts`."""
        if self.algorithm != "auto":
            return self.algorithm
        return between_hosts(self.network, num_workers, num_hosts, nbytes, wide_nbytes)


class Link(NamedTuple):
    """Latency and rate of Hockney's model."""

    latency_seconds: float  # of a call, or of a step of a ring, that moves nothing
    rate: float  # bytes/s


def memory_seconds(link: Link, num_workers: int, nbytes: int) -> float:
    """Return the time of an all-reduce over memory that the workers of one host share.

    Each worker copies its pieces to shared memory, reads all workers' pieces, and writes the
    result: (n + 3) S bytes. Of four and more, each reads a part of all workers' pieces, writes its
    result, and copies the results of all: (2 + (n + 1)/n + 2) S.

    >>> memory_seconds(Link(1e-6, 10e9), 2, 1_000_000)
    0.000501
    >>> memory_seconds(Link(1e-6, 10e9), 4, 1_000_000)
    0.000526
    """
    moved = num_workers + 3 if num_workers < 4 else 5 + 1 / num_workers
    return link.latency_seconds + moved * nbytes / link.rate


def message_seconds(link: Link, num_workers: int, num_hosts: int, nbytes: int) -> float:
    """Return the time of an all-reduce by messages between hosts: gathered, or in parts.

    A ring receives as many bytes as an exchange; this model has one latency for all messages.
    """
    is_gathered = between_hosts(NETWORK, num_workers, num_hosts, nbytes) == "gather"
    received = num_workers - 1 if is_gathered else 2 * (num_hosts - 1) / num_workers
    return link.latency_seconds + received * nbytes / link.rate
