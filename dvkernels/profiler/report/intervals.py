"""Intervals: sets of time on one clock, their intersections, and how much of a span they cover."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

__all__ = ["Intervals"]


class Intervals:
    """Set of disjoint intervals, in order.

    Parameters
    ----------
    begins, ends : array-like of float
        Of the intervals, in any order; they may overlap. One that ends before it begins is empty.

    Examples
    --------
    >>> busy = Intervals([0, 1, 5], [2, 3, 6])
    >>> float(busy.covered(2.5, 5.5))
    1.0
    >>> (busy & Intervals([2], [10])).length
    2.0
    """

    __slots__ = ("begins", "ends")

    def __init__(self, begins: Any, ends: Any) -> None:
        begins, ends = np.asarray(begins, float), np.asarray(ends, float)
        order = np.argsort(begins[ends > begins], kind="stable")
        begins, ends = begins[ends > begins][order], ends[ends > begins][order]
        reach = np.maximum.accumulate(ends)  # the latest end so far
        starts = np.ones(len(begins), bool)
        starts[1:] = begins[1:] > reach[:-1]
        self.begins: Any = begins[starts]
        self.ends: Any = np.append(reach[:-1][starts[1:]], reach[-1:])

    @property
    def length(self) -> float:
        """The sum of the lengths."""
        return float((self.ends - self.begins).sum())

    def covered(self, begins: Any, ends: Any) -> Any:
        """Return how much of each span, from its begin to its end, lies in this set."""
        return self._covered_until(ends) - self._covered_until(begins)

    def _covered_until(self, times: Any) -> Any:
        if not len(self.begins):
            return np.zeros(np.shape(times))
        sums = np.cumsum(self.ends - self.begins)
        points = np.stack([self.begins, self.ends], axis=1).ravel()
        values = np.stack([np.append(0.0, sums[:-1]), sums], axis=1).ravel()
        return np.interp(np.asarray(times, float), points, values)

    def _contains(self, times: Any) -> Any:
        index = np.searchsorted(self.begins, times, side="right") - 1
        return (index >= 0) & (times < np.append(self.ends, 0.0)[index])

    def __and__(self, other: Self) -> Intervals:
        """Return what lies in both."""
        points = np.unique(np.concatenate([self.begins, self.ends, other.begins, other.ends]))
        middles = (points[:-1] + points[1:]) / 2
        both = self._contains(middles) & other._contains(middles)
        return Intervals(points[:-1][both], points[1:][both])
