"""What a node of one iterator remembers, so that it need not be replayed from its start."""

from __future__ import annotations

import collections
from typing import Any

from dvkernels.data.checks import LARGEST_INDEX
from dvkernels.errors import DatasetError
from dvkernels.user_errors import shown

__all__ = ["MAX_MARKS", "ResumePoints"]

MAX_MARKS = 2**12  # about a megabyte of the short states that sources are asked for


class ResumePoints:
    """Places in the output of a node, each with what the node needs to go on from there.

    They are kept in the order of (epoch, position). The oldest one is the place that the
    iterator has delivered up to: a node may be ahead of it, and may have to come back to it.
    What lies between two places can be replayed, so where an iterator delivers nothing for long
    (a filter rejects millions, a batch is huge) every other one is forgotten.
    """

    def __init__(self, initial: Any = None) -> None:
        self._initial = initial
        self._marks: collections.deque[tuple[int, int, Any]] = collections.deque()

    def add(self, epoch: int, position: int, value: Any) -> None:
        """Remember ``value`` for a place behind all others."""
        self._marks.append((epoch, position, value))
        if len(self._marks) > MAX_MARKS:
            oldest, *others, newest = self._marks
            self._marks = collections.deque((oldest, *others[1::2], newest))

    def find(self, epoch: int, position: int) -> tuple[int, Any]:
        """Return the last place at or before ``position`` and what was remembered there."""
        found = (0, self._initial)
        for then, place, value in self._marks:  # The one wanted is among the first two.
            if (then, place) > (epoch, position):
                break
            if then == epoch:
                found = (place, value)
        return found

    def resume(self, epoch: int, position: int) -> tuple[int, Any]:
        """Return what :meth:`find` does, and forget all that lies behind it."""
        while self._marks and self._marks[-1][:2] > (epoch, position):
            self._marks.pop()
        if self._marks and self._marks[-1][0] == epoch:
            return self._marks[-1][1:]
        return 0, self._initial

    def release(self, epoch: int, position: int) -> list[Any]:
        """Forget all that lies before ``position``; return what it takes to come back to it."""
        while len(self._marks) > 1 and self._marks[1][:2] <= (epoch, position):
            self._marks.popleft()
        place, value = self.find(epoch, position)
        return [epoch, place, list(value) if isinstance(value, tuple) else value]

    def restore(self, memory: Any) -> None:
        """Remember what :meth:`release` returned; :class:`DatasetError` if it is not that."""
        whole = isinstance(memory, list) and len(memory) == 3 and _are_counts(memory[:2])
        if whole and isinstance(self._initial, int):
            whole = _are_counts(memory[2:])
        elif whole and isinstance(self._initial, tuple):
            value = memory[2]
            whole = (
                isinstance(value, list) and len(value) == len(self._initial) and _are_counts(value)
            )
        if not whole:
            raise DatasetError(
                "load_state_dict: expected the memory to hold [epoch, position, value]; got "
                f"{shown(memory)}; the state is damaged"
            )
        epoch, position, value = memory
        self._marks.clear()
        self._marks.append((epoch, position, value))


def _are_counts(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value <= LARGEST_INDEX for value in values)
