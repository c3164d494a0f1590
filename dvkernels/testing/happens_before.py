"""The proof by order: signals and waits order all uses of memory, whatever the timing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dvkernels.testing.moves import Move, Programs

__all__: list[str] = []


class _Use(NamedTuple):
    stores: bool
    rank: int
    when: int  # on the clock of that rank
    text: str


def check_order(programs: Programs) -> None:
    """Assert that no rank waits forever, and that all uses of memory are ordered.

    The programs run once, with a vector clock for each rank: how far it is sure that each other
    has come. A wait learns what the first signal that answers it knew, and no more. Of two uses of
    one place, one of them a store, the later rank must be sure of the earlier. Ranks decide
    nothing but by waiting, so what is ordered in one run is ordered in every run, and then every
    run gives the same values.

    At the end of each call, each rank must be sure that every other has ended the call before. So
    uses that lie two calls apart are ordered always, and what holds of any two calls in a row, in
    slots that alternate, holds of any number of calls.
    """
    num_ranks = len(programs.moves)
    clocks = [[0] * num_ranks for _ in programs.moves]
    ended: list[dict[int, int]] = [{} for _ in programs.moves]  # call -> own clock at its end
    at = [0] * num_ranks
    signals: dict[int, list[tuple[int, list[int]]]] = {}  # flag -> (epoch, what its writer knew)
    uses: dict[int, list[_Use]] = {}
    moved = True
    while moved:
        moved = False
        for rank, moves in enumerate(programs.moves):
            while at[rank] < len(moves):
                move = moves[at[rank]]
                if move.kind == "wait":
                    learnt = _learnt(signals, move)
                    if learnt is None:
                        break
                    known = zip(clocks[rank], *learnt, strict=True)
                    clocks[rank] = [max(clock) for clock in known]
                clock = clocks[rank]
                clock[rank] += 1
                at[rank] += 1
                moved = True
                if move.kind == "signal":
                    for flag in move.places:
                        signals.setdefault(flag, []).append((move.epoch, [*clock]))
                elif move.kind != "wait":
                    _check_use(uses.setdefault(move.places[0], []), rank, clock, move)
                if at[rank] == len(moves) or moves[at[rank]].call != move.call:
                    ended[rank][move.call] = clock[rank]
                    _check_exchange(rank, clock, move.call, ended)
    stuck = [m[at[r]].text for r, m in enumerate(programs.moves) if at[r] < len(m)]
    assert not stuck, f"deadlock: {'; '.join(stuck)}"


def _learnt(
    signals: dict[int, list[tuple[int, list[int]]]], move: Move
) -> Sequence[list[int]] | None:
    """Return what the first signals that answer a wait knew; None if one has not been sent."""
    answers = [
        next((known for epoch, known in signals.get(flag, ()) if epoch >= move.epoch), None)
        for flag in move.places
    ]
    found = [known for known in answers if known is not None]
    return found if len(found) == len(answers) else None


def _check_use(there: list[_Use], rank: int, clock: list[int], move: Move) -> None:
    stores = move.kind in ("store", "put")
    for use in there:
        ordered = use.rank == rank or clock[use.rank] >= use.when or not (stores or use.stores)
        assert ordered, f"nothing says which comes first: {use.text}; {move.text}"
    there.append(_Use(stores, rank, clock[rank], move.text))


def _check_exchange(rank: int, clock: list[int], call: int, ended: list[dict[int, int]]) -> None:
    if call == 0:
        return
    for other, ends in enumerate(ended):
        sure = call - 1 in ends and clock[other] >= ends[call - 1]
        assert sure, (
            f"rank {rank} ends call {call} and rank {other} may still be in call {call - 1}"
        )
