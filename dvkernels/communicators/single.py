"""Communicator of one rank, or of one worker: every collective is a copy."""

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
    """Communicator of a single rank: a group of one is a group."""

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
        """Return None: the replicas of one worker reduce over their own communicator."""

    def empty(self, shape: tuple[int, ...], dtype: Any, count: int) -> list[Any]:
        """Return new host arrays."""
        return [np.empty(shape, dtype) for _ in range(count)]

    def barrier(self) -> None:
        """Return at once."""

    def exchange(self, message: Any, verb: str = "exchange") -> list[Any]:
        """Return the message."""
        return [message]

    def agree(self, numbers: Sequence[int], verb: str, *terms: Any) -> list[list[int]]:
        """Return the numbers."""
        return [[*numbers]]

    def announce(self, error: BaseException) -> None:
        """Do nothing: there is no other worker."""

    def end(self, error: BaseException) -> None:
        """Do nothing: no other worker waits for this one."""

    def close(self) -> None:
        """Do nothing: there is no other worker."""

    def duplicate(self) -> Single:
        """Return this communicator: it keeps no order of calls."""
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
        """Copy the value: the part of the only rank is the whole."""
        return self.all_reduce(values, op)

    def all_gather(self, values: Sequence[Any], axis: int) -> list[Any]:
        """Copy the value."""
        del axis
        return [value.copy("K") for value in values]

    def broadcast(self, values: Sequence[Any], root: int) -> list[Any]:
        """Copy the value."""
        del root
        return [value.copy("K") for value in values]
