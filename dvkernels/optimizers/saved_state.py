"""Saved state of an optimizer: entries per variable, their checks, and their match to variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dvkernels.devices.array_spec import Spec
from dvkernels.user_errors import brief
from dvkernels.variables.variable import Variable

__all__: list[str] = []

Entry = dict[str, Any]


def make_entry(
    variable: Variable, steps: int, slots: Mapping[str, Variable], names: Sequence[str]
) -> Entry:
    """Return the entry of a variable, with zeros for slots that do not exist yet."""
    zeros = np.zeros(variable.shape, variable.dtype)
    return {
        "name": variable.name,
        "shape": list(variable.shape),
        "dtype": variable.dtype.name,
        "steps": steps,
        "slots": {name: slots[name].numpy() if name in slots else zeros.copy() for name in names},
    }


def checked_progress(state: Any, slot_names: Sequence[str]) -> int:
    """Return the largest step count in a state; raise ValueError unless the state is valid."""
    iterations = state.get("iterations") if isinstance(state, dict) else None
    if type(iterations) is not int or iterations < 0:
        raise ValueError(f"expected the state of an optimizer; got {brief(state)}")
    if state.get("slot_names") != list(slot_names):
        raise ValueError(
            f"expected the state of an optimizer with the slots {list(slot_names)}; got "
            f"one with {brief(state.get('slot_names'), 200)}; create the optimizer with the "
            f"arguments that it had"
        )
    return iterations


def checked_entries(given: Any, slot_names: Sequence[str]) -> list[Entry]:
    """Return the entries of a state, with copies of its arrays; raise ValueError for bad ones."""
    if not isinstance(given, (list, tuple)):
        raise ValueError(
            "the state of an optimizer holds 'variables', with the slots and steps of each; this "
            "one has none (an older version left them out): restore a checkpoint instead"
        )
    return [_checked_entry(each, slot_names) for each in given]


def _checked_entry(given: Any, slot_names: Sequence[str]) -> Entry:
    try:
        spec = Spec(tuple(given["shape"]), np.dtype(given["dtype"]))
        entry = {
            "name": str(given["name"]),
            "shape": [*spec.shape],
            "dtype": spec.dtype.name,
            "steps": int(given["steps"]),
            "slots": {name: np.array(given["slots"][name]) for name in slot_names},
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"expected name, shape, dtype, steps and the slots {list(slot_names)} of a variable; "
            f"got {brief(given)}: {error}"
        ) from error
    for name, array in entry["slots"].items():
        if array.shape != spec.shape or array.dtype != spec.dtype:
            raise ValueError(
                f"{name} of variable {entry['name']!r}: expected {spec}, as of the variable; got "
                f"{Spec(array.shape, array.dtype)}"
            )
    if entry["steps"] < 0:
        raise ValueError(
            f"variable {entry['name']!r}: expected at least 0 steps; got {entry['steps']} steps"
        )
    return entry


def match_entries(
    entries: list[Entry], variables: Sequence[Variable], *, is_ordered: bool
) -> tuple[list[tuple[Variable, Entry]], list[Entry]]:
    """Match entries to variables; return the pairs, and the entries without a variable.

    Entries are matched in order if ``is_ordered`` or all names agree in order, otherwise by name.
    """
    for variable in variables:
        if not isinstance(variable, Variable):
            raise ValueError(f"variables: expected variables, got {brief(variable)}")
    if is_ordered and len(entries) != len(variables):
        raise ValueError(
            f"the state holds {len(entries)} variables, {_names(entries)}; got {len(variables)}"
        )
    is_same_list = len(entries) == len(variables) and all(
        _has_same_spec(entry, variable) and entry["name"] == variable.name
        for entry, variable in zip(entries, variables, strict=True)
    )
    if is_ordered or is_same_list:
        for entry, variable in zip(entries, variables, strict=True):
            _check_spec(entry, variable)
        return [*zip(variables, entries, strict=True)], []
    found = [(variable, _find_by_name(variable, entries)) for variable in variables]
    matched = [(variable, entry) for variable, entry in found if entry is not None]
    used = [entry for _, entry in matched]
    return matched, [entry for entry in entries if all(entry is not other for other in used)]


def claim_entries(variables: Sequence[Variable], pending: list[Entry]) -> list[Entry | None]:
    """Return the pending entries of new variables; None for a variable that starts with zeros."""
    if not pending:
        return [None] * len(variables)
    found = [_find_by_name(variable, pending) for variable in variables]
    left = [entry for entry in pending if all(entry is not other for other in found)]
    for variable, entry in zip(variables, found, strict=True):
        if entry is None and any(_has_same_spec(other, variable) for other in left):
            raise ValueError(
                f"variable {variable.name!r} is not in the loaded state of this optimizer, which "
                f"holds {_names(left)} without a variable so far, one of them of its shape and "
                f"dtype; give the variables the names in the state, or list them in its order: "
                f"load_state_dict(state, variables=[...])"
            )
    return found


def _find_by_name(variable: Variable, entries: list[Entry]) -> Entry | None:
    """Return the entry with the name of a variable; raise if several have it."""
    found = [entry for entry in entries if entry["name"] == variable.name]
    if len(found) > 1:
        raise ValueError(
            f"the state holds {len(found)} variables named {variable.name!r}; list the variables "
            f"in the order of the state: load_state_dict(state, variables=[...])"
        )
    for entry in found:
        _check_spec(entry, variable)
    return found[0] if found else None


def _check_spec(entry: Entry, variable: Variable) -> None:
    if not _has_same_spec(entry, variable):
        raise ValueError(
            f"the state holds {entry['name']!r} of {entry['dtype']}{entry['shape']}, and variable "
            f"{variable.name!r} is {Spec(variable.shape, variable.dtype)}"
        )


def _has_same_spec(entry: Entry, variable: Variable) -> bool:
    return (tuple(entry["shape"]), entry["dtype"]) == (variable.shape, variable.dtype.name)


def _names(entries: list[Entry]) -> str:
    names = ", ".join(repr(entry["name"]) for entry in entries[:10])
    return names + (f" and {len(entries) - 10} more" if len(entries) > 10 else "")
