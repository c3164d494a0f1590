"""What ranks do that share memory and tell each other by flags: rows of data.

Every rank runs its rows in order, at its own pace. A flag has one writer and one reader, and only
grows: in a call whose first epoch is ``e``, ``Signal(ranks, stage)`` raises the caller's flag at
each of ``ranks`` to ``e + stage``, and ``Wait(ranks, stage)`` goes on when the flags of ``ranks``
have come that far. The next call begins at ``e + num_stages``, so no flag is ever reset, and what
an earlier call left behind is too small to be mistaken for news.

The slots of a communicator alternate from call to call (``NUM_SLOTS``): what a slow rank still
reads in one call is not overwritten in the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

__all__ = ["NUM_SLOTS", "BufferRole", "Combine", "Memory", "Protocol", "Row", "Signal", "Wait"]

NUM_SLOTS = 2
Memory = Literal["input", "output", "slot"]  # in place, output and input are the same memory


class BufferRole(NamedTuple):
    """Memory of a rank: what it contributes, where its result goes, or its slot of this call."""

    memory: Memory
    rank: int

    def __str__(self) -> str:
        return f"{self.memory} {self.rank}"


class Combine(NamedTuple):
    """Combine one part of the sources, left to right, and store it to every target.

    Of one source that is a copy. ``completes`` marks the row after which the part is the result:
    a mean divides there.
    """

    part: int
    sources: tuple[BufferRole, ...]
    targets: tuple[BufferRole, ...]
    completes: bool

    def __str__(self) -> str:
        sources, targets = " + ".join(map(str, self.sources)), ", ".join(map(str, self.targets))
        return f"part {self.part}: {sources} -> {targets}{', complete' * self.completes}"


class Signal(NamedTuple):
    """Tell ``ranks`` that all rows before this one are done, with all they read and wrote."""

    ranks: tuple[int, ...]
    stage: int

    def __str__(self) -> str:
        return f"signal stage {self.stage} to {', '.join(map(str, self.ranks))}"


class Wait(NamedTuple):
    """Go on when each of ``ranks`` has signalled ``stage``, or a later one."""

    ranks: tuple[int, ...]
    stage: int

    def __str__(self) -> str:
        return f"wait for stage {self.stage} of {', '.join(map(str, self.ranks))}"


Row = Combine | Signal | Wait


class Protocol(NamedTuple):
    """The rows of every rank, into how many parts they cut a buffer, and how far flags rise."""

    name: str
    num_parts: int
    num_stages: int
    rows: tuple[tuple[Row, ...], ...]

    @property
    def num_ranks(self) -> int:
        """How many ranks take part."""
        return len(self.rows)

    @property
    def uses_slots(self) -> bool:
        """Whether data passes through slots, which bounds what one call can take."""
        return any(
            place.memory == "slot"
            for rows in self.rows
            for row in rows
            if isinstance(row, Combine)
            for place in row.targets
        )

    def in_order(self) -> Iterator[tuple[int, int]]:
        """Yield (rank, number of a row) so that nobody waits: signals come before their waits.

        So one thread can run the protocol, launch by launch. Raises ``ValueError`` where there is
        no such order, because then the ranks would wait for each other forever.
        """
        raised: dict[tuple[int, int], int] = {}  # (writer, reader) -> stage
        at = [0] * self.num_ranks

        def may_go(rank: int, row: Row) -> bool:
            return not isinstance(row, Wait) or all(
                raised.get((peer, rank), 0) >= row.stage for peer in row.ranks
            )

        while any(number < len(rows) for number, rows in zip(at, self.rows, strict=True)):
            moved = False
            for rank, rows in enumerate(self.rows):
                while at[rank] < len(rows) and may_go(rank, row := rows[at[rank]]):
                    if isinstance(row, Signal):
                        raised.update({(rank, peer): row.stage for peer in row.ranks})
                    moved = True
                    yield rank, at[rank]
                    at[rank] += 1
            if not moved:
                stuck = {
                    r: rows[n]
                    for r, (n, rows) in enumerate(zip(at, self.rows, strict=True))
                    if n < len(rows)
                }
                raise ValueError(f"{self.name}: every rank waits for another: {stuck}")
