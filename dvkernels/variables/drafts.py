"""Drafts of a variable in ``update``: one per copy, written to the copies all together."""

from __future__ import annotations

from collections.abc import Sequence

from dvkernels.variables.copies import Draft
from dvkernels.variables.synchronization import VariableAggregation, VariableSynchronization
from dvkernels.variables.variable import Variable, new_variable, storage_of

__all__: list[str] = []


def drafts_of(variable: Variable) -> list[Variable]:
    """Return one draft variable per copy; its writes take effect by :func:`commit_drafts`."""
    copies = storage_of(variable)
    ranks = range(len(copies.arrays))
    return [
        new_variable(
            Draft(copies, rank),
            variable.trainable,
            VariableSynchronization.ON_WRITE,
            VariableAggregation.NONE,
        )
        for rank in ranks
    ]


def commit_drafts(variable: Variable, drafts: Sequence[Variable]) -> None:
    """Write the contents of the drafts to the copies, all together."""
    drafted = [storage_of(draft) for draft in drafts]
    if any(isinstance(copies, Draft) and copies.is_written for copies in drafted):
        storage_of(variable).commit([copies.arrays[0] for copies in drafted])


def end_drafts(drafts: Sequence[Variable]) -> None:
    """End the drafts: later writes to them raise."""
    for draft in drafts:
        copies = storage_of(draft)
        assert isinstance(copies, Draft)
        copies.has_ended = True
