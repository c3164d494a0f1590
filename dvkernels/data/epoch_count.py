"""Which epoch comes next, for loops that distribute the same data anew for each."""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["EpochCount", "EpochCounts"]


class EpochCount:
    """The epoch behind the one begun last."""

    __slots__ = ("next",)

    def __init__(self) -> None:
        self.next = 0


class EpochCounts:
    """A count for each dataset, or function that makes one, as long as that is alive."""

    def __init__(self) -> None:
        self._counts: weakref.WeakKeyDictionary[Any, dict[str, EpochCount]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, made: Any) -> EpochCount:
        """Return the count of a dataset or function; a new one of what cannot be known again."""
        # A bound method is made anew whenever it is looked up; its object is not.
        holder, name = getattr(made, "__self__", made), getattr(made, "__name__", "")
        try:
            return self._counts.setdefault(holder, {}).setdefault(name, EpochCount())
        except TypeError:
            return EpochCount()
