"""Bruck's all-gather: the least number of messages, for short blocks.

Each round up to doubles the blocks of every rank: its own and those of the ranks after it, in
cyclic order from its own.

    num_ranks = 5     rank 0 holds      sends             receives
    round 1           0                 0 to 4            1 from 1
    round 2           0 1               0 1 to 3          2 3 from 2
    round 3           0 1 2 3           0 to 1            4 from 4

A rank sends ceil(log2 p) messages and p - 1 blocks: J. Bruck et al., IEEE Trans. Parallel Distrib.
Syst. 8(11), 1143-1156 (1997), doi:10.1109/71.642949.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Round", "all_gather", "slot"]


class Round(NamedTuple):
    """One round: every rank sends its first blocks, and appends the blocks that it receives.

    Attributes
    ----------
    num_blocks : int
        Number of blocks of a rank before the round, and the distance of its peers: it sends to the
        rank that many before it, and receives from the rank that many after it.
    num_sent : int
        Number of blocks that it sends, and receives.
    """

    num_blocks: int
    num_sent: int


def all_gather(num_ranks: int) -> Iterator[Round]:
    """Yield the rounds after which each rank holds the blocks of all.

    >>> [tuple(step) for step in all_gather(5)]
    [(1, 1), (2, 2), (4, 1)]
    """
    num_blocks = 1
    while num_blocks < num_ranks:
        num_sent = min(num_blocks, num_ranks - num_blocks)
        yield Round(num_blocks, num_sent)
        num_blocks += num_sent


def slot(rank: int, owner: int, num_ranks: int) -> int:
    """Return the index of the block of rank ``owner`` in the buffer of rank ``rank``.

    >>> [slot(3, owner, 5) for owner in range(5)]
    [2, 3, 4, 0, 1]
    """
    return (owner - rank) % num_ranks
