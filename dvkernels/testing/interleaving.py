"""The proof by trial: every order in which ranks can move, and random ones where those are many.

Orders that differ only in moves that do not touch each other end alike, so of those one is run: a
signal is sent, a wait that is answered ends, and memory that no other rank will use in a
conflicting way any more is used, at once. Each of these moves can be taken before whatever others
do first, and takes no possibility from them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

from dvkernels.testing.moves import JUNK, Move, Programs, Value

__all__: list[str] = []


class Spin(NamedTuple):
    """What ends a wait that is not answered, and what the rank does then."""

    has_deadline: bool = False  # it may give up by itself at any moment
    hears_abort: bool = True  # it gives up when somebody has aborted
    aborts_others: bool = True  # when it gives up, it aborts


class _State(NamedTuple):
    at: tuple[int, ...]  # the next move of each rank
    held: tuple[Value, ...]  # in the registers of each rank
    memory: tuple[Value, ...]
    flags: tuple[int, ...]
    aborted: bool


_Choice = tuple[int, bool]  # which rank moves, and whether it gives up
_ABORT: _Choice = (-1, True)


class RankInterpreter:
    """Runs the programs of some ranks, and raises ``AssertionError`` where a law is broken.

    No rank waits forever, unless an abort may still come. A result that is read while nobody has
    aborted holds the contribution of each rank to this call once, and was completed once.

    Parameters
    ----------
    programs : Programs
        What the ranks do.
    spin : Spin
        How waits end that are not answered.
    aborts_from_outside : bool
        Whether somebody else may abort, at any moment.
    """

    def __init__(
        self, programs: Programs, spin: Spin | None = None, *, aborts_from_outside: bool = False
    ) -> None:
        self._moves = programs.moves
        self._num_ranks = len(programs.moves)
        self._num_locations = programs.num_locations
        self._spin = spin or Spin()
        self._aborts_from_outside = aborts_from_outside
        # What a rank will still read, and write, from each of its moves on: a bit a location.
        self._reads = [_ahead(moves, "load", "read") for moves in self._moves]
        self._exits = [_exits(moves) for moves in self._moves]
        self._writes = [_ahead(moves, "store", "put") for moves in self._moves]

    def run_every_order(self, most_states: int = 1_000_000) -> int:
        """Run every order, and return how many states that took."""
        state = self._start()
        seen = {state}
        path = [(state, self._choices(state))]
        try:
            while path:
                state, choices = path[-1]
                if not choices:
                    path.pop()
                    continue
                state = self._after(state, choices.pop())
                if state not in seen:
                    seen.add(state)
                    path.append((state, self._choices(state)))
                    if len(seen) > most_states:
                        raise RuntimeError(f"more than {most_states} states; run at random instead")
        except AssertionError as error:
            raise AssertionError(f"{error}{self._told([*path, (state, [])])}") from None
        return len(seen)

    def run_at_random(self, seed: int) -> None:
        """Run one order, in which ranks fall asleep for a while now and then."""
        rng = random.Random(seed)
        state = self._start()
        path = [(state, [])]  # type: list[tuple[_State, list[_Choice]]]
        awake_from = [0] * self._num_ranks
        turn = 0
        try:
            while choices := [(rank, False) for rank in self._able(state)]:
                awake = [choice for choice in choices if awake_from[choice[0]] <= turn]
                turn += 1
                if awake:
                    choice = rng.choice(awake)
                    if rng.random() < 0.05:
                        awake_from[choice[0]] = turn + rng.randrange(400)
                    state = self._after(state, choice)
                    path.append((state, []))
            self._check_end(state)
        except AssertionError as error:
            raise AssertionError(f"{error}{self._told(path)}\n  seed {seed}") from None

    def _start(self) -> _State:
        return _State(
            (0,) * self._num_ranks,
            (JUNK,) * self._num_ranks,
            (JUNK,) * self._num_locations,
            (0,) * self._num_ranks**2,
            False,
        )

    def _next(self, state: _State, rank: int) -> Move | None:
        moves, at = self._moves[rank], state.at[rank]
        return moves[at] if at < len(moves) else None

    def _able(self, state: _State) -> list[int]:
        """Return the ranks that can move on."""
        return [
            rank
            for rank in range(self._num_ranks)
            if (move := self._next(state, rank)) is not None
            and (move.kind != "wait" or _is_answered(state, move))
        ]

    def _choices(self, state: _State) -> list[_Choice]:
        """Return what may happen next: everything, or one move where that is enough."""
        able = self._able(state)
        leaving: list[_Choice] = []
        if self._spin.has_deadline or (state.aborted and self._spin.hears_abort):
            # Also where it is answered by now: the signal may have come after the deadline.
            leaving = [(rank, True) for rank in range(self._num_ranks) if self._waits(state, rank)]
        for rank in able:
            move = self._moves[rank][state.at[rank]]
            if move.kind == "wait" and leaving:
                continue
            if move.kind in ("signal", "wait") or self._is_alone(state, rank, move):
                return [(rank, False)]
        choices = [(rank, False) for rank in able] + leaving
        may_come = self._aborts_from_outside and not state.aborted
        if not choices and not may_come:
            self._check_end(state)
        return [*choices, _ABORT] if may_come else choices

    def _waits(self, state: _State, rank: int) -> bool:
        move = self._next(state, rank)
        return move is not None and move.kind == "wait"

    def _is_alone(self, state: _State, rank: int, move: Move) -> bool:
        """Return whether no other rank will use this place so that the order would matter."""
        bit = 1 << move.places[0]
        for other, at in enumerate(state.at):
            if other != rank:
                uses = self._writes[other][at]
                if move.kind in ("store", "put"):
                    uses |= self._reads[other][at]
                if uses & bit:
                    return False
        return True

    def _after(self, state: _State, choice: _Choice) -> _State:
        """Return the state after a move."""
        rank, gives_up = choice
        at, held, memory, flags, aborted = state
        if choice == _ABORT:
            return state._replace(aborted=True)
        if gives_up:
            # It leaves this call; its user goes on, to the result and to the next call.
            left = (*at[:rank], self._exits[rank][at[rank]], *at[rank + 1 :])
            return state._replace(at=left, aborted=aborted or self._spin.aborts_others)
        move = self._moves[rank][at[rank]]
        there = move.places[0]
        if move.kind == "signal":
            flags = tuple(
                move.epoch if flag in move.places else epoch for flag, epoch in enumerate(flags)
            )
        elif move.kind == "load":
            loaded = memory[there] if move.is_first else held[rank].joined(memory[there])
            held = (*held[:rank], loaded, *held[rank + 1 :])
        elif move.kind == "put":
            memory = (*memory[:there], move.value, *memory[there + 1 :])
        elif move.kind == "store":
            stored = Value(held[rank].contributions, held[rank].completed + move.completes)
            memory = (*memory[:there], stored, *memory[there + 1 :])
        elif move.kind == "read":
            is_right = aborted or memory[there] == move.value
            assert is_right, f"{move.text}: expected {move.value}; got {memory[there]}"
        return _State((*at[:rank], at[rank] + 1, *at[rank + 1 :]), held, memory, flags, aborted)

    def _check_end(self, state: _State) -> None:
        left = [move.text for r in range(self._num_ranks) if (move := self._next(state, r))]
        assert not left, f"deadlock: {'; '.join(left)}"

    def _told(self, path: Sequence[tuple[_State, list[_Choice]]]) -> str:
        """Return the last moves of a path, for a message."""
        moves: list[str] = []
        for (before, _), (after, _) in itertools.pairwise(path):
            for rank, (old, new) in enumerate(zip(before.at, after.at, strict=True)):
                if old != new:
                    gave_up = " and gives up" if new != old + 1 else ""
                    moves.append(self._moves[rank][old].text + gave_up)
        return "\n  after " + "\n  then ".join(moves[-12:])


def _is_answered(state: _State, move: Move) -> bool:
    return all(state.flags[flag] >= move.epoch for flag in move.places)


def _exits(moves: Sequence[Move]) -> list[int]:
    """Return, for each move, where the rank goes on that gives up there: at its user's reading."""
    exits: list[int] = []
    end = len(moves)
    for at, move in reversed([*enumerate(moves)]):
        exits.append(end)
        if move.kind == "read":
            end = at
    return exits[::-1]


def _ahead(moves: Sequence[Move], *kinds: str) -> list[int]:
    """Return, for each move and the end, which places the moves of these kinds still use."""
    ahead = [0]
    for move in reversed(moves):
        ahead.append(ahead[-1] | (1 << move.places[0] if move.kind in kinds else 0))
    return ahead[::-1]
