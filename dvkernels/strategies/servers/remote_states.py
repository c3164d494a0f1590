"""Remote states of optimizers: slots and step counts, which servers keep beside the rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np

from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import ContextError
from dvkernels.optimizers.optimizer import Optimizer
from dvkernels.strategies.servers import server_loop
from dvkernels.strategies.servers.client import ServerClient
from dvkernels.strategies.servers.remote_copies import RemoteCopies
from dvkernels.strategies.servers.remote_table import RemoteTable
from dvkernels.strategies.servers.requests import SlotKey
from dvkernels.values.placement import Placement
from dvkernels.variables.modes import VariableAggregation
from dvkernels.variables.variable import Variable, new_variable, storage_of, variables_of

__all__: list[str] = []


@final
class RemoteStates:
    """States of optimizers for the variables of one strategy; ``StatesElsewhere``."""

    def __init__(
        self, client: ServerClient, placement_of: Callable[[], Placement | None], is_in_call: bool
    ) -> None:
        self._client = client
        self._placement_of = placement_of
        self._is_in_call = is_in_call

    def slots(self, optimizer: Any, variable: Variable) -> tuple[Variable, ...]:
        """Return the slots of a variable: variables of other keys in the same blocks."""
        copies = storage_of(variable)
        assert isinstance(copies, RemoteCopies)
        table = copies.table
        made = []
        for name in optimizer.slot_names:
            key = SlotKey(optimizer, table.key, name)
            slot = RemoteCopies(
                RemoteTable(self._client, key, table.blocks),
                variable.shape,
                variable.dtype,
                copies.placement,
                f"{variable.name}/{name}",
                VariableAggregation.NONE,
            )
            slot.is_slot = True
            made.append(new_variable(slot, trainable=False))
        return tuple(made)

    def steps(self, optimizer: Any, variable: Variable) -> HostArray:
        """Return the step count of a variable; the servers count alike."""
        return np.array(self._ask_for_steps(optimizer, variable, None), np.int64)

    def load(
        self, optimizer: Any, variable: Variable, slots: Mapping[str, Any], steps: int
    ) -> None:
        """Load the state of a variable: zeros for a slot that is not given."""
        names = optimizer.slot_names
        for name, slot in zip(names, self.slots(optimizer, variable), strict=True):
            zeros = np.zeros(variable.shape, variable.dtype)
            slot.assign(slots.get(name, zeros))
        self.set_steps(optimizer, variable, steps)

    def set_steps(self, optimizer: Any, variable: Variable, steps: Any) -> None:
        """Set the step count of a variable."""
        self._ask_for_steps(optimizer, variable, int(steps))

    def slotted(self, optimizer: Any) -> dict[int, tuple[Variable, int]]:
        """Return the variables with slots, in the order of their creation, and their steps."""
        if self._is_in_call:
            raise ContextError(
                f"the variables with slots of a {type(optimizer).__name__} were asked for in a "
                f"call, on a worker, which does not know all of them; ask outside of calls"
            )
        placement = self._placement_of()
        if placement is None:
            return {}
        request = ("slotted", server_loop.SLOTTED, optimizer)
        found: dict[int, int] = {}
        for listed in self._client.ask(
            f"the slots of a {type(optimizer).__name__}",
            [(rank, request) for rank in self._client.servers],
        ):
            found |= listed
        here = {
            copies.table.key: variable
            for variable in variables_of(placement)
            if isinstance(copies := storage_of(variable), RemoteCopies)
        }
        return {key: (here[key], found[key]) for key in sorted(found) if key in here}

    def _ask_for_steps(self, optimizer: Optimizer, variable: Variable, steps: int | None) -> Any:
        copies = storage_of(variable)
        assert isinstance(copies, RemoteCopies)
        request = functools.partial(optimizer.steps_at_server, variable)
        return copies.table.ask("steps", request, copies, steps)
