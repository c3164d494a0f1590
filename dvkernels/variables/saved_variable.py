"""Saved variable: the arrays that a checkpoint saves of a variable, and their way back."""

from __future__ import annotations

from typing import NamedTuple

from dvkernels.devices.array_spec import Array
from dvkernels.variables.modes import VariableAggregation, VariableSynchronization
from dvkernels.variables.synchronization import SYNC_MODES, aggregated
from dvkernels.variables.variable import Variable, storage_of

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

    arrays: tuple[Array, ...]
    first: int = 0
    total: int = 1


def saved_by(variable: Variable) -> SavedVariable:
    """Return the arrays that a checkpoint saves of a variable.

    Every worker must call this, because an aggregate is computed over all workers.
    """
    copies = storage_of(variable)
    match copies.synchronization:
        case VariableSynchronization.ON_WRITE:
            return SavedVariable(copies.views[:1])  # read from its servers, if it has any
        case VariableSynchronization.ON_READ if copies.aggregation is not VariableAggregation.NONE:
            return SavedVariable((aggregated(copies, list(copies.arrays)),))
        case _:
            placement = copies.placement
            return SavedVariable(copies.arrays, placement.first_replica, placement.num_replicas)


def assign_first_copy(variable: Variable) -> None:
    """Assign the first copy's content in cross-replica context, after all copies got one value."""
    copies = storage_of(variable)
    SYNC_MODES[copies.mode].write_across(copies, "assign", copies.arrays[0])
