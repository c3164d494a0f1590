"""Model checker of a protocol: all interleavings of the ranks, or random ones of large cases.

Interleavings that differ only in the order of independent moves have the same result, so one of
them is run (partial-order reduction): a signal, a satisfied wait, and a use of memory that no other
rank will use in a conflicting way are run at once. Each of these moves commutes with the moves of
all other ranks, and disables none of them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

from model_checker.moves import JUNK, Move, Programs, Value

__all__: list[str] = []


class Spin(NamedTuple):
    """End of a wait whose signal does not come, and the consequences."""

    has_deadline: bool = False  # the rank may give up at any moment
    hears_abort: bool = True  # the rank gives up after an abort
    aborts_others: bool = True  # a rank that gives up aborts all ranks


class _State(NamedTuple):
    positions: tuple[int, ...]  # the next move of each rank
    registers: tuple[Value, ...]  # the value that each rank has combined so far
    memory: tuple[Value, ...]
    flags: tuple[int, ...]
    aborted: bool


_Choice = tuple[int, bool]  # the rank that moves, and whether it gives up
_ABORT: _Choice = (-1, True)


class RankInterpreter:
    """Interpreter of the programs of all ranks, which raises ``AssertionError`` for a broken law.

    The laws: no rank waits forever, unless an abort may still come; a result that is read before an
    abort contains the contribution of each rank to this call once, and was completed once.

    Parameters
    ----------
    programs : Programs
        The programs of the ranks.
    spin : Spin
        The end of waits whose signal does not come.
    aborts_from_outside : bool
        Whether an abort may come from outside, at any moment.
    """

    def __init__(
        self, programs: Programs, spin: Spin | None = None, *, aborts_from_outside: bool = False
    ) -> None:
        self._moves = programs.moves
        self._num_ranks = len(programs.moves)
        self._num_locations = programs.num_locations
        self._spin = spin or Spin()
        self._aborts_from_outside = aborts_from_outside
        # Locations that a rank still reads, and writes, from each of its moves on, as bit sets.
        self._reads = [_remaining_uses(moves, "load", "read") for moves in self._moves]
        self._exits = [_exits(moves) for moves in self._moves]
        self._writes = [_remaining_uses(moves, "store", "put") for moves in self._moves]

    def run_every_order(self, most_states: int = 1_000_000) -> int:
        """Run all interleavings, and return the number of states."""
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
            raise AssertionError(f"{error}{self._trace([*path, (state, [])])}") from None
        return len(seen)

    def run_at_random(self, seed: int) -> None:
        """Run one random interleaving, in which ranks are sometimes suspended for a while."""
        rng = random.Random(seed)
        state = self._start()
        path = [(state, [])]  # type: list[tuple[_State, list[_Choice]]]
        awake_from = [0] * self._num_ranks
        turn = 0
        try:
            while choices := [(rank, False) for rank in self._movable_ranks(state)]:
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
            raise AssertionError(f"{error}{self._trace(path)}\n  seed {seed}") from None

    def _start(self) -> _State:
        return _State(
            (0,) * self._num_ranks,
            (JUNK,) * self._num_ranks,
            (JUNK,) * self._num_locations,
            (0,) * self._num_ranks**2,
            False,
        )

    def _next(self, state: _State, rank: int) -> Move | None:
        moves, position = self._moves[rank], state.positions[rank]
        return moves[position] if position < len(moves) else None

    def _movable_ranks(self, state: _State) -> list[int]:
        """Return the ranks that are not blocked."""
        return [
            rank
            for rank in range(self._num_ranks)
            if (move := self._next(state, rank)) is not None
            and (move.kind != "wait" or _is_answered(state, move))
        ]

    def _choices(self, state: _State) -> list[_Choice]:
        """Return the possible next moves, or a single one that commutes with all others."""
        movable = self._movable_ranks(state)
        leaving: list[_Choice] = []
        if self._spin.has_deadline or (state.aborted and self._spin.hears_abort):
            # Also where the wait is satisfied by now: the signal may have missed the deadline.
            leaving = [(rank, True) for rank in range(self._num_ranks) if self._waits(state, rank)]
        for rank in movable:
            move = self._moves[rank][state.positions[rank]]
            if move.kind == "wait" and leaving:
                continue
            if move.kind in ("signal", "wait") or self._commutes(state, rank, move):
                return [(rank, False)]
        choices = [(rank, False) for rank in movable] + leaving
        may_come = self._aborts_from_outside and not state.aborted
        if not choices and not may_come:
            self._check_end(state)
        return [*choices, _ABORT] if may_come else choices

    def _waits(self, state: _State, rank: int) -> bool:
        move = self._next(state, rank)
        return move is not None and move.kind == "wait"

    def _commutes(self, state: _State, rank: int, move: Move) -> bool:
        """Return whether no later move of another rank conflicts with this one."""
        bit = 1 << move.places[0]
        for other, position in enumerate(state.positions):
            if other != rank:
                uses = self._writes[other][position]
                if move.kind in ("store", "put"):
                    uses |= self._reads[other][position]
                if uses & bit:
                    return False
        return True

    def _after(self, state: _State, choice: _Choice) -> _State:
        """Return the state after a choice."""
        rank, gives_up = choice
        positions, registers, memory, flags, aborted = state
        if choice == _ABORT:
            return state._replace(aborted=True)
        if gives_up:
            # The rank exits this call; its user reads the result, and makes the next call.
            left = (*positions[:rank], self._exits[rank][positions[rank]], *positions[rank + 1 :])
            return state._replace(positions=left, aborted=aborted or self._spin.aborts_others)
        move = self._moves[rank][positions[rank]]
        location = move.places[0]
        if move.kind == "signal":
            flags = tuple(
                move.epoch if flag in move.places else epoch for flag, epoch in enumerate(flags)
            )
        elif move.kind == "load":
            loaded = memory[location] if move.is_first else registers[rank].joined(memory[location])
            registers = (*registers[:rank], loaded, *registers[rank + 1 :])
        elif move.kind == "put":
            memory = (*memory[:location], move.value, *memory[location + 1 :])
        elif move.kind == "store":
            stored = Value(
                registers[rank].contributions, registers[rank].completed + move.completes
            )
            memory = (*memory[:location], stored, *memory[location + 1 :])
        elif move.kind == "read":
            is_right = aborted or memory[location] == move.value
            assert is_right, f"{move.text}: expected {move.value}; got {memory[location]}"
        return _State(
            (*positions[:rank], positions[rank] + 1, *positions[rank + 1 :]),
            registers,
            memory,
            flags,
            aborted,
        )

    def _check_end(self, state: _State) -> None:
        left = [move.text for r in range(self._num_ranks) if (move := self._next(state, r))]
        assert not left, f"deadlock: {'; '.join(left)}"

    def _trace(self, path: Sequence[tuple[_State, list[_Choice]]]) -> str:
        """Return the last moves of a path, as text for a message."""
        moves: list[str] = []
        for (before, _), (after, _) in itertools.pairwise(path):
            for rank, (old, new) in enumerate(zip(before.positions, after.positions, strict=True)):
                if old != new:
                    gave_up = " and gives up" if new != old + 1 else ""
                    moves.append(self._moves[rank][old].text + gave_up)
        return "\n  after " + "\n  then ".join(moves[-12:])


def _is_answered(state: _State, move: Move) -> bool:
    return all(state.flags[flag] >= move.epoch for flag in move.places)


def _exits(moves: Sequence[Move]) -> list[int]:
    """Return, for each move, the move after giving up there: the user's read of the result."""
    exits: list[int] = []
    end = len(moves)
    for index, move in reversed([*enumerate(moves)]):
        exits.append(end)
        if move.kind == "read":
            end = index
    return exits[::-1]


def _remaining_uses(moves: Sequence[Move], *kinds: str) -> list[int]:
    """Return, for each move and the end, the locations used by later moves of these kinds."""
    remaining = [0]
    for move in reversed(moves):
        remaining.append(remaining[-1] | (1 << move.places[0] if move.kind in kinds else 0))
    return remaining[::-1]
