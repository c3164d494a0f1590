"""The communicator of one rank, or one worker: every collective is a copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from dvkernels.communicators.accumulation import Accumulation
from dvkernels.reduce_op import Reduction

__all__: list[str] = []


@final
class Single:
    """A group of one is a group: the reduction of one value is that value."""

    size = 1
    rank = 0
    timeout_seconds = math.inf
    has_ended = False

    def all_reduce_columns(
        self,
        columns: Sequence[Sequence[Any]],
        how: Accumulation,
        outs: Sequence[Sequence[Any]] | None = None,
    ) -> list[list[Any]] | None:
        """Return None: replicas of one worker meet without it."""

    def empty(self, shape: tuple[int, ...], dtype: Any, count: int) -> list[Any]:
        """Return new arrays."""
        return [np.empty(shape, dtype) for _ in range(count)]

    def meet(self) -> None:
        """Wait for nobody."""

    def exchange(self, word: Any, verb: str = "exchange") -> list[Any]:
        """Return the word."""
        return [word]

    def agree(self, numbers: Sequence[int], verb: str, *terms: Any) -> list[list[int]]:
        """Return the numbers."""
        return [[*numbers]]

    def announce(self, error: BaseException) -> None:
        """Tell nobody."""

    def end(self, error: BaseException) -> None:
        """End nothing: nobody waits for this one."""

    def beside(self) -> Single:
        """Return this: it keeps no order of calls."""
        return self

    def all_reduce(
        self, values: Sequence[Any], op: Reduction, out: Sequence[Any] | None = None
    ) -> list[Any]:
        """Copy the value, into ``out`` if it is given."""
        del op
        (value,) = values
        if out is None:
            return [value.copy("K")]
        np.copyto(out[0], value)
        return list(out)

    def reduce(self, values: Sequence[Any], op: Reduction) -> Any:
        """Copy the value."""
        return self.all_reduce(values, op)[0]

    def reduce_scatter(self, values: Sequence[Any], op: Reduction) -> list[Any]:
        """Copy the value: all of it is the only rank's part."""
        return self.all_reduce(values, op)

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Copy the value."""
        del axis
        return [value.copy("K") for value in values]

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Copy the value."""
        del root
        return [value.copy("K") for value in values]
