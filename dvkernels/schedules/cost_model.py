"""What a collective costs by its schedule, and which algorithm is cheapest: a model in seconds.

A machine is described by a handful of constants. Those of ``CPU`` were measured on one machine by
``python -m dvkernels bench --calibrate``, which prints those of yours; they set where sharing a
call pays, and choose between algorithms. Choices that are near each other cost about the same, so
constants that are off by a half cost little.

In one memory domain, for R replicas of S bytes:

    direct   t = call + moved / rate,   moved = 2 R S        each byte read once, written once
    ring     t = call + moved / rate + carried / cached,     carried = 5 (R - 1) S through a cache

``rate`` is that of one thread, or, with other threads that must join first, of all of them.

Between n workers of H hosts, a latency and a rate each: the model of R. Hockney, Parallel Comput.
20, 389-398 (1994), doi:10.1016/S0167-8191(06)80021-9.

    memory    t = latency + min(n + 3, 5 + 1/n) S / rate      one host; the latter from n = 4 on
    gathered  t = latency + (n - 1) S / rate                  messages; short arrays
    parts     t = latency + 2 (H - 1)/n S / rate              messages; each reduces a part
    ring      t = 2 (n - 1) latency + 2 (n - 1)/n S / rate    a step for each part and neighbour

``python -m dvkernels launch -n 2 -m dvkernels bench --calibrate`` measures the two. A ``Network``
says more of messages, to choose between three ways: gathered, exchanged in parts, or around a ring.
A step of training hides what it can of this behind its backward pass.
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
    "cheapest",
    "circuit_seconds",
    "direct_seconds",
    "exchange_seconds",
    "gather_seconds",
    "memory_seconds",
    "message_seconds",
    "network_ring_seconds",
    "ring_seconds",
    "seconds_by_way",
    "step_seconds",
]


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


class Network(NamedTuple):
    """What messages between workers cost; times in s, rates in bytes/s of one worker."""

    message_seconds: float  # from a send to its receipt, of nothing
    exchange_seconds: float  # what an exchange in parts costs before it moves anything
    hop_seconds: float  # what a part costs at each stop of a ring, before it moves anything
    rate: float  # sent, and received meanwhile
    incast: float  # what part of it a receiver gets where several send to it at once; 1.0: all
    memory_rate: float  # read or written by kernels and copies


# Between two processes of one machine by MPICH 5.0.2, fastest of many: 2 cores of an AMD EPYC,
# November 2026. A network of 100 Gbit/s has about the same figures. A hop is the half of an
# exchange, which has two: between three processes it took 60 to 100 us, but they waited for two
# cores. Incast is that of four hosts (network namespaces) of 100 Mbit/s each: 1 MiB took 149 ms in
# parts, 133 ms around the ring. Where one link of that rate joined two hosts and two, it was 0.75
# and less (187 and 134 ms). At the rate of this table a ring is left out all the same: what it
# reads and writes more takes longer than what it saves. See docs/explanation/scaling.md.
NETWORK = Network(
    message_seconds=2e-6,
    exchange_seconds=17e-6,
    hop_seconds=9e-6,
    rate=7e9,
    incast=0.9,
    memory_rate=30e9,
)


def gather_seconds(network: Network, num_workers: int, nbytes: int) -> float:
    """Return what it takes to bring ``nbytes`` of each worker to all, who reduce all of them.

    Log2 n messages one after another, (n - 1) S received, (n + 1) S read and written.
    """
    num_messages = (num_workers - 1).bit_length()
    received, moved = (num_workers - 1) * nbytes, (num_workers + 1) * nbytes
    seconds = received / network.rate + moved / network.memory_rate
    return num_messages * network.message_seconds + seconds


def exchange_seconds(
    network: Network, num_workers: int, num_hosts: int, nbytes: int, wide_nbytes: int | None = None
) -> float:
    """Return what an all-reduce in parts takes: see ``schedules/host_parts.py``.

    Two messages one after the other. With m = n/H workers a host, each reads m shares of S/m and
    writes one, and the same of H parts of S/n; if m > 1, what it brings and takes is copied beside,
    and the hosts' parts go as ``wide_nbytes`` for the whole.

    2 (H - 1)/n S are received, as in a ring, from H - 1 workers at once: where they disturb each
    other, at the receiver or on a link that they share, that takes 1/``incast`` as long.
    """
    members = num_workers / num_hosts
    wide = nbytes if wide_nbytes is None or members == 1 else wide_nbytes
    received = (num_hosts - 1) / num_workers * (wide + nbytes)
    moved = (num_hosts + 1) / num_workers * nbytes + _shared_nbytes(members, nbytes)
    rate = network.rate * (network.incast if num_hosts > 2 else 1.0)
    seconds = received / rate + moved / network.memory_rate
    return network.exchange_seconds + 2 * network.message_seconds + seconds


def circuit_seconds(
    network: Network, num_workers: int, num_hosts: int, nbytes: int, wide_nbytes: int | None = None
) -> float:
    """Return what a ring of hosts takes: see ``schedules/host_parts.py``.

    2 (H - 1) messages one after another, 2 (H - 1)/n S received from one worker at a time, the half
    of it as ``wide_nbytes`` for the whole. Of each part, H - 1 hosts read what comes, and their
    own, and write the sum.
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
    """Return what a worker moves in the memory of its host, beside what comes and goes."""
    return (1 + 1 / members + 4) * nbytes if members > 1 else 0.0


