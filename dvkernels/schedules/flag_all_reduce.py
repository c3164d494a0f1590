"""All-reduces of ranks that wait for each other's flags: one-shot, two-shot, ring, staged.

For p ranks with S bytes each, the bytes that a rank moves over its link, and its waits in sequence:

    protocol   bytes in        bytes out       waits       through slots
    one_shot   (p - 1) S       -               1           yes
    two_shot   (p - 1)/p S     (p - 1)/p S     2           no
    ring       2 (p - 1)/p S   -               2p - 1      no, and needs its two neighbours only
    staged     2 S             (p + 1)/p S     2           yes, in memory of the host

One-shot is fastest where S is small: two-shot has one wait more, and one-shot moves
(p - 1)(1 - 2/p) S more bytes, so with a wait of 3 us and a link of 400 GB/s they cross over at
0.8 MB for p = 4 and 0.23 MB for p = 8. Neither constant was measured here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from dvkernels.schedules import ring as ring_of_steps
from dvkernels.schedules.flag_protocol import (
    BufferRole,
    Combine,
    Memory,
    Protocol,
    Row,
    Signal,
    Wait,
)

__all__ = ["PROTOCOLS", "chain", "one_shot", "ring", "staged", "two_shot"]


@functools.cache
def one_shot(num_ranks: int) -> Protocol:
    """Return the all-reduce in which every rank publishes a copy, and reads those of all others.

    The copy lies in the rank's slot. A rank overwrites it two calls later, after a wait for all
    others in the call between: they have read it by then. So no rank waits at the end.
    """

    def rows(rank: int) -> tuple[Row, ...]:
        peers = _peers(rank, num_ranks)
        return (
            Combine(0, (BufferRole("input", rank),), (BufferRole("slot", rank),), False),
            Signal(peers, 1),
            Wait(peers, 1),
            Combine(0, _on_every_rank("slot", num_ranks), (BufferRole("output", rank),), True),
        )

    return _protocol("one_shot", num_ranks, 1, 1, rows)


@functools.cache
def two_shot(num_ranks: int) -> Protocol:
    """Return the all-reduce in which rank r combines part r of all inputs and stores it to all.

    No other rank touches part r, so it works in place. After the first wait all inputs are ready
    and all outputs free; after the second all parts are complete.
    """
    return _owner_combines("two_shot", [[*range(num_ranks)]] * num_ranks)


@functools.cache
def chain(num_ranks: int) -> Protocol:
    """Return the two-shot all-reduce with the ring's order of additions, in registers.

    A ring would round half types at each step; this gives its sum without these roundings.
    """
    return _owner_combines("chain", ring_of_steps.chains(num_ranks))


def _owner_combines(name: str, orders: list[list[int]]) -> Protocol:
    num_ranks = len(orders)

    def rows(rank: int) -> tuple[Row, ...]:
        peers = _peers(rank, num_ranks)
        sources = tuple(BufferRole("input", source) for source in orders[rank])
        return (
            Signal(peers, 1),
            Wait(peers, 1),
            Combine(rank, sources, _on_every_rank("output", num_ranks), True),
            Signal(peers, 2),
            Wait(peers, 2),
        )

    return _protocol(name, num_ranks, num_ranks, 2, rows)


@functools.cache
def ring(num_ranks: int) -> Protocol:
    """Return the ring of schedules/ring.py: every rank pulls from its left-hand neighbour.

    The overwriting of a chunk in the second half needs no flag: the completed chunk can only come
    after the old one was read, because it contains that contribution. At the end a rank waits
    until its right-hand neighbour has read the last chunk.
    """
    if num_ranks == 1:
        return two_shot(1)._replace(name="ring")
    ticks = [*ring_of_steps.all_reduce(num_ranks)]

    def rows(rank: int) -> tuple[Row, ...]:
        left, right = (rank - 1) % num_ranks, (rank + 1) % num_ranks
        own_rows: list[Row] = []
        for tick, steps in enumerate(ticks):
            step = next(step for step in steps if step.target == rank)
            memory: Memory = "output" if tick else "input"
            own = (BufferRole("input", rank),) if step.accumulate else ()
            own_rows += [
                Signal((right,), tick + 1),
                Wait((left,), tick + 1),
                Combine(
                    step.chunk,
                    (*own, BufferRole(memory, step.source)),
                    (BufferRole("output", rank),),
                    tick == num_ranks - 2,
                ),
            ]
        last = len(ticks) + 1
        return (*own_rows, Signal((left,), last), Wait((right,), last))

    return _protocol("ring", num_ranks, num_ranks, len(ticks) + 1, rows)


@functools.cache
def staged(num_ranks: int) -> Protocol:
    """Return the all-reduce of ranks that can access only their own memory and the slots.

    The slots then lie in host memory. Rank r combines part r of all slots into its own.
    """

    def rows(rank: int) -> tuple[Row, ...]:
        peers = _peers(rank, num_ranks)
        own = (BufferRole("slot", rank),)
        collected: list[Row] = [
            Combine(part, (BufferRole("slot", part),), (BufferRole("output", rank),), False)
            for part in range(num_ranks)
        ]
        return (
            *(Combine(part, (BufferRole("input", rank),), own, False) for part in range(num_ranks)),
            Signal(peers, 1),
            Wait(peers, 1),
            Combine(rank, _on_every_rank("slot", num_ranks), own, True),
            Signal(peers, 2),
            Wait(peers, 2),
            *collected,
        )

    return _protocol("staged", num_ranks, num_ranks, 2, rows)


PROTOCOLS = {
    "one_shot": one_shot,
    "two_shot": two_shot,
    "chain": chain,
    "ring": ring,
    "staged": staged,
}


def _protocol(
    name: str,
    num_ranks: int,
    num_parts: int,
    num_stages: int,
    rows: Callable[[int], tuple[Row, ...]],
) -> Protocol:
    """Return the protocol of these rows, without signals to and waits for no rank."""
    needed = (
        tuple(row for row in rows(rank) if isinstance(row, Combine) or row.ranks)
        for rank in range(num_ranks)
    )
    return Protocol(name, num_parts, num_stages, tuple(needed))


def _peers(rank: int, num_ranks: int) -> tuple[int, ...]:
    return tuple(peer for peer in range(num_ranks) if peer != rank)


def _on_every_rank(memory: Memory, num_ranks: int) -> tuple[BufferRole, ...]:
    return tuple(BufferRole(memory, rank) for rank in range(num_ranks))
