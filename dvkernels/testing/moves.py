"""What ranks do, taken apart: a protocol's rows as single loads and stores, call after call.

A row may be overtaken in its middle, so it becomes one move for each part of memory that it loads
or stores. Between calls stands what users do: they bring new inputs, use their outputs for
something else, and read results.

A value is the list of contributions that it is made of. So a result says which inputs it contains,
of which call, and how often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from dvkernels.schedules.flag_protocol import NUM_SLOTS, BufferRole, Combine, Protocol, Row, Signal

__all__: list[str] = []

Kind = Literal["put", "load", "store", "read", "signal", "wait"]


class Value(NamedTuple):
    """What a part of memory holds: contributions as (rank, call), and how often completed."""

    contributions: tuple[tuple[int, int], ...]
    completed: int = 0

    def joined(self, other: Value) -> Value:
        """Return both together."""
        both = sorted((*self.contributions, *other.contributions))
        return Value(tuple(both), self.completed + other.completed)

    def __str__(self) -> str:
        return f"{list(self.contributions)}, completed {self.completed} times"


JUNK = Value(((-1, -1),))


class Move(NamedTuple):
    """One move of one rank."""

    kind: Kind
    call: int
    places: tuple[int, ...]  # what it acts on: numbers of locations, or of flags
    text: str  # what messages call it
    value: Value = JUNK  # what is put, or should be read
    epoch: int = 0  # of a signal or wait
    is_first: bool = False  # a load that begins a row
    completes: bool = False  # a store that does


class Programs(NamedTuple):
    """The moves of every rank, and how many locations they speak of."""

    moves: tuple[tuple[Move, ...], ...]
    num_locations: int

    def stopping(self, rank: int, at: int) -> Programs:
        """Return the programs where a rank stops for good before one of its moves."""
        moves = (*self.moves[:rank], self.moves[rank][:at], *self.moves[rank + 1 :])
        return self._replace(moves=moves)


def programs(calls: Sequence[Protocol], *, in_place: bool, num_slots: int = NUM_SLOTS) -> Programs:
    """Return what each rank does in some calls of one number of ranks."""
    num_ranks = calls[0].num_ranks
    numbers: dict[tuple[str, int, int], int] = {}

    def locate(place: BufferRole, call: int, part: int) -> int:
        memory: str = place.memory
        if memory == "output" and in_place:
            memory = "input"
        elif memory == "slot":
            memory = f"slot {call % num_slots}"
        return numbers.setdefault((memory, place.rank, part), len(numbers))

    def moves_of(rank: int) -> Iterator[Move]:
        parts = range(num_ranks)
        epoch = 0
        for call, protocol in enumerate(calls):
            who = f"rank {rank} in call {call}"
            own, out = BufferRole("input", rank), BufferRole("output", rank)
            if not in_place:
                for part in parts:
                    there = (locate(out, call, part),)
                    yield Move("put", call, there, f"{who} uses part {part} of its output")
            for part in parts:
                brought = Value(((rank, call),))
                there = (locate(own, call, part),)
                yield Move("put", call, there, f"{who} brings part {part} of its input", brought)
            for row in protocol.rows[rank]:
                yield from _moves_of_row(row, rank, protocol, call, epoch, who, locate)
            right = Value(tuple((peer, call) for peer in range(num_ranks)), 1)
            for part in parts:
                there = (locate(out, call, part),)
                yield Move("read", call, there, f"{who} reads part {part} of its result", right)
            epoch += protocol.num_stages

    moves = tuple(tuple(moves_of(rank)) for rank in range(num_ranks))
    return Programs(moves, len(numbers))


def _moves_of_row(
    row: Row,
    rank: int,
    protocol: Protocol,
    call: int,
    epoch: int,
    who: str,
    locate: Callable[[BufferRole, int, int], int],
) -> Iterator[Move]:
    num_ranks = protocol.num_ranks
    if isinstance(row, Combine):
        # Parts of a buffer are counted as if all protocols of a sequence cut it alike.
        for part in range(num_ranks) if protocol.num_parts == 1 else (row.part,):
            for index, place in enumerate(row.sources):
                there = (locate(place, call, part),)
                text = f"{who} loads part {part} of {place.memory} {place.rank}"
                yield Move("load", call, there, text, is_first=index == 0)
            for place in row.targets:
                there = (locate(place, call, part),)
                text = f"{who} stores part {part} of {place.memory} {place.rank}"
                yield Move("store", call, there, text, completes=row.completes)
        return
    # A flag is numbered by its writer and its reader.
    if isinstance(row, Signal):
        flags = tuple(rank * num_ranks + peer for peer in row.ranks)
        text = f"{who} signals stage {row.stage} to {row.ranks}"
        yield Move("signal", call, flags, text, epoch=epoch + row.stage)
    else:
        flags = tuple(peer * num_ranks + rank for peer in row.ranks)
        text = f"{who} waits for stage {row.stage} of {row.ranks}"
        yield Move("wait", call, flags, text, epoch=epoch + row.stage)
