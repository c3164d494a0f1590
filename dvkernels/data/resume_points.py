"""Resume points of a node: positions from which its iteration can continue without a replay."""

from __future__ import annotations

import collections
from typing import Any

from dvkernels.data.checks import LARGEST_INDEX
from dvkernels.errors import DatasetError
from dvkernels.user_errors import brief

__all__: list[str] = []

MAX_RESUME_POINTS = 2**12  # about a megabyte, if the states of the source are short


class ResumePoints:
    """Positions in the output of a node, each with the value that the node needs to resume there.

    They are kept in the order of (epoch, position). The oldest is the position up to which the
    iterator has delivered; the node may be ahead of it and may have to go back to it. Elements
    between two resume points can be replayed, so if the iterator delivers nothing for long (a
    filter rejects millions of elements, a batch is huge), every second point is dropped.
    """

    def __init__(self, initial: Any = None) -> None:
        self._initial = initial
        self._points: collections.deque[tuple[int, int, Any]] = collections.deque()

    def add(self, epoch: int, position: int, value: Any) -> None:
        """Add a resume point behind all others."""
        self._points.append((epoch, position, value))
        if len(self._points) > MAX_RESUME_POINTS:
            oldest, *others, newest = self._points
            self._points = collections.deque((oldest, *others[1::2], newest))

    def find(self, epoch: int, position: int) -> tuple[int, Any]:
        """Return (position, value) of the last resume point at or before ``position``."""
        found = (0, self._initial)
        for point_epoch, point, value in self._points:  # The result is among the first two.
            if (point_epoch, point) > (epoch, position):
                break
            if point_epoch == epoch:
                found = (point, value)
        return found

    def resume(self, epoch: int, position: int) -> tuple[int, Any]:
        """Return the result of :meth:`find`, and drop all resume points behind it."""
        while self._points and self._points[-1][:2] > (epoch, position):
            self._points.pop()
        if self._points and self._points[-1][0] == epoch:
            return self._points[-1][1:]
        return 0, self._initial

    def release(self, epoch: int, position: int) -> list[Any]:
        """Drop the resume points before ``position``; return [epoch, position, value] for it."""
        while len(self._points) > 1 and self._points[1][:2] <= (epoch, position):
            self._points.popleft()
        point, value = self.find(epoch, position)
        return [epoch, point, list(value) if isinstance(value, tuple) else value]

    def restore(self, memory: Any) -> None:
        """Set the resume point that :meth:`release` returned.

        Raises
        ------
        DatasetError
            ``memory`` is not a result of :meth:`release`.
        """
        is_valid = isinstance(memory, list) and len(memory) == 3 and _are_counts(memory[:2])
        if is_valid and isinstance(self._initial, int):
            is_valid = _are_counts(memory[2:])
        elif is_valid and isinstance(self._initial, tuple):
            value = memory[2]
            is_valid = (
                isinstance(value, list) and len(value) == len(self._initial) and _are_counts(value)
            )
        if not is_valid:
            raise DatasetError(
                "load_state_dict: expected the memory to hold [epoch, position, value]; got "
                f"{brief(memory)}; the state is damaged"
            )
        epoch, position, value = memory
        self._points.clear()
        self._points.append((epoch, position, value))


def _are_counts(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value <= LARGEST_INDEX for value in values)
