"""Happens-before check of a protocol by vector clocks: signals and waits order all uses of memory.

L. Lamport, Commun. ACM 21(7), 558-565 (1978), doi:10.1145/359545.359563; vector clocks: C. J.
Fidge (1988), F. Mattern (1989).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from model_checker.moves import Move, Programs

__all__: list[str] = []


class _Use(NamedTuple):
    is_store: bool
    rank: int
    time: int  # on the clock of that rank
    text: str


def check_order(programs: Programs) -> None:
    """Assert that no rank waits forever, and that all uses of memory are ordered.

    The programs run once, with a vector clock per rank: the number of moves of every rank that are
    known to have happened. A wait merges the clock of the first signal that satisfies it, and no
    other. Of two uses of one location of which one is a store, the earlier must be in the clock of
    the later. Ranks have no control flow but waits, so an order in one run holds in every run, and
    every run gives the same values.

    At the end of a call, the clock of each rank must contain the end of the previous call on every
    rank. So uses two calls apart are always ordered, and a property of any two consecutive calls,
    with alternating slots, holds for any number of calls.
    """
    num_ranks = len(programs.moves)
    clocks = [[0] * num_ranks for _ in programs.moves]
    ended: list[dict[int, int]] = [{} for _ in programs.moves]  # call -> own clock at its end
    next_move = [0] * num_ranks
    signals: dict[int, list[tuple[int, list[int]]]] = {}  # flag -> (epoch, clock of its writer)
    uses: dict[int, list[_Use]] = {}
    progressed = True
    while progressed:
        progressed = False
        for rank, moves in enumerate(programs.moves):
            while next_move[rank] < len(moves):
                move = moves[next_move[rank]]
                if move.kind == "wait":
                    signal_clocks = _signal_clocks(signals, move)
                    if signal_clocks is None:
                        break
                    merged = zip(clocks[rank], *signal_clocks, strict=True)
                    clocks[rank] = [max(clock) for clock in merged]
                clock = clocks[rank]
                clock[rank] += 1
                next_move[rank] += 1
                progressed = True
                if move.kind == "signal":
                    for flag in move.places:
                        signals.setdefault(flag, []).append((move.epoch, [*clock]))
                elif move.kind != "wait":
                    _check_use(uses.setdefault(move.places[0], []), rank, clock, move)
                if next_move[rank] == len(moves) or moves[next_move[rank]].call != move.call:
                    ended[rank][move.call] = clock[rank]
                    _check_previous_call(rank, clock, move.call, ended)
    stuck = [m[next_move[r]].text for r, m in enumerate(programs.moves) if next_move[r] < len(m)]
    assert not stuck, f"deadlock: {'; '.join(stuck)}"


def _signal_clocks(
    signals: dict[int, list[tuple[int, list[int]]]], move: Move
) -> Sequence[list[int]] | None:
    """Return the clocks of the first signals that satisfy a wait; None if one is not sent yet."""
    answers = [
        next((clock for epoch, clock in signals.get(flag, ()) if epoch >= move.epoch), None)
        for flag in move.places
    ]
    found = [clock for clock in answers if clock is not None]
    return found if len(found) == len(answers) else None


def _check_use(uses_of_place: list[_Use], rank: int, clock: list[int], move: Move) -> None:
    is_store = move.kind in ("store", "put")
    for use in uses_of_place:
        is_ordered = (
            use.rank == rank or clock[use.rank] >= use.time or not (is_store or use.is_store)
        )
        assert is_ordered, f"not ordered by signals: {use.text}; {move.text}"
    uses_of_place.append(_Use(is_store, rank, clock[rank], move.text))


def _check_previous_call(
    rank: int, clock: list[int], call: int, ended: list[dict[int, int]]
) -> None:
    if call == 0:
        return
    for other, ends in enumerate(ended):
        is_ordered = call - 1 in ends and clock[other] >= ends[call - 1]
        assert is_ordered, (
            f"rank {rank} ends call {call} and rank {other} may still be in call {call - 1}"
        )
