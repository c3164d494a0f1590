"""Saved variable: the arrays that a checkpoint saves of a variable, and their way back."""

from __future__ import annotations

from typing import Any, NamedTuple

from dvkernels.variables.synchronization import (
    SYNC_MODES,
    VariableAggregation,
    VariableSynchronization,
    aggregated,
)
from dvkernels.variables.variable import Variable, copies_of, storage_of

__all__: list[str] = []


class SavedVariable(NamedTuple):
    """Arrays that a checkpoint saves of a variable: ``total`` in all, some of this process.

    Attributes
    ----------
    arrays : tuple of array
        The arrays of this process; they may be the copies themselves.
    first : int
        The index of the first of them among the ``total`` arrays of all processes.
    total : int
        1 if the copies are equal or have an aggregate, which every process then holds; else the
        number of replicas.
    """

    arrays: tuple[Any, ...]
    first: int = 0
    total: int = 1


def saved_by(variable: Variable) -> SavedVariable:
    """Return the arrays that a checkpoint saves of a variable.

    Every worker must call this, because an aggregate is computed over all workers.
    """
    copies, how = storage_of(variable), variable.aggregation
    match variable.synchronization:
        case VariableSynchronization.ON_WRITE:
            return SavedVariable(copies.arrays[:1])
        case VariableSynchronization.ON_READ if how is not VariableAggregation.NONE:
            return SavedVariable((aggregated(copies, how, list(copies.arrays)),))
        case _:
            placement = copies.placement
            return SavedVariable(copies.arrays, placement.first_replica, placement.num_replicas)


def assign_first_copy(variable: Variable) -> None:
    """Assign the first copy's content in cross-replica context, after all copies got one value."""
    mode = SYNC_MODES[variable.synchronization]
    mode.write_across(storage_of(variable), variable.aggregation, "assign", copies_of(variable)[0])
