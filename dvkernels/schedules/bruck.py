"""Blocks of all ranks brought to all in few messages, where there is nothing to save but messages.

After a step each rank holds up to twice as many blocks: its own and those of the ranks after it,
in the order of the ranks, counted round and round from its own.

    num_ranks = 5     rank 0 holds      sends             receives
    step 1            0                 0 to 4            1 from 1
    step 2            0 1               0 1 to 3          2 3 from 2
    step 3            0 1 2 3           0 to 1            4 from 4

Log2 p messages, rounded up, and p - 1 blocks: J. Bruck et al., IEEE Trans. Parallel Distrib.
Syst. 8(11), 1143-1156 (1997), doi:10.1109/71.642949.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Round", "gather", "place"]


class Round(NamedTuple):
    """What every rank does: it sends its first blocks, and puts those that come behind its own.

    Attributes
    ----------
    num_held : int
        How many blocks it holds before. They go to the rank so many before it, and come from the
        rank so many after it.
    num_sent : int
        How many it sends, and receives.
    """

    num_held: int
    num_sent: int


def gather(num_ranks: int) -> Iterator[Round]:
    """Yield the steps after which each rank holds the blocks of all.

    >>> [tuple(step) for step in gather(5)]
    [(1, 1), (2, 2), (4, 1)]
    """
    num_held = 1
    while num_held < num_ranks:
        num_sent = min(num_held, num_ranks - num_held)
        yield Round(num_held, num_sent)
        num_held += num_sent


def place(rank: int, owner: int, num_ranks: int) -> int:
    """Return where a rank keeps the block of another.

    >>> [place(3, owner, 5) for owner in range(5)]
    [2, 3, 4, 0, 1]
    """
    return (owner - rank) % num_ranks
