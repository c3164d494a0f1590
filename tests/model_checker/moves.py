"""Moves: the rows of a protocol as single loads and stores of each rank, over several calls.

A row is not atomic, so it becomes one move for each part of memory that it loads or stores. The
moves of the user are in between: writing new inputs, overwriting outputs, and reading results.

A value is a list of contributions: so a result shows the inputs that it contains, their calls, and
how often it contains each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from dvkernels.schedules.flag_protocol import NUM_SLOTS, BufferRole, Combine, Protocol, Row, Signal

__all__: list[str] = []

Kind = Literal["put", "load", "store", "read", "signal", "wait"]


class Value(NamedTuple):
    """Content of a part of memory: contributions (rank, call), and the number of completions."""

    contributions: tuple[tuple[int, int], ...]
    completed: int = 0

    def joined(self, other: Value) -> Value:
        """Return the combination of both values."""
        both = sorted((*self.contributions, *other.contributions))
        return Value(tuple(both), self.completed + other.completed)

    def __str__(self) -> str:
        return f"{list(self.contributions)}, completed {self.completed} times"


JUNK = Value(((-1, -1),))


class Move(NamedTuple):
    """Move of a rank: one access to memory or to flags."""

    kind: Kind
    call: int
    places: tuple[int, ...]  # indices of locations, or of flags
    text: str  # for messages
    value: Value = JUNK  # the value that is put, or that must be read
    epoch: int = 0  # of a signal or wait
    is_first: bool = False  # of a load: it is the first of its row
    completes: bool = False  # of a store: it completes the part


class Programs(NamedTuple):
    """Moves of every rank, and the number of locations that they use."""

    moves: tuple[tuple[Move, ...], ...]
    num_locations: int

    def stopping(self, rank: int, at: int) -> Programs:
        """Return the programs in which a rank stops forever before one of its moves."""
        moves = (*self.moves[:rank], self.moves[rank][:at], *self.moves[rank + 1 :])
        return self._replace(moves=moves)


def programs(calls: Sequence[Protocol], *, in_place: bool, num_slots: int = NUM_SLOTS) -> Programs:
    """Return the moves of each rank in a sequence of calls, all of one number of ranks."""
    num_ranks = calls[0].num_ranks
    numbers: dict[tuple[str, int, int], int] = {}

    def locate(role: BufferRole, call: int, part: int) -> int:
        memory: str = role.memory
        if memory == "output" and in_place:
            memory = "input"
        elif memory == "slot":
            memory = f"slot {call % num_slots}"
        return numbers.setdefault((memory, role.rank, part), len(numbers))

    def moves_of(rank: int) -> Iterator[Move]:
        parts = range(num_ranks)
        epoch = 0
        for call, protocol in enumerate(calls):
            subject = f"rank {rank} in call {call}"
            own, out = BufferRole("input", rank), BufferRole("output", rank)
            if not in_place:
                for part in parts:
                    location = (locate(out, call, part),)
                    yield Move("put", call, location, f"{subject} uses part {part} of its output")
            for part in parts:
                contribution = Value(((rank, call),))
                location = (locate(own, call, part),)
                yield Move(
                    "put",
                    call,
                    location,
                    f"{subject} writes part {part} of its input",
                    contribution,
                )
            for row in protocol.rows[rank]:
                yield from _moves_of_row(row, rank, protocol, call, epoch, subject, locate)
            expected = Value(tuple((peer, call) for peer in range(num_ranks)), 1)
            for part in parts:
                location = (locate(out, call, part),)
                yield Move(
                    "read", call, location, f"{subject} reads part {part} of its result", expected
                )
            epoch += protocol.num_stages

    moves = tuple(tuple(moves_of(rank)) for rank in range(num_ranks))
    return Programs(moves, len(numbers))


def _moves_of_row(
    row: Row,
    rank: int,
    protocol: Protocol,
    call: int,
    epoch: int,
    subject: str,
    locate: Callable[[BufferRole, int, int], int],
) -> Iterator[Move]:
    num_ranks = protocol.num_ranks
    if isinstance(row, Combine):
        # All protocols of a sequence are modelled with the same parts, one per rank.
        for part in range(num_ranks) if protocol.num_parts == 1 else (row.part,):
            for index, role in enumerate(row.sources):
                location = (locate(role, call, part),)
                text = f"{subject} loads part {part} of {role.memory} {role.rank}"
                yield Move("load", call, location, text, is_first=index == 0)
            for role in row.targets:
                location = (locate(role, call, part),)
                text = f"{subject} stores part {part} of {role.memory} {role.rank}"
                yield Move("store", call, location, text, completes=row.completes)
        return
    # The index of a flag: writer * num_ranks + reader.
    if isinstance(row, Signal):
        flags = tuple(rank * num_ranks + peer for peer in row.ranks)
        text = f"{subject} signals stage {row.stage} to {row.ranks}"
        yield Move("signal", call, flags, text, epoch=epoch + row.stage)
    else:
        flags = tuple(peer * num_ranks + rank for peer in row.ranks)
        text = f"{subject} waits for stage {row.stage} of {row.ranks}"
        yield Move("wait", call, flags, text, epoch=epoch + row.stage)
