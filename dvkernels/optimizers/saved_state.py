"""What the state of an optimizer says of its variables, and whose it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dvkernels.devices.buffers import Spec
from dvkernels.user_errors import shown
from dvkernels.variables.variable import Variable

__all__: list[str] = []

Entry = dict[str, Any]


def entry(
    variable: Variable, steps: int, slots: Mapping[str, Variable], names: Sequence[str]
) -> Entry:
    """Return what a state says of a variable; of slots that are not there yet, zeros."""
    nothing = np.zeros(variable.shape, variable.dtype)
    return {
        "name": variable.name,
        "shape": list(variable.shape),
        "dtype": variable.dtype.name,
        "steps": steps,
        "slots": {name: slots[name].numpy() if name in slots else nothing.copy() for name in names},
    }


def checked_progress(state: Any, slot_names: Sequence[str]) -> int:
    """Return the most steps that a variable has taken; raise unless it is a state with it."""
    iterations = state.get("iterations") if isinstance(state, dict) else None
    if type(iterations) is not int or iterations < 0:
        raise ValueError(f"expected the state of an optimizer; got {shown(state)}")
    if state.get("slot_names") != list(slot_names):
        raise ValueError(
            f"expected the state of an optimizer with the slots {list(slot_names)}; got "
            f"one with {shown(state.get('slot_names'), 200)}; make the optimizer as it was"
        )
    return iterations


def checked_entries(given: Any, slot_names: Sequence[str]) -> list[Entry]:
    """Return what a state says of variables, with arrays of its own; raise unless it is that."""
    if not isinstance(given, (list, tuple)):
        raise ValueError(
            "the state of an optimizer holds 'variables', with the slots and steps of each; this "
            "one has none (a version that left them out wrote it): restore a checkpoint instead"
        )
    return [_checked_entry(one, slot_names) for one in given]


def _checked_entry(given: Any, slot_names: Sequence[str]) -> Entry:
    try:
        spec = Spec(tuple(given["shape"]), np.dtype(given["dtype"]))
        made = {
            "name": str(given["name"]),
            "shape": [*spec.shape],
            "dtype": spec.dtype.name,
            "steps": int(given["steps"]),
            "slots": {name: np.array(given["slots"][name]) for name in slot_names},
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"expected name, shape, dtype, steps and the slots {list(slot_names)} of a variable; "
            f"got {shown(given)}: {error}"
        ) from error
    for name, array in made["slots"].items():
        if array.shape != spec.shape or array.dtype != spec.dtype:
            raise ValueError(
                f"{name} of variable {made['name']!r}: expected {spec}, as of the variable; got "
                f"{Spec(array.shape, array.dtype)}"
            )
    if made["steps"] < 0:
        raise ValueError(f"variable {made['name']!r} has taken {made['steps']} steps")
    return made


def matched(
    entries: list[Entry], variables: Sequence[Variable], *, is_ordered: bool
) -> tuple[list[tuple[Variable, Entry]], list[Entry]]:
    """Return the variables that entries are of, and the entries that are left over."""
    for variable in variables:
        if not isinstance(variable, Variable):
            raise ValueError(f"variables: expected variables, got {shown(variable)}")
    if is_ordered and len(entries) != len(variables):
        raise ValueError(
            f"the state holds {len(entries)} variables, {_names(entries)}; got {len(variables)}"
        )
    same = len(entries) == len(variables) and all(
        _is_alike(one, v) and one["name"] == v.name
        for one, v in zip(entries, variables, strict=True)
    )
    if is_ordered or same:
        for one, variable in zip(entries, variables, strict=True):
            _check_fits(one, variable)
        return [*zip(variables, entries, strict=True)], []
    found = [(v, _named(v, entries)) for v in variables]
    chosen = [(variable, one) for variable, one in found if one is not None]
    used = [one for _, one in chosen]
    return chosen, [one for one in entries if all(one is not other for other in used)]


def taken(variables: Sequence[Variable], pending: list[Entry]) -> list[Entry | None]:
    """Return the entries of variables that come for the first time; None: begins with zeros."""
    if not pending:
        return [None] * len(variables)
    found = [_named(variable, pending) for variable in variables]
    left = [one for one in pending if all(one is not other for other in found)]
    for variable, one in zip(variables, found, strict=True):
        if one is None and any(_is_alike(other, variable) for other in left):
            raise ValueError(
                f"variable {variable.name!r} is not in the loaded state of this optimizer, which "
                f"holds {_names(left)} for which no variable has come, of its shape and dtype "
                f"among them; give the variables their names, or say whose they are: "
                f"load_state_dict(state, variables=[...])"
            )
    return found


def _named(variable: Variable, entries: list[Entry]) -> Entry | None:
    """Return the one entry of a variable's name."""
    found = [one for one in entries if one["name"] == variable.name]
    if len(found) > 1:
        raise ValueError(
            f"the state holds {len(found)} variables called {variable.name!r}; say whose they "
            f"are: load_state_dict(state, variables=[...]), in the order of the state"
        )
    for one in found:
        _check_fits(one, variable)
    return found[0] if found else None


def _check_fits(one: Entry, variable: Variable) -> None:
    if not _is_alike(one, variable):
        raise ValueError(
            f"the state holds {one['name']!r} of {one['dtype']}{one['shape']}, and variable "
            f"{variable.name!r} is {Spec(variable.shape, variable.dtype)}"
        )


def _is_alike(one: Entry, variable: Variable) -> bool:
    return (tuple(one["shape"]), one["dtype"]) == (variable.shape, variable.dtype.name)


def _names(entries: list[Entry]) -> str:
    shown = ", ".join(repr(one["name"]) for one in entries[:10])
    return shown + (f" and {len(entries) - 10} more" if len(entries) > 10 else "")
