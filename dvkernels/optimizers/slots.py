"""What an optimizer keeps for each variable, for as long as the variable lives."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dvkernels.optimizers import saved_state
from dvkernels.variables.variable import Variable, on_deepcopy, variable_like

__all__: list[str] = []


class Kept(NamedTuple):
    """Slots by name, and how many steps the variable has taken.

    Steps are an int64 array of shape (), so that a checkpoint restores them as it does slots.
    """

    slots: dict[str, Variable]
    steps: Any


class Slots:
    """What is kept, by the identity of the variable: variables compare elementwise.

    It does not keep the variables. ``pending`` is what a loaded state holds of variables that have
    not come yet.
    """

    def __init__(self, pending: Sequence[saved_state.Entry] = ()) -> None:
        self.pending = [*pending]
        self._kept: dict[int, tuple[weakref.ref[Variable], Kept]] = {}

    @classmethod
    def of(
        cls,
        chosen: Iterable[tuple[Variable, saved_state.Entry]],
        pending: Sequence[saved_state.Entry],
        names: Sequence[str],
    ) -> Slots:
        """Return what a state holds, where it is known whose that is."""
        made = cls(pending)
        for variable, entry in chosen:
            made._keep(variable, _made(variable, entry, names))
        return made

    def of_each(self, variables: Sequence[Variable], names: Sequence[str]) -> list[Kept]:
        """Return what is kept for variables; for new ones what was loaded, or zeros."""
        new = [variable for variable in variables if not self.has(variable)]
        if new:
            taken = saved_state.taken(new, self.pending)
            made = [
                _made(variable, entry, names) for variable, entry in zip(new, taken, strict=True)
            ]
            for variable, kept in zip(new, made, strict=True):
                self._keep(variable, kept)
            self.pending = [one for one in self.pending if all(one is not t for t in taken)]
        found = [self._kept[id(variable)][1] for variable in variables]
        for variable, kept in zip(variables, found, strict=True):
            for name in names:
                if name not in kept.slots:  # momentum, say, that was 0 before
                    kept.slots[name] = variable_like(variable, name)
        return found

    def has(self, variable: Variable) -> bool:
        """Return whether anything is kept for a variable, not for one whose place it has taken."""
        held = self._kept.get(id(variable))
        return held is not None and held[0]() is variable

    def living(self) -> list[tuple[Variable, Kept]]:
        """Return the variables that live with what is kept, in the order in which they came."""
        held = [(ref(), kept) for ref, kept in list(self._kept.values())]
        return [(variable, kept) for variable, kept in held if variable is not None]

    def _keep(self, variable: Variable, kept: Kept) -> None:
        me, key = weakref.ref(self), id(variable)

        def forget(ref: weakref.ref[Variable]) -> None:
            slots = me()  # weakly: what is kept goes with the optimizer, without a collection
            if slots is not None and slots._kept.get(key, (None,))[0] is ref:
                del slots._kept[key]

        self._kept[key] = weakref.ref(variable, forget), kept

    def __deepcopy__(self, memo: dict[int, Any]) -> Slots:
        """Return what the copies of variables keep that are copied in the same go.

        Of those that are not, what they keep for this copy themselves.
        """
        made = Slots(self.pending)

        def follow(variable: Variable, twin: Variable) -> None:
            """Let the twin have what is kept for the variable that it is a copy of."""
            held = made._kept.pop(id(variable), None)
            if held is not None:
                made._keep(twin, held[1])

        for variable, kept in self.living():
            slots = {name: copy.deepcopy(slot, memo) for name, slot in kept.slots.items()}
            made._keep(memo.get(id(variable), variable), Kept(slots, kept.steps.copy()))
        on_deepcopy(memo, follow)  # the variables may be copied later
        return made


def _made(variable: Variable, entry: saved_state.Entry | None, names: Sequence[str]) -> Kept:
    content = {} if entry is None else entry["slots"]
    slots = {name: variable_like(variable, name, content.get(name)) for name in names}
    return Kept(slots, np.array(0 if entry is None else entry["steps"], np.int64))
