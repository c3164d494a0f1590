"""Epoch counters of datasets, for loops that distribute the same dataset anew for each epoch."""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["EpochCount", "EpochCounts"]


class EpochCount:
    """Counter of the epochs of one dataset: the number of the next one."""

    __slots__ = ("next",)

    def __init__(self) -> None:
        self.next = 0


class EpochCounts:
    """Epoch counters of datasets, or of functions that make datasets, held by weak references."""

    def __init__(self) -> None:
        self._counts: weakref.WeakKeyDictionary[Any, dict[str, EpochCount]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, made: Any) -> EpochCount:
        """Return the counter of a dataset or function; a new one if it cannot be weakly referenced.

        Bound methods of one object count by name.
        """
        # A bound method is a new object at each look-up; the object that it is bound to is not.
        holder, name = getattr(made, "__self__", made), getattr(made, "__name__", "")
        try:
            return self._counts.setdefault(holder, {}).setdefault(name, EpochCount())
        except TypeError:
            return EpochCount()
