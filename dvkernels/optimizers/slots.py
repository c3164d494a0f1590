"""Slots and step counts of an optimizer, per variable, for the lifetime of the variable."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.optimizers import saved_state
from dvkernels.variables.deep_copy import on_deepcopy
from dvkernels.variables.variable import Variable, slot_of

__all__: list[str] = []


class VariableState(NamedTuple):
    """Slots of a variable by name, and its step count.

    The count is an int64 array of shape (), so that a checkpoint restores it like a slot.
    """

    slots: dict[str, Variable]
    steps: Any


class Slots:
    """Weak mapping from variables to their states, by identity: variables compare elementwise.

    ``pending`` holds the entries of a loaded state whose variables have not been seen yet.
    """

    def __init__(self, pending: Sequence[saved_state.Entry] = ()) -> None:
        self.pending = [*pending]
        self._states: dict[int, tuple[weakref.ref[Variable], VariableState]] = {}

    @classmethod
    def from_entries(
        cls,
        matched: Iterable[tuple[Variable, saved_state.Entry]],
        pending: Sequence[saved_state.Entry],
        names: Sequence[str],
    ) -> Slots:
        """Return the slots of a loaded state, given its matched and its pending entries."""
        made = cls(pending)
        for variable, entry in matched:
            made._set(variable, _new_state(variable, entry, names))
        return made

    def states_of(self, variables: Sequence[Variable], names: Sequence[str]) -> list[VariableState]:
        """Return the states of variables; of new ones the pending states, or zeros."""
        new = [variable for variable in variables if not self.has(variable)]
        if new:
            claimed = saved_state.claim_entries(new, self.pending)
            made = [
                _new_state(variable, entry, names)
                for variable, entry in zip(new, claimed, strict=True)
            ]
            for variable, state in zip(new, made, strict=True):
                self._set(variable, state)
            self.pending = [
                entry for entry in self.pending if all(entry is not other for other in claimed)
            ]
        states = [self._states[id(variable)][1] for variable in variables]
        for variable, state in zip(variables, states, strict=True):
            for name in names:
                if name not in state.slots:  # for example after momentum was set later
                    state.slots[name] = slot_of(variable, name)
        return states

    def has(self, variable: Variable) -> bool:
        """Return whether a variable has a state: its own, not that of a dead one of the same id."""
        found = self._states.get(id(variable))
        return found is not None and found[0]() is variable

    def living(self) -> list[tuple[Variable, VariableState]]:
        """Return the living variables and their states, in the order of their first steps."""
        pairs = [(ref(), state) for ref, state in list(self._states.values())]
        return [(variable, state) for variable, state in pairs if variable is not None]

    def _set(self, variable: Variable, state: VariableState) -> None:
        owner, key = weakref.ref(self), id(variable)

        def remove(ref: weakref.ref[Variable]) -> None:
            slots = owner()  # a weak reference, so that no cycle keeps the slots alive
            if slots is not None and slots._states.get(key, (None,))[0] is ref:
                del slots._states[key]

        self._states[key] = weakref.ref(variable, remove), state

    def __deepcopy__(self, memo: dict[int, Any]) -> Slots:
        """Copy the states: for the copies of variables that the same call copies, else the same."""
        made = Slots(self.pending)

        def move(variable: Variable, duplicate: Variable) -> None:
            """Move the copied state of a variable to its copy."""
            found = made._states.pop(id(variable), None)
            if found is not None:
                made._set(duplicate, found[1])

        for variable, state in self.living():
            slots = {name: copy.deepcopy(slot, memo) for name, slot in state.slots.items()}
            made._set(memo.get(id(variable), variable), VariableState(slots, state.steps.copy()))
        on_deepcopy(memo, move)  # the call may copy the variables after the optimizer
        return made


def _new_state(
    variable: Variable, entry: saved_state.Entry | None, names: Sequence[str]
) -> VariableState:
    content = {} if entry is None else entry["slots"]
    slots = {name: slot_of(variable, name, content.get(name)) for name in names}
    return VariableState(slots, np.array(0 if entry is None else entry["steps"], np.int64))