def seconds_by_way(
    network: Network, num_workers: int, num_hosts: int, nbytes: int, wide_nbytes: int | None = None
) -> dict[str, float]:
    """Return what each way between hosts takes: ``"gather"``, ``"exchange"``, ``"ring"``.

    ``wide_nbytes`` is what ``nbytes`` become where sums are wider than what is summed.
    """
    return {
        "gather": gather_seconds(network, num_workers, nbytes),
        "exchange": exchange_seconds(network, num_workers, num_hosts, nbytes, wide_nbytes),
        "ring": circuit_seconds(network, num_workers, num_hosts, nbytes, wide_nbytes),
    }


def between_hosts(
    network: Network, num_workers: int, num_hosts: int, nbytes: int, wide_nbytes: int | None = None
) -> str:
    """Return what is quickest between workers of several hosts; of ways alike, the first.

    >>> [between_hosts(NETWORK, 4, 4, nbytes) for nbytes in (1 << 10, 1 << 20)]
    ['gather', 'exchange']
    >>> between_hosts(NETWORK._replace(rate=1e9), 4, 4, 1 << 24)
    'ring'
    """
    seconds = seconds_by_way(network, num_workers, num_hosts, nbytes, wide_nbytes)
    return min(seconds, key=seconds.__getitem__)


class Routing(NamedTuple):
    """Which way reductions go between hosts.

    Attributes
    ----------
    way : {"auto", "gather", "exchange", "ring"}
        ``"auto"`` is what the model says; the others are taken for every size.
    network : Network
    """

    way: str = "auto"
    network: Network = NETWORK

    def way_of(self, num_workers: int, num_hosts: int, nbytes: int, wide_nbytes: int) -> str:
        """Return the way of an array; see :func:`between_hosts`."""
        if self.way != "auto":
            return self.way
        return between_hosts(self.network, num_workers, num_hosts, nbytes, wide_nbytes)


class Link(NamedTuple):
    """What workers have between them."""

    latency_seconds: float  # what a call, or a step of a ring, costs before it moves anything
    rate: float  # bytes/s


def memory_seconds(link: Link, num_workers: int, nbytes: int) -> float:
    """Return what an all-reduce takes over memory that the workers of one host share.

    Each worker copies its pieces in, reads all workers', and writes: (n + 3) S bytes. Four and more
    read a part of all workers' pieces each, write it, and copy the results of all:
    (2 + (n + 1)/n + 2) S.

    >>> memory_seconds(Link(1e-6, 10e9), 2, 1_000_000)
    0.000501
    >>> memory_seconds(Link(1e-6, 10e9), 4, 1_000_000)
    0.000526
    """
    moved = num_workers + 3 if num_workers < 4 else 5 + 1 / num_workers
    return link.latency_seconds + moved * nbytes / link.rate


def message_seconds(link: Link, num_workers: int, num_hosts: int, nbytes: int) -> float:
    """Return what an all-reduce takes by messages between hosts: gathered, or in parts.

    A ring receives what an exchange does; of the messages' time this model knows the latency.
    """
    is_gathered = between_hosts(NETWORK, num_workers, num_hosts, nbytes) == "gather"
    received = num_workers - 1 if is_gathered else 2 * (num_hosts - 1) / num_workers
    return link.latency_seconds + received * nbytes / link.rate


def network_ring_seconds(link: Link, num_ranks: int, nbytes: int, num_buckets: int = 1) -> float:
    """Return what a ring takes whose ranks send to their neighbours all at once.

    Of a host with several ranks one link leads out, so ``rate`` is that of the host.

    >>> network_ring_seconds(Link(0.0, 1e9), 4, 1_000_000_000)
    1.5
    """
    steps = 2 * (num_ranks - 1)
    return steps * (num_buckets * link.latency_seconds + nbytes / num_ranks / link.rate)


def step_seconds(compute_seconds: float, reduce_seconds: float, hidden_fraction: float) -> float:
    """Return how long a training step takes.

    Up to ``hidden_fraction`` of the computation, at most that of the backward pass, the reduction
    goes on meanwhile; what is longer is waited for.
    """
    hidden = hidden_fraction * compute_seconds
    return compute_seconds + max(0.0, reduce_seconds - hidden)
