"""Schedule of the ring all-reduce: reduce-scatter, then all-gather, between ring neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Step", "all_reduce", "chains"]


class Step(NamedTuple):
    """One transfer of ``chunk`` from rank ``source`` to ``target``, which adds or copies it."""

    chunk: int
    source: int
    target: int
    accumulate: bool


def all_reduce(num_ranks: int) -> Iterator[list[Step]]:
    """Yield the ticks of a ring all-reduce, each the steps that may run together.

    2(p - 1) ticks of p steps; a rank sends 2(p - 1)/p of its buffer, the least possible
    (P. Patarasuk, X. Yuan, J. Parallel Distrib. Comput. 69(2), 117-124, 2009,
    doi:10.1016/j.jpdc.2008.09.002).
    """
    # num_ranks = 3, chunk sent to the right-hand neighbour:
    # tick  0->1  1->2  2->0
    #   0     0     1     2   accumulate
    #   1     2     0     1   accumulate   rank r owns the sum of chunk r+1
    #   2     1     2     0   copy
    #   3     0     1     2   copy
    for tick in range(2 * (num_ranks - 1)):
        yield [
            Step((rank - tick) % num_ranks, rank, (rank + 1) % num_ranks, tick < num_ranks - 1)
            for rank in range(num_ranks)
        ]


def chains(num_ranks: int) -> list[list[int]]:
    """Return, for each chunk, the ranks in the order in which the ring adds their contributions.

    >>> chains(3)
    [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    """
    chains_of_chunks: list[list[int]] = [[] for _ in range(num_ranks)]
    for tick in all_reduce(num_ranks):
        for step in tick:
            if step.accumulate:
                chain = chains_of_chunks[step.chunk]
                chain += (step.source, step.target) if not chain else (step.target,)
    return [chain or [chunk] for chunk, chain in enumerate(chains_of_chunks)]
