"""Protocols of ranks that share memory and synchronize by flags, as rows of data.

Every rank runs its rows in order, at its own pace. A flag has one writer and one reader, and only
grows: in a call whose first epoch is ``e``, ``Signal(ranks, stage)`` raises the caller's flag at
each of ``ranks`` to ``e + stage``, and ``Wait(ranks, stage)`` waits until the flags of ``ranks``
are at least that. The next call begins at ``e + num_stages``, so no flag is ever reset, and the
values of an earlier call are too small to end a wait.

The slots of a communicator alternate from call to call (``NUM_SLOTS``): data that a slow rank
still reads in one call is not overwritten in the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

__all__ = ["NUM_SLOTS", "BufferRole", "Combine", "Memory", "Protocol", "Row", "Signal", "Wait"]

NUM_SLOTS = 2
Memory = Literal["input", "output", "slot"]  # in place, output and input are the same memory


class BufferRole(NamedTuple):
    """Memory of a rank: its contribution, its result, or its slot of this call."""

    memory: Memory
    rank: int

    def __str__(self) -> str:
        return f"{self.memory} {self.rank}"


class Combine(NamedTuple):
    """Combine one part of the sources, left to right, and store it to every target.

    A single source is copied. ``completes`` marks the row that completes the part's result: a
    mean divides there.
    """

    part: int
    sources: tuple[BufferRole, ...]
    targets: tuple[BufferRole, ...]
    completes: bool

    def __str__(self) -> str:
        sources, targets = " + ".join(map(str, self.sources)), ", ".join(map(str, self.targets))
        return f"part {self.part}: {sources} -> {targets}{', complete' * self.completes}"


class Signal(NamedTuple):
    """Signal to ``ranks`` that the reads and writes of all rows before this one are done."""

    ranks: tuple[int, ...]
    stage: int

    def __str__(self) -> str:
        return f"signal stage {self.stage} to {', '.join(map(str, self.ranks))}"


class Wait(NamedTuple):
    """Wait until each of ``ranks`` has signalled ``stage``, or a later one."""

    ranks: tuple[int, ...]
    stage: int

    def __str__(self) -> str:
        return f"wait for stage {self.stage} of {', '.join(map(str, self.ranks))}"


Row = Combine | Signal | Wait


class Protocol(NamedTuple):
    """The rows of every rank, the number of parts of a buffer, and the stages of the flags."""

    name: str
    num_parts: int
    num_stages: int
    rows: tuple[tuple[Row, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return len(self.rows)

    @property
    def uses_slots(self) -> bool:
        """Whether data passes through slots, whose size bounds the bytes of a call."""
        return any(
            target.memory == "slot"
            for rows in self.rows
            for row in rows
            if isinstance(row, Combine)
            for target in row.targets
        )

    def in_order(self) -> Iterator[tuple[int, int]]:
        """Yield (rank, index of a row) in an order in which signals come before their waits.

        In it, one thread can run the protocol, launch by launch. Raise ``ValueError`` where there
        is no such order: the ranks would wait for each other forever.
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
