"""State of an optimizer: slots and step counts of its variables, saved, loaded and copied."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol, Self

from dvkernels import context
from dvkernels.devices.array_spec import HostArray
from dvkernels.errors import ContextError
from dvkernels.optimizers import saved_state
from dvkernels.optimizers.slots import Slots, VariableState
from dvkernels.user_errors import brief
from dvkernels.variables.variable import Variable

__all__: list[str] = []


class StatesElsewhere(Protocol):
    """States of optimizers for variables whose rows lie in other processes."""

    def slots(self, optimizer: Any, variable: Variable) -> tuple[Variable, ...]:
        """Return the slots of a variable, in the order of ``slot_names``."""

    def steps(self, optimizer: Any, variable: Variable) -> HostArray:
        """Return the step count of a variable, as it is now."""

    def load(
        self, optimizer: Any, variable: Variable, slots: Mapping[str, Any], steps: int
    ) -> None:
        """Load the state of a variable: zeros for a slot that is not given."""

    def slotted(self, optimizer: Any) -> dict[int, tuple[Variable, int]]:
        """Return the variables with slots, in the order of their creation, and their steps."""


class OptimizerState(abc.ABC):
    """Base class of optimizers: their slots and step counts."""

    def __init__(self) -> None:
        self._iterations = 0
        self._slots = Slots()
        # Those of variables of other processes, to which this optimizer has been sent.
        self.states_elsewhere: StatesElsewhere | None = None

    def settings(self) -> dict[str, Any]:
        """Return the attributes that are no state: another optimizer with them does the same."""
        if self._slots.pending:
            raise ContextError(
                f"a {type(self).__name__} cannot be sent to servers with a loaded state of "
                f"variables that it has not seen; name them: "
                f"load_state_dict(state, variables=[...])"
            )
        state = ("_iterations", "_slots", "states_elsewhere")
        return {name: value for name, value in vars(self).items() if name not in state}

    @property
    @abc.abstractmethod
    def slot_names(self) -> tuple[str, ...]:
        """Names of the slots of each variable."""

    @property
    def iterations(self) -> int:
        """Largest step count of a variable."""
        return max([self._iterations, *(steps for _, steps in self._elsewhere())])

    def slots(self, variable: Variable) -> tuple[Variable, ...]:
        """Return the slots of a variable, in the order of :attr:`slot_names`; zeros at first."""
        self._check_variable("slots", variable)
        names = self.slot_names
        elsewhere: StatesElsewhere | None = variable.owner.optimizer_states
        if elsewhere is not None:
            return elsewhere.slots(self, variable)
        state = self._state_of("slots", variable)
        return tuple(state.slots[name] for name in names)

    def steps(self, variable: Variable) -> Any:
        """Return the step count of a variable, an int64 array of shape ()."""
        self._check_variable("steps", variable)
        elsewhere: StatesElsewhere | None = variable.owner.optimizer_states
        if elsewhere is not None:
            return elsewhere.steps(self, variable)
        return self._state_of("steps", variable).steps

    def _check_variable(self, verb: str, variable: Any) -> None:
        if not isinstance(variable, Variable):
            raise TypeError(f"{verb} belong to variables; got {brief(variable)}")

    def _elsewhere(self) -> Sequence[tuple[Variable, int]]:
        """Return the variables of other processes that have slots, and their step counts."""
        states = self.states_elsewhere
        return () if states is None else [*states.slotted(self).values()]

    def _state_of(self, verb: str, variable: Variable) -> VariableState:
        if not self._slots.has(variable):
            self._check_cross_replica(f"{verb} of variable {variable.name!r}, which has none yet")
        return self._slots.states_of([variable], self.slot_names)[0]

    def _check_cross_replica(self, verb: str) -> None:
        """Raise in replica context, where each replica would create its own slots."""
        frame = context.find()
        if frame is not None and frame.replica is not None:
            raise ContextError(
                f"{verb}, in replica {frame.replica.replica_id_in_sync_group}: each replica would "
                f"make its own; call it outside of run or in merge_call"
            )

    @property
    def slotted(self) -> tuple[Variable, ...]:
        """Variables that have taken steps, in the order of their first steps.

        Those of server processes come last, in the order of their creation.
        """
        pairs = [*self._slots.living(), *self._elsewhere()]
        return tuple(variable for variable, _ in pairs)

    def __copy__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} has no shallow copy: both would update the same slots; use "
            f"copy.deepcopy, for the variables too if the copy is to update copies of them"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if self.states_elsewhere is not None:
            raise ContextError(
                f"deepcopy of a {type(self).__name__} whose slots lie in server processes: load "
                f"its state_dict() into a new one, with the variables of that"
            )
        made = object.__new__(type(self))
        memo[id(self)] = made
        vars(made).update((name, copy.deepcopy(value, memo)) for name, value in vars(self).items())
        return made

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: its slots belong to variables; save "
            f"state_dict(), or the whole run with dv.Checkpoint"
        )

    # -- states ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return step counts and slots as plain data and arrays, for :meth:`load_state_dict`.

        ``"variables"`` lists, for each variable that has taken steps, in the order of their first
        steps, its ``"name"``, ``"shape"``, ``"dtype"`` and ``"steps"``, and its ``"slots"``, an
        array by name. Arguments such as learning rate and momentum are not part of the state.
        """
        entries = [
            saved_state.make_entry(variable, int(state.steps), state.slots, self.slot_names)
            for variable, state in self._slots.living()
        ]
        for variable, steps in self._elsewhere():
            slots = dict(zip(self.slot_names, self.slots(variable), strict=True))
            entries.append(saved_state.make_entry(variable, steps, slots, self.slot_names))
        return {
            "iterations": self.iterations,
            "slot_names": list(self.slot_names),
            "variables": [*entries, *copy.deepcopy(self._slots.pending)],
        }

    def load_state_dict(self, state: Any, variables: Sequence[Variable] | None = None) -> None:
        """Load a state that :meth:`state_dict` returned.

        Parameters
        ----------
        state : dict
            What :meth:`state_dict` returned.
        variables : sequence of Variable, optional
            The variables of the state: as many as the state holds, in its order. If not given,
            variables are matched by name: those that have taken steps with this optimizer now, and
            others at their first step. A state of the same list of variables needs no unique names.

        Raises
        ------
        ValueError
            Not a state of an optimizer, that of an optimizer with other slots, or one that does not
            match the variables. Nothing has changed.
        ContextError
            Called in a replica.

        Notes
        -----
        A new variable that is not in the state begins with zeros, unless the state still holds an
        unmatched variable of its shape and dtype under another name: then ``apply_gradients``
        raises ``ValueError``, since the two may be the same variable.
        """
        self._check_cross_replica("load_state_dict")
        iterations = saved_state.checked_progress(state, self.slot_names)
        entries = saved_state.checked_entries(state.get("variables"), self.slot_names)
        known = self.slotted if variables is None else tuple(variables)
        matched, pending = saved_state.match_entries(
            entries, known, is_ordered=variables is not None
        )
        here = [pair for pair in matched if pair[0].owner.optimizer_states is None]
        entries_by_id = {id(variable): entry for variable, entry in matched}
        elsewhere = [v for v, _ in matched if v.owner.optimizer_states is not None]
        elsewhere += [v for v, _ in self._elsewhere() if id(v) not in entries_by_id]
        self._slots = Slots.from_entries(here, pending, self.slot_names)
        self._iterations = iterations
        for variable in elsewhere:
            entry = entries_by_id.get(id(variable), {"slots": {}, "steps": 0})
            variable.owner.optimizer_states.load(self, variable, entry["slots"], entry["steps"])

    def progress(self) -> dict[str, Any]:
        """Return the state that a checkpoint saves besides the slots and steps of variables."""
        pending = copy.deepcopy(self._slots.pending)
        state = {"iterations": self.iterations, "slot_names": list(self.slot_names)}
        return {**state, "pending": pending} if pending else state

    def set_progress(self, state: Any) -> None:
        """Load a state that :meth:`progress` returned; raise ValueError for anything else."""
        iterations = saved_state.checked_progress(state, self.slot_names)
        self._slots.pending = saved_state.checked_entries(state.get("pending", []), self.slot_names)
        self._iterations = iterations
