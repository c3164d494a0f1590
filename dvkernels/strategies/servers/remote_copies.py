"""Copies of a variable whose rows lie in server processes: nothing of it is here but its shape."""

from __future__ import annotations

from typing import Any

import numpy as np

from dvkernels.devices.array_spec import Array
from dvkernels.strategies.servers.remote_table import RemoteTable
from dvkernels.values.placement import Placement
from dvkernels.variables.copies import Copies
from dvkernels.variables.modes import VariableAggregation, VariableSynchronization
from dvkernels.variables.table_server import SERVED

__all__: list[str] = []


class RemoteCopies(Copies):
    """Copies of a variable that servers have: all reads and writes are requests to them."""

    __slots__ = ("table",)
    server: RemoteTable

    def __init__(
        self,
        table: RemoteTable,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        placement: Placement,
        name: str,
        aggregation: VariableAggregation,
    ) -> None:
        self.name = name
        self.placement = placement
        self.memory = placement.memory
        self.synchronization = VariableSynchronization.ON_WRITE
        self.aggregation = aggregation
        self.is_slot = False
        self._scratch = None
        self._holdings = []
        self.mode = SERVED
        self.server = self.table = table
        # Of no memory, and never read: checks look at shape and dtype.
        self.arrays = (np.broadcast_to(np.zeros((), dtype), shape),)

    @property
    def views(self) -> tuple[Array, ...]:  # type: ignore[override]
        """The content as it is now, read-only."""
        return (self.table.read(self),)

    def duplicate(self) -> Copies:
        """Return a new variable of the same contents, modes and name."""
        placement = self.placement
        assert placement.make_copies is not None
        made: Copies = placement.make_copies(
            self.views[0], placement, self.name, self.synchronization, self.aggregation
        )
        return made
